// How a pair matrix is cut into blocks, and in which order blocks meet. Pure functions of a few integers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastret {

struct Plan {
  int64_t row_block, col_block;  // rows of x and of y in one tile
};

// Tiles stay in L2 and leave every thread a block pair a round; multiples of 32 keep vectors full.
// Measured (AVX-512, D = 512): 128 up to a thousand rows, 256 above; a tile of 256 at N = 512 idles a thread.
// With centres a column has as many products, in tiles of their own, which stay in L2 together.
inline Plan plan(int64_t n, int64_t m, bool symmetric, int threads, int64_t centers = 1) {
  auto block = [](int64_t size, int64_t pieces) {
    const int64_t even = (size + pieces - 1) / pieces;
    return std::clamp<int64_t>((even + 31) / 32 * 32, 32, 256);
  };
  const int64_t t = std::max(1, threads);
  if (symmetric) {
    const int64_t b = block(n, t == 1 ? 1 : 2 * t);
    return {b, b};
  }
  const int64_t rows = block(n, t == 1 ? 1 : 2 * t), cols = block(m, t == 1 ? 1 : 2 * t);
  if (centers == 1) return {rows, cols};
  const int64_t classes = std::clamp<int64_t>(512 / centers / 32 * 32, 32, cols);
  return {std::clamp<int64_t>((1 << 17) / (classes * centers) / 32 * 32, 32, rows), classes};
}

// Columns whose rows are packed at a time where all of them would be a copy of a parameter: whole blocks, as many as
// there are threads at least, since threads of a round work on blocks of their own. A column has `bytes` of rows.
inline int64_t window(int64_t m, int64_t bytes, const Plan& plan, int threads) {
  constexpr int64_t kBytes = 1 << 20;
  const int64_t blocks = kBytes / (plan.col_block * std::max<int64_t>(1, bytes));
  return std::min(m, std::max<int64_t>(blocks, threads) * plan.col_block);
}

// Tiles of a column block: of scores, and of the products of several centres.
inline int64_t planes(int64_t centers) { return centers == 1 ? 1 : 1 + centers; }

// A sweep by columns: blocks of rows, cut by blocks of columns that threads own.
struct SweepPlan {
  int64_t rows = 0, col_block = 0;
  bool keep = false;  // scores of a block of rows are kept; else they are multiplied twice
  int64_t tiles = 1;  // of a block of columns
  int64_t tile_elements() const { return rows * col_block * tiles; }
};

// What is kept stays in a last-level cache; with fewer than 64 rows products are too thin, and twice is faster. Scores
// of one tile stay in L2; so do, as far as rows allow, a thread's own sums of a block's dX.
inline SweepPlan sweep_plan(int64_t n, int64_t m, int64_t d, int64_t item_bytes, int threads, int64_t centers = 1) {
  constexpr int64_t kKeptBytes = 12 << 20, kTileBytes = 512 << 10, kPartBytes = 8 << 20, kThinnest = 64;
  const int64_t cols = plan(n, m, false, threads, centers).col_block;
  const int64_t tile_row_bytes = planes(centers) * cols * item_bytes;
  const int64_t row_bytes = std::max<int64_t>(1, (m + cols - 1) / cols) * tile_row_bytes;
  const int64_t fit = kKeptBytes / row_bytes;
  const bool keep = fit >= std::min(n, kThinnest);
  const int64_t parts = std::max(kThinnest, kPartBytes / (std::max(1, threads) * d * item_bytes));
  const int64_t most = std::min({n, parts, keep ? fit : std::max<int64_t>(1, kTileBytes / tile_row_bytes)});
  const int64_t blocks = (n + most - 1) / std::max<int64_t>(1, most);
  return {n == 0 ? 0 : (n + blocks - 1) / blocks, cols, keep, planes(centers)};
}

// The k best of every row: blocks of rows, each against parts of the columns, whose k best are merged.
struct TopkPlan {
  int64_t row_block = 1, parts = 1, part_cols = 0;
  int64_t capacity = 0;  // candidates of a row before all but the k best are dropped
  static constexpr int64_t kCols = 256;  // columns of a tile
};

// Many rows a block: the columns are read from memory, and packed, once a block. Scores of a tile stay in L2, the
// candidates of a block within kCandidateBytes a thread, as far as rows allow. Too few rows for all threads: in parts.
inline TopkPlan topk_plan(int64_t n, int64_t m, int64_t k, int64_t key_bytes, int threads) {
  constexpr int64_t kMost = 512, kThinnest = 64, kLeast = 16, kCandidateBytes = 16 << 20, kPart = 8 * TopkPlan::kCols;
  auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  const int64_t t = std::max(1, threads);
  TopkPlan p;
  p.capacity = (k < m / 2 ? 2 * k : m) + TopkPlan::kCols;
  const int64_t fit = std::clamp(kCandidateBytes / (p.capacity * key_bytes), kLeast, kMost);
  int64_t blocks = std::max(pieces(n, fit), std::min(pieces(n, kThinnest), t));
  if (blocks > t) blocks = pieces(blocks, t) * t;
  p.row_block = std::max<int64_t>(1, pieces(n, std::max<int64_t>(1, blocks)));
  p.parts = std::clamp<int64_t>(std::min(pieces(t, std::max<int64_t>(1, blocks)), m / kPart), 1, t);
  p.part_cols = pieces(pieces(m, p.parts), TopkPlan::kCols) * TopkPlan::kCols;
  return p;
}

// The k best codes of every query: groups of queries, each against parts of the codes, whose k best are merged.
struct PqTopkPlan {
  int64_t parts = 1, part_rows = 0;
  int64_t capacity = 0;  // candidates of a query before all but the k best are dropped
};

// Too few groups for all threads: in parts, each of which makes tables of its own, and has more codes than they words.
inline PqTopkPlan pq_topk_plan(int64_t groups, int64_t n, int64_t words, int64_t k, int threads) {
  constexpr int64_t kLeast = 2048, kAWord = 4, kFew = 64;
  auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  const int64_t t = std::max(1, threads), wanted = pieces(2 * t, std::max<int64_t>(1, groups));
  PqTopkPlan p;
  p.parts = std::clamp<int64_t>(std::min(wanted, n / std::max(kLeast, kAWord * words)), 1, t);
  p.part_rows = pieces(n, p.parts);
  p.capacity = k < n / 2 ? 2 * k + kFew : n + 1;
  return p;
}

// soft_assign: blocks of rows against tiles of the words of a book. A task is a book and a range of rows.
struct AssignPlan {
  int64_t words = 1;                  // of a tile
  int64_t ranges = 1, range_rows = 0;
  bool by_words = false;              // what is summed over rows: in a second sweep, by those who have the words
  int64_t sum_words = 1;              // of a task of that sweep
  static constexpr int64_t kRows = 64;  // of a block; whole pairs of vectors
};

// All words in one tile where they stay in L2: backward needs a sum over all of them first. Ranges as few as keep the
// threads busy: each but the first has sums of its own over its rows, sum_bytes for all books, which are merged. Where
// these would take too much memory, threads have words instead of rows, and products are made up to 1.5 times as often.
inline AssignPlan assign_plan(int64_t n, int64_t books, int64_t words, int64_t sum_bytes, int64_t item_bytes,
                              int threads) {
  constexpr int64_t kTileBytes = 256 << 10, kSumBytes = 4 << 20;
  auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  const int64_t t = std::max(1, threads), row_bytes = AssignPlan::kRows * item_bytes;
  const int64_t blocks = std::max<int64_t>(1, pieces(n, AssignPlan::kRows));
  const auto turns = [&](int64_t r) { return double(pieces(books * r, t)) / double(r); };  // time, in books a thread
  const auto fewest = [&](int64_t most) {
    int64_t best = 1;
    for (int64_t r = 2; r <= std::min({t, blocks, most}); ++r)
      if (turns(r) < 0.9 * turns(best)) best = r;
    return best;
  };
  AssignPlan p;
  p.words = words * row_bytes <= kTileBytes ? words : pieces(words, pieces(words, kTileBytes / 2 / row_bytes));
  const int64_t free = fewest(t), fit = sum_bytes ? fewest(1 + kSumBytes / sum_bytes) : free;
  p.by_words = turns(fit) > 1.5 * turns(free);
  p.range_rows = pieces(blocks, p.by_words ? free : fit) * AssignPlan::kRows;
  p.ranges = std::max<int64_t>(1, pieces(n, p.range_rows));
  p.sum_words = std::clamp<int64_t>(pieces(words, pieces(t, books)), 1, p.words);
  return p;
}

// Round-robin tournament of `blocks` blocks: every unordered pair once, no block twice in a round, so that two
// threads of a round never add to the same rows: no atomics, and every run with the same blocks adds in the same order.
class Tournament {
 public:
  explicit Tournament(int64_t blocks) : blocks_(blocks), players_(blocks + blocks % 2) {}
  int64_t rounds() const { return blocks_ > 1 ? players_ - 1 : 0; }
  int64_t pairs() const { return players_ / 2; }
  // first > second; {-1, -1} where the odd one out rests
  std::pair<int64_t, int64_t> pair(int64_t round, int64_t k) const {
    const int64_t ring = players_ - 1;
    const int64_t a = k == 0 ? ring : (round + k) % ring, b = (round + ring - k) % ring;
    if (std::max(a, b) >= blocks_) return {-1, -1};
    return {std::max(a, b), std::min(a, b)};
  }

 private:
  int64_t blocks_, players_;
};

// The same for two different sets of blocks: a Latin square of rows x columns.
class LatinRounds {
 public:
  LatinRounds(int64_t rows, int64_t cols) : rows_(rows), cols_(cols), ring_(std::max(rows, cols)) {}
  int64_t rounds() const { return rows_ && cols_ ? ring_ : 0; }
  int64_t pairs() const { return std::min(rows_, cols_); }
  std::pair<int64_t, int64_t> pair(int64_t round, int64_t k) const {
    return rows_ <= cols_ ? std::pair{k, (k + round) % ring_} : std::pair{(k + round) % ring_, k};
  }

 private:
  int64_t rows_, cols_, ring_;
};

// [begin, end) ranges of at most `chunk` that cover [0, size)
template <class Visit> void for_chunks(int64_t size, int64_t chunk, Visit visit) {
  for (int64_t at = 0; at < size; at += chunk) visit(at, std::min(size, at + chunk));
}

}  // namespace fastret
