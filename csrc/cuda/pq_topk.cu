// pq_topk by lookups in shared memory. A block owns 12, 4 or 1 queries; their tables lie in entries of 16 bytes, the
// same word's part of the scores of four queries, so that one lane's load serves four. A lane has a code of its own,
// reads it with 16 bytes at a time, and adds the parts book after book, as csrc/cpu/pq_topk.cpp does: copies of a code
// tie, and a query's score has the same bits in any company.
//
// Banks. Random words of the same book would meet: of 8 lanes, whose 16 bytes are one wavefront of 128, the fullest of
// 8 groups of banks has 2.6 on average. So lanes are never in the same book: lane c of 8 starts its codes c books late,
// and runs through its own stream of codes without a stop. Entry (word, book) lies at word M + book, in bank group book
// mod 8 where M is a multiple of 8: 8 lanes, 8 groups, no conflict, whatever the codes. Sums cost no shuffle and are in
// order. Its price: a period more at the end of a part, a selection where a code ends among the first 8 books, and for
// other M, whose codes are read one at a time, the conflicts.
//
// Counts. Q N M lookups of 4 bytes. 10,000 queries, 1M codes, M = 16: 1.6e11. A multiprocessor of an H100 reads 32
// banks a clock, all 132 at 1.755 GHz 7.4e12 words a second: 21.6 ms, the floor of float32 tables (half of it for
// float16 ones, which the op's contract has no place for). What sm_90a's code does for a warp's 32 codes x 12 queries x
// 16 books: 48 loads of 16 bytes a lane, which are 192 clocks of shared memory, in 510 instructions, 128 clocks of
// issue, of which 192 are additions and 176 selections, with the addresses 140 clocks of the pipe of half the rate:
// banks bound it. At M = 8 as many selections stand against 96 clocks: 1.2 times the floor. Bytes: codes are read by
// 834 blocks, 13 GB from L2 (2.4 ms at 5.5 TB/s), once from memory (16 MB); a result is 12 bytes. Counted, not
// measured: no GPU has run this yet.
//
// Tables of 12 queries, M = 16, K = 256 take 192 KiB: of an H100's 227 what is left holds queues up to k = 128. With
// larger k, or the 163 KiB of an A100, a block has 4 queries; up to k = 512 two blocks share an H100's multiprocessor.
// 61 to 128 registers a thread, none spilled.
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
template <int kQueries> constexpr int kThreadsOf = kQueries > 4 ? 512 : 256;

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

template <int N, class Table> __device__ Pack<float, N> entry(const Table& table, int i) {
  if constexpr (N == 1) {
    const float value = table[i];
    return {{value}};
  } else {
    return load<N>(table, i);
  }
}

// Tables of kQueries queries, entries of kEntry of them; greater parts are better. The block must wait after it.
template <int kQueries, int kEntry, class Code, class Table>
__device__ void make_tables(const Scan<Code>& s, int64_t first_query, const Table& table) {
  for (int e = threadIdx.x; e < s.books * s.words; e += kThreadsOf<kQueries>) {
    const int book = e / s.words, word = e % s.words;
    for (int q = 0; q < kQueries; ++q) {
      const int64_t row = min(first_query + q, s.queries - 1) * s.query_stride + int64_t(book) * s.width;
      float sum = 0;
      for (int l = 0; l < s.width; ++l) {
        const float x = s.query[row + l], w = s.codebook[e * s.codebook_stride + l], difference = x - w;
        sum = s.metric == PqMetric::dot ? fmaf(x, w, sum) : fmaf(difference, difference, sum);
      }
      if (s.metric == PqMetric::l21) sum = sqrtf(sum);
      table[((q / kEntry * s.words + word) * s.books + book) * kEntry + q % kEntry] =
          s.metric == PqMetric::dot ? sum : -sum;
    }
  }
}

// A lane's sums of the codes it runs through.
template <class Code, int N, int kQueries, int kEntry> struct Lane {
  static constexpr int kDelays = N >= kGroupsOfBanks ? kGroupsOfBanks : 1;
  int delay = threadIdx.x % kDelays;
  Delayed<Code, N> codes{delay};
  float sum[kQueries] = {}, done[kQueries] = {};  // done: of the last code that has ended

  // N books of a code, of which `book` is the first; the lane itself is `delay` books behind.
  template <bool kFirst, class Table> __device__ void add(const Scan<Code>& s, const Table& table, int book) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool may_start = kFirst && i < kDelays;
      const int own = book + i - delay + (may_start && i < delay ? s.books : 0), word = codes.code(i);
#pragma unroll
      for (int q = 0; q < kQueries; q += kEntry) {
        const auto part = entry<kEntry>(table, ((q / kEntry * s.words + word) * s.books + own) * kEntry);
#pragma unroll
        for (int e = 0; e < kEntry; ++e) {
          const bool starts = may_start && i == delay;
          done[q + e] = starts ? sum[q + e] : done[q + e];
          sum[q + e] = (starts ? 0.f : sum[q + e]) + part.item[e];
        }
      }
    }
  }

  // All books of a code; what is done afterwards is the code before it.
  template <class Table> __device__ void run(const Scan<Code>& s, const Table& table, int64_t code) {
    codes.push(load<N>(s.codes, code * s.codes_stride));
    add<true>(s, table, 0);
    for (int book = N; book < s.books; book += N) {
      codes.push(load<N>(s.codes, code * s.codes_stride + book));
      add<false>(s, table, book);
    }
  }
};

template <class Code, int N, int kQueries, int kEntry, bool kInShared>
__global__ void __launch_bounds__(kThreadsOf<kQueries>, 1)
    scan(Scan<Code> s, Global<float> tables, Global<uint64_t> lists, Results results) {
  constexpr int kThreads = kThreadsOf<kQueries>;
  FASTRET_DYNAMIC_SHARED(float, memory);
  const int entries = s.books * s.words;
  const int64_t first_query = s.first_query + blockIdx.x / s.parts * kQueries, part = blockIdx.x % s.parts;
  const int present = int(min(int64_t(kQueries), s.queries - first_query));
  const BestK<kQueries, kThreads> best(memory, kInShared ? (int64_t(entries) * kQueries + 1) / 2 * 8 : 0, s.places, s.k,
                                       present);
  const auto table = [&] {
    if constexpr (kInShared) return memory;
    else return tables + int64_t(blockIdx.x) * entries;
  }();
  make_tables<kQueries, kEntry>(s, first_query, table);  // waited for by the loop's condition

  const int64_t begin = part * s.part_rows, end = min(s.count, begin + s.part_rows);
  const int64_t tiles = (end - begin + kThreads - 1) / kThreads, periods = tiles > 0 ? tiles + 1 : 0;
  Lane<Code, N, kQueries, kEntry> lane;
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
          waiting |= uint32_t(ended && lane.done[q] >= best.bound_score(q)) << q;
      }
      if (__any_sync(kWholeWarp, waiting != 0)) {
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const bool wants = waiting >> q & 1;
          const bool waits = best.append(q, wants ? key_of(lane.done[q], column) : kNoKey, wants);
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
  Global<float> tables;
  Global<uint64_t> lists;
  Results results;
};

template <class Code, int N, int kQueries, int kEntry, bool kInShared>
void launch_scan(Scan<Code> s, const PqTopkPlan& plan, const Outputs& out, uintptr_t stream) {
  const int64_t groups = (s.queries + kQueries - 1) / kQueries;
  const int64_t together = kInShared ? groups : plan.table_rows / plan.parts;
  for (int64_t group = 0; group < groups; group += together) {
    s.first_query = group * kQueries;
    const Shape shape{"pq_topk_scan", dim3(unsigned(std::min(together, groups - group) * plan.parts)),
                      dim3(kThreadsOf<kQueries>), size_t(plan.shared_bytes), stream};
    launch(shape, scan<Code, N, kQueries, kEntry, kInShared>, s, out.tables, out.lists, out.results);
  }
}

template <class Code, int N>
void pick_queries(const Scan<Code>& s, const PqTopkPlan& plan, const Outputs& out, uintptr_t stream) {
  if (plan.queries == 12) launch_scan<Code, N, 12, 4, true>(s, plan, out, stream);
  else if (plan.queries == 4) launch_scan<Code, N, 4, 4, true>(s, plan, out, stream);
  else launch_scan<Code, N, 1, 1, true>(s, plan, out, stream);
}

template <class Code>
void pick_load(const Scan<Code>& s, const PqTopkPlan& plan, const Outputs& out, uintptr_t address, uintptr_t stream) {
  const auto fits = [&](int64_t n) {
    return s.books % n == 0 && address % (n * sizeof(Code)) == 0 && (s.count <= 1 || s.codes_stride % n == 0);
  };
  if (!plan.in_shared) launch_scan<Code, 1, 1, 1, false>(s, plan, out, stream);
  else if (fits(16 / sizeof(Code))) pick_queries<Code, 16 / sizeof(Code)>(s, plan, out, stream);
  else if (sizeof(Code) == 1 && fits(8)) pick_queries<Code, 8>(s, plan, out, stream);
  else pick_queries<Code, 1>(s, plan, out, stream);
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

int64_t queue_bytes(int queries, int places) {
  if (queries == 12) return int64_t(BestK<12, kThreadsOf<12>>::bytes(places));
  return queries == 4 ? int64_t(BestK<4, kThreadsOf<4>>::bytes(places)) : BestK<1, kThreadsOf<1>>::bytes(places);
}

}  // namespace

PqTopkPlan pq_topk_plan(int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k) {
  const DeviceLimits device = device_limits();
  const int64_t entries = books * words;
  PqTopkPlan plan;
  plan.places = BestK<1, kThreadsOf<1>>::places_for(k);
  const auto bytes = [&](int n) { return (entries * n + 1) / 2 * 8 + queue_bytes(n, plan.places); };
  // Of fewer than 9 queries, 12 lanes would mostly be nobody's; of one, 4.
  plan.queries = queries > 8 && bytes(12) <= device.shared_bytes ? 12
                 : queries > 1 && bytes(4) <= device.shared_bytes ? 4 : 1;
  plan.in_shared = bytes(plan.queries) <= device.shared_bytes;
  plan.shared_bytes = plan.in_shared ? bytes(plan.queries) : queue_bytes(1, plan.places);
  const int64_t groups = (queries + plan.queries - 1) / plan.queries, busy = 2 * device.multiprocessors;
  // A part makes tables of its own, and its first k codes are candidates all.
  const int64_t fewest = std::max({int64_t(1024), 16 * k, 4 * words});
  plan.parts = std::max<int64_t>(1, std::min(busy / std::max<int64_t>(groups, 1), codes / fewest));
  const int64_t tables = std::max<int64_t>(1, kWorkspace / (entries * int64_t(sizeof(float))));
  if (!plan.in_shared) plan.parts = std::min(plan.parts, tables);
  plan.part_rows = (codes + plan.parts - 1) / plan.parts;
  if (!plan.in_shared)
    plan.table_rows = std::max<int64_t>(1, std::min(groups, tables / plan.parts)) * plan.parts;
  return plan;
}

void pq_topk(const PqTopkProblem& p, const Array& lists, const Array& tables, const Array& scores, const Array& indices,
             uintptr_t stream) {
  check_problem(p);
  const int64_t queries = p.query.rows;
  check(scores, "scores", queries, p.k, DType::f32);
  check(indices, "indices", queries, p.k, DType::i64);
  const PqTopkPlan plan = pq_topk_plan(queries, p.codes.rows, p.codes.cols, p.words, p.k);
  const int64_t listed = plan.parts > 1 ? queries * plan.parts : 0;
  if (listed > 0) check(lists, "lists", listed, p.k, DType::i64);
  require(listed == 0 || lists.stride == p.k, "lists", "expected no gaps");
  if (plan.table_rows > 0) check(tables, "tables", plan.table_rows, p.codes.cols * p.words, DType::f32);
  require(plan.table_rows == 0 || tables.stride == tables.cols, "tables", "expected no gaps");
  require(queries <= 0x7fffffff / plan.parts, "query", "too many rows for one launch");
  if (queries == 0) return;
  const Results results{global<float>(scores, "scores"), scores.stride, global<int64_t>(indices, "indices"),
                        indices.stride, p.first_index, p.metric == PqMetric::dot ? 1.f : -1.f};
  const Outputs out{global<float>(tables, "tables"), global<uint64_t>(lists, "lists"), results};
  const uintptr_t address = reinterpret_cast<uintptr_t>(p.codes.data);
  if (p.codes.dtype == DType::u8) pick_load(scan_of<uint8_t>(p, plan), plan, out, address, stream);
  else pick_load(scan_of<uint16_t>(p, plan), plan, out, address, stream);
  if (plan.parts == 1) return;
  const Shape shape{"pq_topk_merge", dim3(unsigned(queries)), dim3(kMergeThreads),
                    size_t(queue_bytes(1, plan.places)), stream};
  launch(shape, merge_parts, global<const uint64_t>(lists, "lists"), int(plan.parts), plan.places, int(p.k), results);
}

}  // namespace cuda
}  // namespace fastret
