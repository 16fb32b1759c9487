// The tiles of a pair matrix inside a parallel region: every kernel walks them in the same order.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "../common/plan.h"
#include "isa.h"

FASTRET_ISA_BEGIN

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Threads of the region, which may be fewer than were asked for.
inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

struct Tile {
  int64_t row, row_end, col, col_end;
  bool two_sided;  // of a symmetric matrix, off the diagonal: transposed, it holds the pairs (col, row) as well
  int64_t rows() const { return row_end - row; }
  int64_t cols() const { return col_end - col; }
};

template <class Rounds, class MakeTile, class Visit>
void in_rounds(const Rounds rounds, MakeTile tile, Visit visit) {
  for (int64_t r = 0; r < rounds.rounds(); ++r) {
#pragma omp for schedule(static, 1)
    for (int64_t k = 0; k < rounds.pairs(); ++k) {
      const auto [i, j] = rounds.pair(r, k);
      if (i >= 0) visit(tile(i, j));
    }
  }
}

// Calls visit for tiles that cover the n x m matrix once (its lower block triangle where symmetric); no two tiles that
// are worked at the same time share a block of rows or a block of columns.
template <class Visit> void for_tiles(int64_t n, int64_t m, const Plan& plan, bool symmetric, Visit visit) {
  const int64_t br = plan.row_block, bc = plan.col_block;
  const int64_t rows = (n + br - 1) / br, cols = (m + bc - 1) / bc;
  auto tile = [&](int64_t i, int64_t j) {
    return Tile{i * br, std::min(n, (i + 1) * br), j * bc, std::min(m, (j + 1) * bc), symmetric && i != j};
  };
  if (!symmetric) return in_rounds(LatinRounds(rows, cols), tile, visit);
#pragma omp for schedule(static, 1)
  for (int64_t i = 0; i < rows; ++i) visit(tile(i, i));
  in_rounds(Tournament(rows), tile, visit);
}

template <class T> void clear(T* data, int64_t size) {
  if (!data) return;
  constexpr int64_t kPiece = 1 << 14;
#pragma omp for schedule(static)
  for (int64_t at = 0; at < (size + kPiece - 1) / kPiece; ++at)
    std::fill(data + at * kPiece, data + std::min(size, (at + 1) * kPiece), T(0));
}

FASTRET_ISA_END
