// topk on CUDA: what is best in strips of a pair matrix, one after another. The definition is
// fastret/backends/reference/topk.py; fastret/backends/cuda/topk.py multiplies the strips.
#pragma once
#include "../common/array.h"
#include "../common/pair_mask.h"

namespace fastret {
namespace cuda {

enum class TopkScore : int { product = 0, scaled = 1, distance = 2 };

// Products p_ij of some rows and columns, and what makes them scores:
//   product p_ij,   scaled p_ij row_i col_j,   distance max(row_i + col_j - 2 p_ij, 0), the least of which are wanted.
struct TopkStrip {
  Array products;            // float32 (R, C), rows at multiples of 16 bytes
  Array row, col;            // float32 (1, N), (1, M); none for products
  int64_t first_row = 0, first_col = 0;  // of products in the whole, N x M; the latter a multiple of 4
  TopkScore score = TopkScore::product;
};

struct TopkSearch {
  int64_t rows = 0, cols = 0, k = 1;  // N, M and results a row, at most topk_most()
  PairMask mask;                      // of N rows and M columns
  int64_t first_column = 0;           // global number of column 0
};

int64_t topk_most();

// Columns of the state: what a search for k keeps of each part of a row.
int64_t topk_state(int64_t k);

// in: a strip, each row's columns in `parts` equal parts. inout: state, int64 (R parts, topk_state); the first strip of
// these rows begins it, whatever it holds. Strips come in the order of their columns.
void topk_select(const TopkSearch&, const TopkStrip&, int64_t parts, bool begins, const Array& state, uintptr_t stream);

// in: state of R rows after their last strip; it is used up. out: scores float32 (R, k), best first; indices int64
// (R, k), global. Where there are fewer: the worst score, and -1.
void topk_finish(const TopkSearch&, bool distances, int64_t parts, const Array& state, const Array& scores,
                 const Array& indices, uintptr_t stream);

}  // namespace cuda
}  // namespace fastret
