// sampled_dot reads rows of the bank where they lie, which is anywhere: what counts is how many bytes are on their way
// at once. A group of lanes, as many as a row has 16-byte words (at most a warp), reads kRows rows of the bank before it
// multiplies any of them; 256 threads then wait for up to 16 KiB. Columns are known, or drawn, kPiece at a time.
//
// Forward: a block has a row of x, which lies in shared memory, and a piece of its columns. Backward: a block has a row
// of dx, a slab of its features and a part of its columns, of which there are several only where rows and slabs leave
// multiprocessors without work; each group adds every so many-th of the columns, the groups' sums are added in their
// order, and the parts' by a second kernel in theirs. There is one writer for everything, and no atomic: the same bits
// in every run on the same device.
#include "sampled_dot.h"

#include <algorithm>

#include "../common/philox.h"
#include "device.h"
#include "portable.h"

namespace fastret {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;                  // on a multiprocessor: 64 registers a thread, which need no spill
constexpr int kPiece = 256;                 // columns that are known at a time
constexpr int kRows = 4;                    // rows of the bank a group has in flight
constexpr int64_t kMostFeatures = 11 << 10;  // x_i in float32 beside the columns, in 48 KiB

// Rows of any of the types, of which one view is not null.
template <class F, class B, class H> struct AnyRows {
  Global<F> f32;
  Global<B> bf16;
  Global<H> f16;
  int64_t stride = 0;
};
using InRows = AnyRows<const float, const BFloat16, const Half>;
using OutRows = AnyRows<float, BFloat16, Half>;

__device__ inline float read(const InRows& rows, int64_t row, int64_t feature) {
  const int64_t at = row * rows.stride + feature;
  if (rows.f32) return rows.f32[at];
  if (rows.bf16) return as_float(load<1>(rows.bf16, at).item[0]);
  return as_float(load<1>(rows.f16, at).item[0]);
}

template <class T> __device__ void put(const Global<T>& to, int64_t at, float value) {
  T narrowed;
  narrow(value, narrowed);
  to[at] = narrowed;
}
__device__ inline void write(const OutRows& rows, int64_t row, int64_t feature, float value) {
  const int64_t at = row * rows.stride + feature;
  if (rows.f32) put(rows.f32, at, value);
  else if (rows.bf16) put(rows.bf16, at, value);
  else put(rows.f16, at, value);
}

struct Columns {
  Global<const int64_t> first, index, seed;
  int64_t index_stride, count;  // scores a row
  int64_t bank_rows;
};

// Columns [begin, end) of the row into shared memory. The block must wait before it reads them.
__device__ inline void find_columns(const Columns& c, int64_t row, int64_t begin, int64_t end,
                                    const Shared<uint32_t>& column) {
  const auto keep = [&](int64_t place, int64_t value) {
    device_check(value >= 0 && value < c.bank_rows);
    column[place - begin] = uint32_t(value);
  };
  const int64_t own = c.first ? 1 : 0;
  if (own && begin == 0 && threadIdx.x == 0) keep(0, c.first[row]);
  if (c.index) {
    for (int64_t p = max(begin, own) + threadIdx.x; p < end; p += kThreads)
      keep(p, c.index[row * c.index_stride + p - own]);
    return;
  }
  const int64_t from = max(begin, own) - own, to = end - own;  // among the draws, which come four at a time
  const uint64_t seed = uint64_t(int64_t(c.seed[0]));
  for (int64_t four = from / 4 + threadIdx.x; four * 4 < to; four += kThreads) {
    const PhiloxWords drawn = philox(uint32_t(four), uint32_t(row), seed);
    for (int k = 0; k < 4; ++k)
      if (four * 4 + k >= from && four * 4 + k < to)
        keep(own + four * 4 + k, int64_t(uint64_t(drawn.word[k]) * uint64_t(c.bank_rows) >> 32));
  }
}

// kThreads threads as groups of `lanes`, a power of two that divides a warp.
struct Group {
  int lanes, lane, number, groups;
  __device__ explicit Group(int lanes)
      : lanes(lanes), lane(threadIdx.x % lanes), number(threadIdx.x / lanes), groups(kThreads / lanes) {}
};

// B: what the bank is stored as, N: how many features are loaded at once, 16 bytes of them or one.
template <class B, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward(InRows x, Global<const B> bank, int64_t bank_stride, int width, Columns columns, int64_t pieces, int lanes,
            Global<float> scores, int64_t scores_stride) {
  FASTRET_DYNAMIC_SHARED(float, row);
  FASTRET_SHARED(uint32_t, column, kPiece);
  const int64_t i = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece;
  const int64_t end = min(columns.count, begin + int64_t(kPiece));
  for (int c = threadIdx.x; c < width; c += kThreads) row[c] = read(x, i, c);
  find_columns(columns, i, begin, end, column);
  __syncthreads();

  const Group g(lanes);
  const int known = int(end - begin);
  for (int k0 = 0; k0 < known; k0 += g.groups * kRows) {  // the same turns for all lanes of a warp, which shuffle
    float sum[kRows] = {};
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) {
      const uint32_t j = column[min(k0 + r * g.groups + g.number, known - 1)];  // past the end: the last again
      at[r] = j * bank_stride;
    }
    for (int c = g.lane * N; c < width; c += g.lanes * N) {
      Pack<B, N> loaded[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) loaded[r] = load<N>(bank, at[r] + c);
      constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
      for (int p = 0; p < N; p += kPart) {
        const Pack<float, kPart> of_x = load<kPart>(row, c + p);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kPart; ++e) sum[r] += of_x.item[e] * as_float(loaded[r].item[p + e]);
      }
    }
    for (int bit = g.lanes / 2; bit > 0; bit /= 2)
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += __shfl_xor_sync(kWholeWarp, sum[r], bit);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int k = k0 + r * g.groups + g.number;
      if (g.lane == 0 && k < known) scores[i * scores_stride + begin + k] = sum[r];
    }
  }
}

template <class B, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward(Global<const float> grad, int64_t grad_stride, Global<const B> bank, int64_t bank_stride, int width,
             Columns columns, int64_t part_columns, int lanes, Global<float> partial, OutRows dx) {
  FASTRET_SHARED(uint32_t, column, kPiece);
  FASTRET_SHARED(float, weight, kPiece);
  FASTRET_SHARED(float, of_group, kThreads * N);
  const Group g(lanes);
  const int64_t i = blockIdx.x;
  const int slab = g.lanes * N, slab_begin = blockIdx.y * slab, feature = slab_begin + g.lane * N;
  const int64_t part_begin = blockIdx.z * part_columns, part_end = min(columns.count, part_begin + part_columns);
  float sum[N] = {};
  for (int64_t begin = part_begin; begin < part_end; begin += kPiece) {
    const int64_t end = min(part_end, begin + int64_t(kPiece));
    const int known = int(end - begin);
    __syncthreads();  // the last piece has been read
    find_columns(columns, i, begin, end, column);
    for (int k = threadIdx.x; k < known; k += kThreads) weight[k] = grad[i * grad_stride + begin + k];
    __syncthreads();
    if (feature >= width) continue;
    for (int k0 = g.number; k0 < known; k0 += g.groups * kRows) {
      Pack<B, N> loaded[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t j = column[min(k0 + r * g.groups, known - 1)];
        loaded[r] = load<N>(bank, j * bank_stride + feature);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int k = k0 + r * g.groups;
        if (k >= known) break;  // not a weight of 0: 0 times infinity would be NaN
        const float w = weight[k];
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] += w * as_float(loaded[r].item[e]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < N; ++e) of_group[g.number * slab + g.lane * N + e] = sum[e];
  __syncthreads();
  for (int f = threadIdx.x; f < slab && slab_begin + f < width; f += kThreads) {
    float total = 0;
    for (int group = 0; group < g.groups; ++group) total += of_group[group * slab + f];
    if (partial) partial[(int64_t(blockIdx.z) * gridDim.x + i) * width + slab_begin + f] = total;
    else write(dx, i, slab_begin + f, total);
  }
}

// What parts, (parts, rows, width), add up to in their order.
__global__ void __launch_bounds__(kThreads)
    add_parts(Global<const float> partial, int64_t parts, int64_t rows, int64_t width, OutRows dx) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * width) return;
  float total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const float of_part = partial[part * rows * width + at];
    total += of_part;
  }
  write(dx, at / width, at % width, total);
}

bool is_row_type(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

void check_problem(const SampledDotProblem& p) {
  require(is_row_type(p.x.dtype), "x", "expected float32, bfloat16 or float16");
  require(is_row_type(p.bank.dtype), "bank", "expected float32, bfloat16 or float16");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.bank, "bank", p.bank.rows, p.x.cols);
  require(p.x.cols <= kMostFeatures, "x", "expected at most " + std::to_string(kMostFeatures) + " columns on CUDA");
  require(p.bank.rows <= int64_t(1) << 31, "bank", "more than 2^31 rows");
  require(p.x.rows == 0 || p.bank.rows > 0, "bank", "no rows");
  require(p.count >= 0, "count", "must not be negative");
  require((p.count > 0) != (p.index.cols > 0), "index, count", "expected one of them");
  if (p.has_first()) check(p.first, "first", 1, p.x.rows, DType::i64);
  if (p.count > 0) check(p.seed, "seed", 1, 1, DType::i64);
  else check(p.index, "index", p.x.rows, p.index.cols, DType::i64);
}

Columns columns_of(const SampledDotProblem& p) {
  Columns c{};
  if (p.has_first()) c.first = global<const int64_t>(p.first, "first");
  if (p.count > 0) c.seed = global<const int64_t>(p.seed, "seed");
  else c.index = global<const int64_t>(p.index, "index");
  c.index_stride = p.index.stride;
  c.count = p.columns();
  c.bank_rows = p.bank.rows;
  return c;
}

template <class Rows> Rows any_rows(const Array& a, const char* name) {
  Rows rows;
  if (a.dtype == DType::f32) rows.f32 = global<typename decltype(rows.f32)::Type>(a, name);
  else if (a.dtype == DType::bf16) rows.bf16 = global<typename decltype(rows.bf16)::Type>(a, name);
  else rows.f16 = global<typename decltype(rows.f16)::Type>(a, name);
  rows.stride = a.stride;
  return rows;
}

// Calls visit(bank as its type, number of features a load as a constant).
template <class B, class Visit> void with_width(const Array& bank, Visit visit) {
  constexpr int kVector = 16 / sizeof(B);
  const bool aligned = reinterpret_cast<uintptr_t>(bank.data) % 16 == 0 && bank.cols % kVector == 0 &&
                       (bank.rows <= 1 || bank.stride % kVector == 0);
  const Global<const B> view = global<const B>(bank, "bank");
  if (aligned) visit(view, std::integral_constant<int, kVector>{});
  else visit(view, std::integral_constant<int, 1>{});
}
template <class Visit> void with_bank(const Array& bank, Visit visit) {
  if (bank.dtype == DType::bf16) with_width<BFloat16>(bank, visit);
  else if (bank.dtype == DType::f16) with_width<Half>(bank, visit);
  else with_width<float>(bank, visit);
}

template <class View> using BankType = std::remove_const_t<typename std::decay_t<View>::Type>;

// As few lanes as hold a row, at most a warp.
int lanes_for(int64_t width, int vector) {
  int lanes = 1;
  while (lanes < kWarpLanes && lanes * vector < width) lanes *= 2;
  return lanes;
}

// How backward is cut on the device that is current.
struct Cut {
  int64_t slabs, parts, part_columns;
};

Cut cut(const SampledDotProblem& p, int64_t slab) {
  Cut c{(p.x.cols + slab - 1) / slab, 1, p.columns()};
  const int64_t pieces = (p.columns() + kPiece - 1) / kPiece, room = int64_t(kBlocks) * device_limits().multiprocessors;
  const int64_t wanted = std::min(pieces, room / std::max<int64_t>(p.x.rows * c.slabs, 1));
  if (wanted < 2) return c;
  c.part_columns = (pieces + wanted - 1) / wanted * kPiece;
  c.parts = (p.columns() + c.part_columns - 1) / c.part_columns;  // none of them empty
  return c;
}

}  // namespace

int64_t sampled_dot_parts(const SampledDotProblem& p) {
  check_problem(p);
  int64_t parts = 1;
  with_bank(p.bank, [&](const auto&, auto vector) {
    constexpr int kVector = decltype(vector)::value;
    parts = cut(p, lanes_for(p.x.cols, kVector) * kVector).parts;
  });
  return parts;
}

void sampled_dot_forward(const SampledDotProblem& p, const Array& scores, uintptr_t stream) {
  check_problem(p);
  check(scores, "scores", p.x.rows, p.columns(), DType::f32);
  if (scores.empty()) return;
  const int64_t pieces = (p.columns() + kPiece - 1) / kPiece;
  require(p.x.rows <= 0x7fffffff / pieces, "x", "too many rows for one launch");
  const InRows x = any_rows<InRows>(p.x, "x");
  with_bank(p.bank, [&](const auto& bank, auto vector) {
    using B = BankType<decltype(bank)>;
    constexpr int kVector = decltype(vector)::value;
    const Shape shape{"sampled_dot_forward", dim3(unsigned(p.x.rows * pieces)), dim3(kThreads),
                      size_t(p.x.cols) * sizeof(float), stream};
    launch(shape, forward<B, kVector>, x, bank, p.bank.stride, int(p.x.cols), columns_of(p), pieces,
           lanes_for(p.x.cols, kVector), global<float>(scores, "scores"), scores.stride);
  });
}

void sampled_dot_backward(const SampledDotProblem& p, const Array& grad, const Array& partial, const Array& dx,
                          uintptr_t stream) {
  check_problem(p);
  check(grad, "grad", p.x.rows, p.columns(), DType::f32);
  check(dx, "dx", p.x.rows, p.x.cols, p.x.dtype);
  if (dx.empty()) return;
  require(p.x.rows <= 0x7fffffff, "x", "too many rows for one launch");
  with_bank(p.bank, [&](const auto& bank, auto vector) {
    using B = BankType<decltype(bank)>;
    constexpr int kVector = decltype(vector)::value;
    const int lanes = lanes_for(p.x.cols, kVector);
    const Cut c = cut(p, lanes * kVector);
    const OutRows out = any_rows<OutRows>(dx, "dx");
    Global<float> sums;
    if (c.parts > 1) {
      check(partial, "partial", c.parts * p.x.rows, p.x.cols, DType::f32);
      require(partial.stride == partial.cols, "partial", "expected no gaps");
      sums = global<float>(partial, "partial");
    }
    const Shape shape{"sampled_dot_backward",
                      dim3(unsigned(p.x.rows), unsigned(c.slabs), unsigned(c.parts)), dim3(kThreads), 0, stream};
    launch(shape, backward<B, kVector>, global<const float>(grad, "grad"), grad.stride, bank, p.bank.stride,
           int(p.x.cols), columns_of(p), c.part_columns, lanes, sums, out);
    if (c.parts == 1) return;
    const int64_t blocks = (p.x.rows * p.x.cols + kThreads - 1) / kThreads;
    const Shape adding{"sampled_dot_add_parts", dim3(unsigned(blocks)), dim3(kThreads), 0, stream};
    launch(adding, add_parts, global<const float>(partial, "partial"), c.parts, p.x.rows, p.x.cols, out);
  });
}

}  // namespace cuda
}  // namespace fastret
