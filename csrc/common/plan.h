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
inline Plan plan(int64_t n, int64_t m, bool symmetric, int threads) {
  auto block = [](int64_t size, int64_t pieces) {
    const int64_t even = (size + pieces - 1) / pieces;
    return std::clamp<int64_t>((even + 31) / 32 * 32, 32, 256);
  };
  const int64_t t = std::max(1, threads);
  if (symmetric) {
    const int64_t b = block(n, t == 1 ? 1 : 2 * t);
    return {b, b};
  }
  return {block(n, t == 1 ? 1 : 2 * t), block(m, t == 1 ? 1 : 2 * t)};
}

// One sweep over S: a block of rows is kept whole, cut into pieces of rows (one thread each) by blocks of columns.
struct SweepPlan {
  int64_t rows = 0;  // 0: S is multiplied twice instead
  int64_t piece = 0, col_block = 0;
};

constexpr int64_t kSweepPiece = 256;  // most rows of a piece

// The block stays in a last-level cache. Below 64 rows, or 32 a thread, products are too thin: twice is faster then.
inline SweepPlan sweep_plan(int64_t n, int64_t m, int64_t item_bytes, int threads) {
  constexpr int64_t kBlockBytes = 12 << 20;
  const int64_t t = std::max(1, threads), cols = plan(n, m, false, threads).col_block;
  const int64_t row_bytes = std::max<int64_t>(1, (m + cols - 1) / cols) * cols * item_bytes;
  const int64_t fit = kBlockBytes / row_bytes;
  if (n == 0 || m == 0 || fit < std::min(n, std::max<int64_t>(64, 32 * t))) return {};
  const int64_t each = std::min((n + t - 1) / t, fit / t);  // rows of a thread in one block
  const int64_t piece = std::clamp<int64_t>(each / 32 * 32, 32, kSweepPiece);
  return {std::min(n, std::max<int64_t>(1, fit / piece) * piece), piece, cols};
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
