// pq_topk by lookups in shared memory. A block owns 12, 4 or 1 queries, of tables in float16 16, 8 or 1; these lie in
// entries of 16 bytes, the same word's part of the scores of four queries or eight, so that one lane's load serves
// them all. A lane has a code of its own, reads it with 16 bytes at a time, and adds the parts book after book, as
// csrc/cpu/pq_topk.cpp does: copies of a code tie, and a query's score has the same bits in any company.
//
// Banks. Random words of the same book would meet: of 8 lanes, whose 16 bytes are one wavefront of 128, the fullest of
// 8 groups of banks has 2.6 on average. So lanes are never in the same book: lane c of 8 starts its codes c books late,
// and runs through its own stream of codes without a stop. Entry (word, book) lies at word M + book, in bank group book
// mod 8 where M is a multiple of 8: 8 lanes, 8 groups, no conflict, whatever the codes. Sums cost no shuffle and are in
// order. Its price: a period more at the end of a part, a second addition, of other lanes, where a code ends among the
// first 8 books, and for other M, whose codes are read one at a time, the conflicts.
//
// Counts. Q N M lookups. 10,000 queries, 1M codes, M = 16: 1.6e11. A multiprocessor of an H100 reads 32 banks a clock,
// all 132 at 1.755 GHz 7.4e12 words a second: 21.6 ms for words of float32, 10.8 ms for pairs of float16, the floors.
// What sm_90a's code does for a warp's 32 codes x 16 books, loads being 16 bytes a lane, 4 clocks of shared memory:
//               queries  loads  clocks  instructions  of them additions, conversions  clocks of issue   whole search
//   float32          12     48     192           508                       276, 0              127  banks: 21.6 ms
//   float16          16     32     128           852                     368, 256              213  issue: 18.0 ms
// Float16 is bound by instructions: two a lookup, conversion and addition, are 14 ms by themselves. What would not need
// them, sums by the tensor cores, rounds otherwise than everything else here. At M = 8 and float32 346 instructions are
// 87 clocks beside 96 of the banks. Bytes: codes are read by 834 blocks (625), 13 GB from L2 (2.4 ms at 5.5 TB/s), once
// from memory (16 MB); a result is 12 bytes. Counted, not measured: no GPU has run this yet.
//
// Tables of M = 16, K = 256 take 192 KiB for 12 queries, 128 KiB for 16 in float16: of an H100's 227 what is left holds
// queues up to k = 128 (256). With larger k, or 12 in the 163 KiB of an A100, a block has the next smaller number; four
// up to k = 512, two blocks to an H100's multiprocessor. 16 in float16 fit an A100 up to k = 128. 64 to 128 registers a
// thread, none spilled.
//
// What is selected: best_k.h. Few queries: parts of the codes, whose lists a second kernel merges in their order.
#include "pq_topk.h"

#include <algorithm>

#include "best_k.h"
#include "device.h"

namespace fastret {
namespace cuda {
namespace {

constexpr int kTurns = 8;           // codes of a lane between two barriers
constexpr int kMergeThreads = 256;
constexpr int kGroupsOfBanks = 8;   // of 16 bytes
constexpr int64_t kWorkspace = 64 << 20;

// As many as hide the latency of loads, in registers without a spill: 12 queries have a multiprocessor to themselves.
template <int kQueries> constexpr int kThreadsOf = kQueries > 8 ? 512 : 256;

// Of tables in T: queries that share a word's 16 bytes, and those of a block.
template <class T> struct Width {
  static constexpr int kEntry = 16 / sizeof(T), kFew = kEntry, kMany = std::is_same_v<T, Half> ? 16 : 12;
};

// Of a block's tables, and of the powers of two that entries of float16 are multiples of.
template <class T> FASTRET_HOST_DEVICE constexpr int64_t table_bytes(int64_t entries, int queries) {
  return (entries * queries * int64_t(sizeof(T)) + 7) / 8 * 8;
}
template <class T> FASTRET_HOST_DEVICE constexpr int64_t power_bytes(int queries) {
  return std::is_same_v<T, Half> ? (queries + 1) / 2 * 8 : 0;
}

template <class Code> struct Scan {
  Global<const float> query, codebook;
  int64_t query_stride, codebook_stride;
  Global<const Code> codes;
  int64_t codes_stride, count, queries;
  int books, words, width;
  PqMetric metric;
  int places, k;
  int64_t first_query, parts, part_rows;
};

struct Results {
  Global<float> scores;
  int64_t scores_stride;
  Global<int64_t> indices;
  int64_t indices_stride, first_index;
  float sign;  // turns what was great back into a score

  __device__ void write(int64_t query, int place, uint64_t key) const {
    const bool found = key != kNoKey;
    const float score = found ? score_of(key) : -INFINITY;
    scores[query * scores_stride + place] = score == 0 ? 0 : sign * score;
    indices[query * indices_stride + place] = found ? first_index + int64_t(column_of(key)) : -1;
  }
};

// A lane's codes, N at a time, `delay` codes late. The first ones are 0.
template <class Code, int N> class Delayed {
 public:
  __device__ explicit Delayed(int delay) : bytes_(delay * int(sizeof(Code))) {}

  __device__ void push(const Pack<Code, N>& next) {
    uint32_t both[2 * kWords] = {};
    __builtin_memcpy(both + kWords, &next, sizeof next);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      both[i] = before_[i];
      before_[i] = both[kWords + i];
    }
#pragma unroll
    for (int step = 1; step < kWords; step *= 2) {
      const bool moves = bytes_ / 4 & step;
#pragma unroll
      for (int i = 2 * kWords - 1; i >= step; --i) both[i] = moves ? both[i - step] : both[i];
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      word_[i] = uint32_t((uint64_t(both[kWords + i]) << 32 | both[kWords + i - 1]) << 8 * (bytes_ % 4) >> 32);
  }

  __device__ int code(int s) const {
    constexpr int kInWord = 4 / sizeof(Code), kBits = 8 * sizeof(Code);
    return int(word_[s / kInWord] >> kBits * (s % kInWord) & ((1u << kBits) - 1));
  }

 private:
  static constexpr int kWords = (N * sizeof(Code) + 3) / 4;
  int bytes_;
  uint32_t before_[kWords] = {}, word_[kWords] = {};
};

template <class T, int N, class Table> __device__ Pack<T, N> entry(const Table& table, int i) {
  if constexpr (N == 1) {
    const T value = table[i];
    return {{value}};
  } else {
    return load<N>(table, i);
  }
}

// A word's part of a query's score; greater parts are better.
template <class Code> __device__ float part_of(const Scan<Code>& s, int64_t query, int book, int word) {
  const int64_t row = min(query, s.queries - 1) * s.query_stride + int64_t(book) * s.width;
  const int64_t column = (int64_t(book) * s.words + word) * s.codebook_stride;
  float sum = 0;
  for (int l = 0; l < s.width; ++l) {
    const float x = s.query[row + l], w = s.codebook[column + l], difference = x - w;
    sum = s.metric == PqMetric::dot ? fmaf(x, w, sum) : fmaf(difference, difference, sum);
  }
  if (s.metric == PqMetric::l21) sum = sqrtf(sum);
  return s.metric == PqMetric::dot ? sum : -sum;
}

// What entries of float16 are multiples of, of each query: see fastret/ops/pq_topk.py. The block waits after it.
template <int kQueries, class Code>
__device__ void find_powers(const Scan<Code>& s, int64_t first_query, const Shared<uint32_t>& power) {
  constexpr int kReach = 15, kFraction = 23;
  constexpr uint32_t kInfinity = 0x7f800000;
  if (threadIdx.x < kQueries) power[threadIdx.x] = 0;
  __syncthreads();
  for (int q = 0; q < kQueries; ++q) {
    uint32_t greatest = 0;  // magnitudes of floats ascend as their bits
    for (int e = threadIdx.x; e < s.books * s.words; e += kThreadsOf<kQueries>) {
      const uint32_t size = bits_of(part_of(s, first_query + q, e / s.words, e % s.words)) & ~(uint32_t(1) << 31);
      if (size < kInfinity) greatest = max(greatest, size);
    }
    for (int bit = kWarpLanes / 2; bit > 0; bit /= 2)
      greatest = max(greatest, __shfl_xor_sync(kWholeWarp, greatest, bit));
    if (threadIdx.x % kWarpLanes == 0) atomic_max(power + q, greatest);
  }
  __syncthreads();
  if (threadIdx.x < kQueries) {
    const uint32_t greatest = power[threadIdx.x];
    const int exponent = int(greatest >> kFraction) + 1 - kReach;  // with its bias
    power[threadIdx.x] = uint32_t(max(exponent, 1)) << kFraction;
  }
  __syncthreads();
}

// Tables of kQueries queries, entries of kEntry of them. The block must wait after it.
template <class T, int kQueries, int kEntry, class Code, class Table>
__device__ void make_tables(const Scan<Code>& s, int64_t first_query, const Table& table,
                            const Shared<uint32_t>& power) {
  constexpr uint32_t kOneSquared = 254u << 23;  // the bits of 2^e and 2^-e add up to it
  for (int e = threadIdx.x; e < s.books * s.words; e += kThreadsOf<kQueries>) {
    const int book = e / s.words, word = e % s.words;
    for (int q = 0; q < kQueries; ++q) {
      const float part = part_of(s, first_query + q, book, word);
      const int64_t at = ((q / kEntry * s.words + word) * s.books + book) * kEntry + q % kEntry;
      if constexpr (std::is_same_v<T, Half>) {
        const uint32_t of_query = power[q];
        Half rounded;
        narrow(part * float_from(kOneSquared - of_query), rounded);
        table[at] = rounded;
      } else {
        table[at] = part;
      }
    }
  }
}

// A lane's sums of the codes it runs through.
template <class Code, int N, class T, int kQueries, int kEntry> struct Lane {
  static constexpr int kDelays = N >= kGroupsOfBanks ? kGroupsOfBanks : 1;
  int delay = threadIdx.x % kDelays;
  Delayed<Code, N> codes{delay};
  float sum[kQueries] = {}, done[kQueries] = {};  // of the code that the lane is at, and of the one before it

  // N books of a code, of which `book` is the first; the lane itself is `delay` books behind.
  template <bool kFirst, class Table> __device__ void add(const Scan<Code>& s, const Table& table, int book) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool may_start = kFirst && i < kDelays;
      const int own = book + i - delay + (may_start && i < delay ? s.books : 0), word = codes.code(i);
#pragma unroll
      for (int q = 0; q < kQueries; q += kEntry) {
        const auto part = entry<T, kEntry>(table, ((q / kEntry * s.words + word) * s.books + own) * kEntry);
#pragma unroll
        for (int e = 0; e < kEntry; ++e) {
          const float term = as_float(part.item[e]);
          if (may_start && i < delay) done[q + e] += term;
          else sum[q + e] += term;
        }
      }
    }
  }

  // All books of a code, of which the lane is `delay` behind; what is done afterwards is the code before it.
  template <class Table> __device__ void run(const Scan<Code>& s, const Table& table, int64_t code) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      done[q] = sum[q];
      sum[q] = 0;
    }
    codes.push(load<N>(s.codes, code * s.codes_stride));
    add<true>(s, table, 0);
    for (int book = N; book < s.books; book += N) {
      codes.push(load<N>(s.codes, code * s.codes_stride + book));
      add<false>(s, table, book);
    }
  }
};

template <class Code, int N, class T, int kQueries, int kEntry, bool kInShared>
__global__ void __launch_bounds__(kThreadsOf<kQueries>, 1)
    scan(Scan<Code> s, Global<T> tables, Global<uint64_t> lists, Results results) {
  constexpr int kThreads = kThreadsOf<kQueries>;
  constexpr bool kHalf = std::is_same_v<T, Half>;
  FASTRET_DYNAMIC_SHARED(float, memory);
  const int entries = s.books * s.words;
  const int64_t first_query = s.first_query + blockIdx.x / s.parts * kQueries, part = blockIdx.x % s.parts;
  const int present = int(min(int64_t(kQueries), s.queries - first_query));
  const int64_t powers = kInShared ? table_bytes<T>(entries, kQueries) : 0;
  const BestK<kQueries, kThreads> best(memory, powers + power_bytes<T>(kQueries), s.places, s.k, present);
  Shared<uint32_t> power{};
  if constexpr (kHalf) {
    power = shared_part<uint32_t>(memory, powers, kQueries, "power");
    find_powers<kQueries>(s, first_query, power);
  }
  const auto table = [&] {
    if constexpr (kInShared) return shared_part<T>(memory, 0, int64_t(entries) * kQueries, "table");
    else return tables + int64_t(blockIdx.x) * entries;
  }();
  make_tables<T, kQueries, kEntry>(s, first_query, table, power);  // waited for by the loop's condition

  const int64_t begin = part * s.part_rows, end = min(s.count, begin + s.part_rows);
  const int64_t tiles = (end - begin + kThreads - 1) / kThreads, periods = tiles > 0 ? tiles + 1 : 0;
  Lane<Code, N, T, kQueries, kEntry> lane;
  const auto score = [&](int q) {
    if constexpr (kHalf) {
      const uint32_t of_query = power[q];
      return lane.done[q] * float_from(of_query);
    } else {
      return lane.done[q];
    }
  };
  uint32_t waiting = 0, column = 0;  // queries whose candidate has found no place yet, and its column
  bool stuck = false;                // somebody of the warp waits
  for (int64_t period = 0; __syncthreads_or(period < periods);) {
    for (int turn = 0; turn < kTurns && period < periods; ++turn) {
      if (!stuck) {
        const int64_t code = begin + period * kThreads + threadIdx.x;
        lane.run(s, table, min(code, end - 1));
        column = uint32_t(code - kThreads);
        const bool ended = period > 0 && code - kThreads < end;
#pragma unroll
        for (int q = 0; q < kQueries; ++q)
          waiting |= uint32_t(ended && score(q) >= best.bound_score(q)) << q;
      }
      if (__any_sync(kWholeWarp, waiting != 0)) {
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const bool wants = waiting >> q & 1;
          const bool waits = best.append(q, wants ? key_of(score(q), column) : kNoKey, wants);
          waiting = waits ? waiting : waiting & ~(1u << q);
        }
      }
      stuck = __any_sync(kWholeWarp, waiting != 0);
      if (stuck) break;
      ++period;
    }
    if (__syncthreads_or(stuck)) best.merge();
  }
  best.merge();

  for (int i = threadIdx.x; i < present * s.k; i += kThreads) {
    const int q = i / s.k, place = i % s.k;
    const uint64_t key = best.best(q, place);
    if (s.parts > 1) lists[((first_query + q) * s.parts + part) * s.k + place] = key;
    else results.write(first_query + q, place, key);
  }
}

// A block a query; its lists, each sorted, in their order.
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(Global<const uint64_t> lists, int parts, int places, int k, Results results) {
  FASTRET_DYNAMIC_SHARED(float, memory);
  const BestK<1, kMergeThreads> best(memory, 0, places, k, 1);
  __syncthreads();
  const int64_t query = blockIdx.x;
  for (int part = 0; part < parts; ++part) {
    for (int p = threadIdx.x; p < places; p += kMergeThreads) {
      uint64_t key = kNoKey;
      if (p < k) key = lists[(query * parts + part) * k + p];
      best.put(0, places - 1 - p, key);
    }
    __syncthreads();
    best.merge_sorted();
  }
  for (int p = threadIdx.x; p < k; p += kMergeThreads) results.write(query, p, best.best(0, p));
}

struct Outputs {
  const Array& tables;
  Global<uint64_t> lists;
  Results results;
};

template <class Code, int N, class T, int kQueries, int kEntry, bool kInShared>
void launch_scan(Scan<Code> s, const PqTopkPlan& plan, const Outputs& out, uintptr_t stream) {
  const int64_t groups = (s.queries + kQueries - 1) / kQueries;
  const int64_t together = kInShared ? groups : plan.table_rows / plan.parts;
  for (int64_t group = 0; group < groups; group += together) {
    s.first_query = group * kQueries;
    const Shape shape{"pq_topk_scan", dim3(unsigned(std::min(together, groups - group) * plan.parts)),
                      dim3(kThreadsOf<kQueries>), size_t(plan.shared_bytes), stream};
    launch(shape, scan<Code, N, T, kQueries, kEntry, kInShared>, s, global<T>(out.tables, "tables"), out.lists,
           out.results);
  }
}

template <class Code, int N, class T>
void pick_queries(const Scan<Code>& s, const PqTopkPlan& plan, const Outputs& out, uintptr_t stream) {
  using W = Width<T>;
  if (plan.queries == W::kMany) launch_scan<Code, N, T, W::kMany, W::kEntry, true>(s, plan, out, stream);
  else if (plan.queries == W::kFew) launch_scan<Code, N, T, W::kFew, W::kEntry, true>(s, plan, out, stream);
  else launch_scan<Code, N, T, 1, 1, true>(s, plan, out, stream);
}

template <class T, class Code>
void pick_load(const Scan<Code>& s, const PqTopkPlan& plan, const Outputs& out, uintptr_t address, uintptr_t stream) {
  const auto fits = [&](int64_t n) {
    return s.books % n == 0 && address % (n * sizeof(Code)) == 0 && (s.count <= 1 || s.codes_stride % n == 0);
  };
  if (!plan.in_shared) launch_scan<Code, 1, T, 1, 1, false>(s, plan, out, stream);
  else if (fits(16 / sizeof(Code))) pick_queries<Code, 16 / sizeof(Code), T>(s, plan, out, stream);
  else if (sizeof(Code) == 1 && fits(8)) pick_queries<Code, 8, T>(s, plan, out, stream);
  else pick_queries<Code, 1, T>(s, plan, out, stream);
}

template <class Code>
Scan<Code> scan_of(const PqTopkProblem& p, const PqTopkPlan& plan) {
  Scan<Code> s{};
  s.query = global<const float>(p.query, "query");
  s.codebook = global<const float>(p.codebook, "codebook");
  s.query_stride = p.query.stride;
  s.codebook_stride = p.codebook.stride;
  s.codes = global<const Code>(p.codes, "codes");
  s.codes_stride = p.codes.stride;
  s.count = p.codes.rows;
  s.queries = p.query.rows;
  s.books = int(p.codes.cols);
  s.words = int(p.words);
  s.width = int(p.codebook.cols);
  s.metric = p.metric;
  s.places = plan.places;
  s.k = int(p.k);
  s.parts = plan.parts;
  s.part_rows = plan.part_rows;
  return s;
}

void check_problem(const PqTopkProblem& p) {
  require(p.codes.dtype == DType::u8 || p.codes.dtype == DType::u16, "codes", "expected 8 or 16 bits each");
  const int64_t most = p.codes.dtype == DType::u8 ? 256 : 65536, books = p.codes.cols;
  require(books >= 1, "codes", "expected at least one book");
  require(p.words >= 1 && p.words <= most, "words", "expected 1 to " + std::to_string(most));
  require(p.codebook.cols >= 1 && p.codebook.cols <= 0x7fffffff, "codebook", "expected at least one column");
  require(books <= 0x7fffffff / p.words, "codebook", "expected at most 2^31 words on CUDA");
  check(p.codebook, "codebook", books * p.words, p.codebook.cols, DType::f32);
  check(p.query, "query", p.query.rows, books * p.codebook.cols, DType::f32);
  check(p.codes, "codes", p.codes.rows, books);
  require(p.codes.rows <= 0x7fffffff, "codes", "2^31 rows and more have to come in pieces");
  require(p.k >= 1 && p.k <= kMostBest, "k", "expected 1 to " + std::to_string(kMostBest) + " on CUDA");
  require(p.metric >= PqMetric::l2 && p.metric <= PqMetric::dot, "metric", "unknown kind");
}

int64_t queue_bytes(int queries, int places) { return queries * int64_t(BestK<1, kMergeThreads>::bytes(places)); }

template <class T> PqTopkPlan plan_for(int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k) {
  const DeviceLimits device = device_limits();
  const int64_t entries = books * words;
  PqTopkPlan plan;
  plan.places = BestK<1, kMergeThreads>::places_for(k);
  const auto beside = [&](int n) { return power_bytes<T>(n) + queue_bytes(n, plan.places); };
  const auto bytes = [&](int n) { return table_bytes<T>(entries, n) + beside(n); };
  // Of fewer than 9 queries, most lanes of the many would be nobody's; of one, those of the few.
  plan.queries = queries > 8 && bytes(Width<T>::kMany) <= device.shared_bytes ? Width<T>::kMany
                 : queries > 1 && bytes(Width<T>::kFew) <= device.shared_bytes ? Width<T>::kFew : 1;
  plan.in_shared = bytes(plan.queries) <= device.shared_bytes;
  plan.shared_bytes = plan.in_shared ? bytes(plan.queries) : beside(1);
  const int64_t groups = (queries + plan.queries - 1) / plan.queries, busy = 2 * device.multiprocessors;
  // A part makes tables of its own, and its first k codes are candidates all.
  const int64_t fewest = std::max({int64_t(1024), 16 * k, 4 * words});
  plan.parts = std::max<int64_t>(1, std::min(busy / std::max<int64_t>(groups, 1), codes / fewest));
  const int64_t tables = std::max<int64_t>(1, kWorkspace / (entries * int64_t(sizeof(T))));
  if (!plan.in_shared) plan.parts = std::min(plan.parts, tables);
  plan.part_rows = (codes + plan.parts - 1) / plan.parts;
  if (!plan.in_shared)
    plan.table_rows = std::max<int64_t>(1, std::min(groups, tables / plan.parts)) * plan.parts;
  return plan;
}

template <class T>
void pick_code(const PqTopkProblem& p, const PqTopkPlan& plan, const Outputs& out, uintptr_t stream) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p.codes.data);
  if (p.codes.dtype == DType::u8) pick_load<T>(scan_of<uint8_t>(p, plan), plan, out, address, stream);
  else pick_load<T>(scan_of<uint16_t>(p, plan), plan, out, address, stream);
}

}  // namespace

PqTopkPlan pq_topk_plan(int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k, bool half_tables) {
  return half_tables ? plan_for<Half>(queries, codes, books, words, k)
                     : plan_for<float>(queries, codes, books, words, k);
}

void pq_topk(const PqTopkProblem& p, const Array& lists, const Array& tables, const Array& scores, const Array& indices,
             uintptr_t stream) {
  check_problem(p);
  const int64_t queries = p.query.rows;
  check(scores, "scores", queries, p.k, DType::f32);
  check(indices, "indices", queries, p.k, DType::i64);
  const PqTopkPlan plan = pq_topk_plan(queries, p.codes.rows, p.codes.cols, p.words, p.k, p.half_tables);
  const int64_t listed = plan.parts > 1 ? queries * plan.parts : 0;
  if (listed > 0) check(lists, "lists", listed, p.k, DType::i64);
  require(listed == 0 || lists.stride == p.k, "lists", "expected no gaps");
  if (plan.table_rows > 0)
    check(tables, "tables", plan.table_rows, p.codes.cols * p.words, p.half_tables ? DType::f16 : DType::f32);
  require(plan.table_rows == 0 || tables.stride == tables.cols, "tables", "expected no gaps");
  require(queries <= 0x7fffffff / plan.parts, "query", "too many rows for one launch");
  if (queries == 0) return;
  const Results results{global<float>(scores, "scores"), scores.stride, global<int64_t>(indices, "indices"),
                        indices.stride, p.first_index, p.metric == PqMetric::dot ? 1.f : -1.f};
  const Outputs out{tables, global<uint64_t>(lists, "lists"), results};
  if (p.half_tables) pick_code<Half>(p, plan, out, stream);
  else pick_code<float>(p, plan, out, stream);
  if (plan.parts == 1) return;
  const Shape shape{"pq_topk_merge", dim3(unsigned(queries)), dim3(kMergeThreads),
                    size_t(queue_bytes(1, plan.places)), stream};
  launch(shape, merge_parts, global<const uint64_t>(lists, "lists"), int(plan.parts), plan.places, int(p.k), results);
}

}  // namespace cuda
}  // namespace fastret
