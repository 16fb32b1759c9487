// topk selects from strips of products, which a GEMM wrote. A team of threads has a row of the strip, or a part of it:
// a warp for k up to 256, a block up to 2048. It reads 16 bytes a thread, in the order of the columns. Scores no better
// than the team's bound, its k-th best so far, cost a comparison; the others, if the mask allows them, join the team's
// fresh keys, counted by ballots. Where the next chunk might not fit, the fresh keys are sorted in shared memory and
// merged into the best, and the bound rises. Best and fresh keys live in global memory, so that a strip which brings
// nothing moves nothing, and no sort is needed at a strip's end.
//
// A key is one integer, score above and column below: the order is total, so which thread brought a key when changes
// nothing. A later column of the bound's score is worse than it: `>` is exact, and NaN and the worst score fail it.
//
// Per row, of M columns: 4 M bytes and M comparisons; about k ln(M / k) keys of random scores join, in blocks of 128 to
// 256 of them (1024 to 2048 for a block), each a sort of 36 (66) steps and a merge of 8 (11). State: 4 KiB (32 KiB).
// H100, 50,000 x 1.28 million: 64 G scores are 256 GB, 76 ms from memory at 3.35 TB/s, about half where the strip is
// still in L2, beside 75 ms of products in bfloat16 at D = 384, which write as much; 3 to 4 instructions a score, 8 ms.
// Registers of select on sm_80 / 90a / 100, no spill: 56 / 56 / 47 and 8 KiB a block of four warps (k up to 256),
// 64 / 48 / 32 and 16 KiB a block of 256 threads.
#include "topk.h"

#include "bitonic.h"
#include "candidate.h"

namespace fastret {
namespace cuda {
namespace {

constexpr int kLoad = 4;  // scores a thread reads at once
constexpr float kWorst = -__builtin_huge_valf();

// A thread of a team. kPlaces: keys that are kept, and fresh keys, at least two chunks.
template <int kTeam_, int kPlaces_, int kThreads_> struct Plan {
  static constexpr int kTeam = kTeam_, kPlaces = kPlaces_, kThreads = kThreads_;
  static constexpr int kTeams = kThreads / kTeam;  // in a block
  static constexpr int kChunk = kTeam * kLoad;
  static constexpr int kFull = kPlaces - kChunk;   // more fresh keys than these: there may be no room for a chunk's
  static constexpr int kState = 2 * kPlaces + 1;   // best, ascending; fresh; how many of these
};
using Narrow = Plan<kWarpLanes, 256, 128>;
using Wide = Plan<256, 2048, 256>;

struct Relation {
  Global<const int64_t> row, col;
};

struct Allowed {
  Relation same, different, distinct;
  Global<const float> above, below;
  bool has_offset;
  int64_t offset, period, first_column;
};

struct Strip {
  Global<const float> products, row, col;
  int64_t stride, rows, cols, first_row, first_col;
  TopkScore score;
};

__device__ inline float score_or_worst(uint64_t key) { return key == kNoKey ? kWorst : score_of(key); }

// The column that the offset leaves out, or one that there is not.
__device__ inline int64_t left_out(const Allowed& a, int64_t row) {
  if (!a.has_offset) return -1;
  int64_t column = row + a.offset;
  if (a.period > 0) column = (column % a.period + a.period) % a.period;
  return column - a.first_column;
}

__device__ inline bool equal(const Relation& r, int64_t row, int64_t column) {
  const int64_t a = r.row[row], b = r.col[column];
  return a == b;
}

// All conditions but the offset, whose column is known before: left_out.
__device__ inline bool is_allowed(const Allowed& a, int64_t row, int64_t column, float score) {
  if (a.same.row && !equal(a.same, row, column)) return false;
  if (a.different.row && equal(a.different, row, column)) return false;
  if (a.distinct.row && equal(a.distinct, row, column)) return false;
  if (a.above) {
    const float bound = a.above[row];
    if (!(score > bound)) return false;
  }
  if (a.below) {
    const float bound = a.below[row];
    if (!(score < bound)) return false;
  }
  return true;
}

// kLoad values from the i-th on; NaN from `end` on.
__device__ inline void read(const Global<const float>& from, int64_t i, int64_t end, float (&value)[kLoad]) {
  if (i + kLoad <= end) {
    const Pack<float, kLoad> loaded = load<kLoad>(from, i);
#pragma unroll
    for (int e = 0; e < kLoad; ++e) value[e] = loaded.item[e];
    return;
  }
#pragma unroll
  for (int e = 0; e < kLoad; ++e) value[e] = i + e < end ? float(from[i + e]) : float_from(0x7fc00000);
}

// Scores of columns from c on, turned so that the greatest is the best; NaN past the end.
__device__ inline void read_scores(const Strip& s, int64_t r, int64_t c, int64_t end, float (&score)[kLoad]) {
  const int64_t begin = r * s.stride;
  read(s.products, begin + c, begin + end, score);
  if (s.score == TopkScore::product) return;
  const float row = s.row[s.first_row + r];
  float col[kLoad];
  read(s.col, s.first_col + c, s.first_col + end, col);
#pragma unroll
  for (int e = 0; e < kLoad; ++e) {
    if (s.score == TopkScore::scaled) {
      score[e] = score[e] * row * col[e];
    } else {
      const float distance = (row + col[e]) - 2 * score[e];
      score[e] = distance < 0 ? 0 : -distance;  // rounding made it so; NaN stays
    }
  }
}

// What a team keeps of its columns.
template <class P> struct Kept {
  Global<uint64_t> best, fresh, count;
  __device__ explicit Kept(const Global<uint64_t>& state)
      : best(state), fresh(state + P::kPlaces), count(state + 2 * P::kPlaces) {}
};

// Sorted keys in shared memory and the best of `kept` become the best of both, in both places, which the team sees.
template <class P>
__device__ void merge(const Shared<uint64_t>& key, const Global<uint64_t>& best, int thread) {
  for (int p = thread; p < P::kPlaces; p += P::kTeam) {
    const uint64_t mine = key[p], other = best[P::kPlaces - 1 - p];
    if (other > mine) key[p] = other;
  }
  team_wait<P::kTeam>();
  bitonic_sort<P::kTeam, P::kPlaces>(key, thread, P::kPlaces);
  for (int p = thread; p < P::kPlaces; p += P::kTeam) {
    const uint64_t k = key[p];
    best[p] = k;
  }
}

// Fresh keys, `count` of them, sorted into shared memory.
template <class P>
__device__ void sort_fresh(const Kept<P>& kept, int count, const Shared<uint64_t>& key, int thread) {
  for (int p = thread; p < P::kPlaces; p += P::kTeam) {
    uint64_t k = kNoKey;
    if (p < count) k = kept.fresh[p];
    key[p] = k;
  }
  team_wait<P::kTeam>();
  bitonic_sort<P::kTeam, P::kPlaces>(key, thread);
}

template <class P>
__global__ void __launch_bounds__(P::kThreads)
    select(Strip s, Allowed allowed, int k, int parts, int64_t part_cols, bool begins, Global<uint64_t> state) {
  FASTRET_SHARED(uint64_t, keys, P::kTeams* P::kPlaces);
  FASTRET_SHARED(int, filled, 1);  // fresh keys, where the team is a block
  constexpr bool kBlock = P::kTeams == 1;
  const int thread = threadIdx.x % P::kTeam, lane = threadIdx.x % kWarpLanes;
  const int64_t team = int64_t(blockIdx.x) * P::kTeams + threadIdx.x / P::kTeam;
  if (team >= s.rows * parts) return;
  const Shared<uint64_t> key = keys + int(threadIdx.x) / P::kTeam * P::kPlaces;
  const Kept<P> kept(state + team * P::kState);
  const int64_t r = team / parts, row = s.first_row + r, out = left_out(allowed, row) - s.first_col;
  const int64_t begin = team % parts * part_cols, end = min(s.cols, begin + part_cols);

  int count = 0;  // of fresh keys; a block's is in `filled`
  float bound = kWorst;
  if (begins) {
    for (int p = thread; p < P::kPlaces; p += P::kTeam) kept.best[p] = kNoKey;
  } else {
    const uint64_t before = kept.count[0], last = kept.best[P::kPlaces - k];
    count = int(before);
    bound = score_or_worst(last);
  }
  if (kBlock && thread == 0) filled[0] = count;
  team_wait<P::kTeam>();

  for (int64_t chunk = begin; chunk < end; chunk += P::kChunk) {
    const int64_t c = chunk + thread * kLoad;
    float score[kLoad];
    bool better = false, full = false;
    read_scores(s, r, c, end, score);
#pragma unroll
    for (int e = 0; e < kLoad; ++e) better |= score[e] > bound;
    if (__any_sync(kWholeWarp, better)) {
#pragma unroll
      for (int e = 0; e < kLoad; ++e) {
        const float given = s.score == TopkScore::distance ? -score[e] : score[e];
        const bool joins = score[e] > bound && c + e != out && is_allowed(allowed, row, s.first_col + c + e, given);
        const uint32_t votes = __ballot_sync(kWholeWarp, joins);
        if (votes == 0) continue;
        int place = count;
        if constexpr (kBlock) {
          if (lane == 0) place = atomic_add(filled, __popc(votes));
          place = __shfl_sync(kWholeWarp, place, 0);
        }
        count = place + __popc(votes);
        full = count > P::kFull;
        if (joins)
          kept.fresh[place + __popc(votes & ((uint32_t(1) << lane) - 1))] = key_of(score[e], s.first_col + c + e);
      }
    }
    if constexpr (kBlock) full = __syncthreads_or(full) != 0;
    if (!full) continue;
    if constexpr (kBlock) count = filled[0];
    else __syncwarp();
    sort_fresh(kept, count, key, thread);
    merge<P>(key, kept.best, thread);
    const uint64_t last = key[P::kPlaces - k];
    bound = score_or_worst(last);
    count = 0;
    if (kBlock && thread == 0) filled[0] = 0;
    team_wait<P::kTeam>();
  }
  if (thread == 0) {
    if constexpr (kBlock) count = filled[0];
    kept.count[0] = uint64_t(count);
  }
}

// A team a row: its parts are merged, in their order, and the best written.
template <class P>
__global__ void __launch_bounds__(P::kThreads)
    finish(Global<uint64_t> state, int64_t rows, int parts, int k, bool distances, int64_t first_column,
           Global<float> scores, int64_t scores_stride, Global<int64_t> indices, int64_t indices_stride) {
  FASTRET_SHARED(uint64_t, keys, P::kTeams* P::kPlaces);
  const int thread = threadIdx.x % P::kTeam;
  const int64_t r = int64_t(blockIdx.x) * P::kTeams + threadIdx.x / P::kTeam;
  if (r >= rows) return;
  const Shared<uint64_t> key = keys + int(threadIdx.x) / P::kTeam * P::kPlaces;
  const Kept<P> first(state + r * parts * P::kState);
  for (int part = 0; part < parts; ++part) {
    const Kept<P> kept(state + (r * parts + part) * P::kState);
    const uint64_t count = kept.count[0];
    team_wait<P::kTeam>();  // the part before has been merged
    sort_fresh(kept, int(count), key, thread);
    merge<P>(key, first.best, thread);
    if (part == 0) continue;
    team_wait<P::kTeam>();
    for (int p = thread; p < P::kPlaces; p += P::kTeam) {
      const uint64_t other = kept.best[p];
      key[p] = other;
    }
    team_wait<P::kTeam>();
    merge<P>(key, first.best, thread);
  }
  for (int p = thread; p < k; p += P::kTeam) {
    const uint64_t found = key[P::kPlaces - 1 - p];
    const float score = score_or_worst(found);
    scores[r * scores_stride + p] = distances ? 0 - score : score;
    indices[r * indices_stride + p] = found == kNoKey ? -1 : first_column + column_of(found);
  }
}

// Calls visit(the plan for k).
template <class Visit> void with_plan(int64_t k, Visit visit) {
  require(k >= 1 && k <= Wide::kPlaces, "k", "expected 1 to " + std::to_string(Wide::kPlaces) + " on CUDA");
  if (k <= Narrow::kPlaces) visit(Narrow{});
  else visit(Wide{});
}

template <class P> dim3 blocks(int64_t teams, const char* name) {
  const int64_t count = (teams + P::kTeams - 1) / P::kTeams;
  require(count <= 0x7fffffff, name, "too many rows for one launch");
  return dim3(unsigned(count));
}

bool at_16_bytes(const Array& a) {
  return a.empty() || (reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && (a.rows <= 1 || a.stride % kLoad == 0));
}

Relation relation(const PairMask::Relation& r, const char* name) {
  if (r.row.rows == 0) return {};
  return {global<const int64_t>(r.row, name), global<const int64_t>(r.col, name)};
}

Allowed allowed(const TopkSearch& t) {
  const PairMask& m = t.mask;
  Allowed a{relation(m.same, "mask.same"), relation(m.different, "mask.different"),
            relation(m.distinct, "mask.distinct"), {}, {}, m.has_offset, m.offset, m.period, t.first_column};
  if (m.above.rows) a.above = global<const float>(m.above, "mask.above");
  if (m.below.rows) a.below = global<const float>(m.below, "mask.below");
  return a;
}

void check_search(const TopkSearch& t, int64_t parts) {
  require(t.rows >= 0 && t.cols >= 0 && t.cols <= int64_t(1) << 32, "y", "expected at most 2^32 rows");
  check_mask(t.mask, "mask", t.rows, t.cols, DType::f32);
  require(parts >= 1 && parts <= 0x7fffffff, "parts", "must be at least 1");
}

}  // namespace

int64_t topk_most() { return Wide::kPlaces; }

int64_t topk_state(int64_t k) {
  int64_t columns = 0;
  with_plan(k, [&](auto plan) { columns = decltype(plan)::kState; });
  return columns;
}

void topk_select(const TopkSearch& t, const TopkStrip& s, int64_t parts, bool begins, const Array& state,
                 uintptr_t stream) {
  check_search(t, parts);
  const int64_t rows = s.products.rows, cols = s.products.cols;
  check(s.products, "products", rows, cols, DType::f32);
  require(at_16_bytes(s.products), "products", "expected rows at multiples of 16 bytes");
  require(s.first_row >= 0 && rows <= t.rows - s.first_row, "first_row", "rows reach beyond x");
  require(s.first_col >= 0 && cols <= t.cols - s.first_col, "first_col", "columns reach beyond y");
  if (s.score != TopkScore::product) {
    check(s.row, "row", 1, t.rows, DType::f32);
    check(s.col, "col", 1, t.cols, DType::f32);
    require(at_16_bytes(s.col) && s.first_col % kLoad == 0, "col", "expected a multiple of 16 bytes");
  }
  check(state, "state", rows * parts, topk_state(t.k), DType::i64);
  if (rows == 0) return;
  Strip strip{global<const float>(s.products, "products"), {}, {}, s.products.stride, rows, cols, s.first_row,
              s.first_col, s.score};
  if (s.score != TopkScore::product) {
    strip.row = global<const float>(s.row, "row");
    strip.col = global<const float>(s.col, "col");
  }
  const int64_t part_cols = ((cols + parts - 1) / parts + kLoad - 1) / kLoad * kLoad;
  with_plan(t.k, [&](auto plan) {
    using P = decltype(plan);
    const Shape shape{"topk_select", blocks<P>(rows * parts, "products"), dim3(P::kThreads), 0, stream};
    launch(shape, select<P>, strip, allowed(t), int(t.k), int(parts), part_cols, begins,
           global<uint64_t>(state, "state"));
  });
}

void topk_finish(const TopkSearch& t, bool distances, int64_t parts, const Array& state, const Array& scores,
                 const Array& indices, uintptr_t stream) {
  check_search(t, parts);
  const int64_t rows = scores.rows;
  check(scores, "scores", rows, t.k, DType::f32);
  check(indices, "indices", rows, t.k, DType::i64);
  check(state, "state", rows * parts, topk_state(t.k), DType::i64);
  if (rows == 0) return;
  with_plan(t.k, [&](auto plan) {
    using P = decltype(plan);
    const Shape shape{"topk_finish", blocks<P>(rows, "scores"), dim3(P::kThreads), 0, stream};
    launch(shape, finish<P>, global<uint64_t>(state, "state"), rows, int(parts), int(t.k), distances, t.first_column,
           global<float>(scores, "scores"), scores.stride, global<int64_t>(indices, "indices"), indices.stride);
  });
}

}  // namespace cuda
}  // namespace fastret
