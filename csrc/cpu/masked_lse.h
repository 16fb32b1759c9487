// masked_lse on the CPU. setup.cpp checks and allocates; masked_lse.cpp and masked_lse_sweep.cpp, once per instruction
// set, compute. pair_rows.h reads heads, levels.h and centers.h have what is done to products first. The definition is fastret/backends/reference/masked_lse.py.
#pragma once
#include <vector>

#include "../common/array.h"
#include "../common/plan.h"
#include "../common/pair_mask.h"

namespace fastret {

// Y_ij = factor * (what the kind says) + uniform
struct PairTarget {
  enum class Kind : int { none = 0, indexed = 1, shifted = 2, masked = 3, dense = 4, listed = 5 };
  Kind kind = Kind::none;
  Array index;                      // global column numbers, int64; indexed: (1, N); listed: (1, P)
  Array offsets;                    // listed: int64 (1, N + 1): where a row's entries begin; they ascend by index
  std::vector<int64_t> shifts;      // shifted: column = base + (row + shift, modulo the period unless that is 0)
  std::vector<double> weights;      // one per shift
  int64_t base = 0, period = 0;
  PairMask mask;                    // masked
  Array weight;                     // masked: (1, N); listed: (1, P)
  Array dense;                      // dense: (N, M)
  double factor = 1, uniform = 0;
};

// What takes the place of a head's lse: the sum of phi(l) (fastret/backends/phi.py, phi.h), or, of row heads without a
// target, the greatest logit and where it stands (row_extrema).
enum class Reduction : int { lse = 0, log1m_exp = 1, hinge = 2, distance = 3, inverse_distance = 4, greatest = 5 };
inline bool is_phi(Reduction r) { return r >= Reduction::log1m_exp && r <= Reduction::inverse_distance; }

struct LseHead {
  double scale = 1;
  bool column = false;  // over the rows of each column
  PairMask mask;
  PairTarget target;
  Array row_bias, col_bias;  // (1, N), (1, M) or no data
  Reduction reduce = Reduction::lse;
};

// Heads that see only the first `width` features (Matryoshka). Heads come level by level.
struct LseLevel {
  int64_t width = 0, heads = 0;
};

// Rows of y come in groups of so many, the centres of a class, which is a column (centers.h).
struct Centers {
  int64_t count = 1;
  double temperature = 0;  // 0: the greatest score stands for the class
};

struct MaskedLseProblem {
  Array x, y;  // (N, D), (M, D), (M K, D) with K centres; y is x where `symmetric`
  bool symmetric = false;
  bool normalize = true;
  int64_t first_column = 0;  // global number of y's first row
  int threads = 1;
  std::vector<LseHead> heads;
  std::vector<LseLevel> levels;  // widths ascend to D; none: all heads see all features
  Centers centers;
  int64_t columns() const { return y.rows / centers.count; }
};

// Per head, of its axis' length: results of forward; in backward lse with the gradients that arrive (no data: zero).
struct LseResult {
  Array lse, t;
};
struct LseUpstream {
  Array lse, grad_lse, grad_t;
};
// Gradients of a head's own parameters; no data where not wanted.
struct LseGradient {
  Array scale, row_bias, col_bias;  // (1, 1), (1, N), (1, M)
};

void masked_lse_forward(const MaskedLseProblem&, const std::vector<LseResult>&);

void masked_lse_backward(const MaskedLseProblem&, const std::vector<LseUpstream>&, const Array& dx, const Array& dy,
                         const std::vector<LseGradient>&);

// One row head: lse and t, and the gradients of sum_i weight_i (lse_i - t_i). weight (1, N).
void masked_lse_sweep(const MaskedLseProblem&, const Array& weight, const LseResult&, const Array& dx, const Array& dy,
                      const LseGradient&);

// The greatest or least score of every row under a mask, and the lowest global column where it stands: +-inf and -1
// where no pair is allowed. Scores are those of masked_lse, bit for bit: its program computes them.
struct Extremum {
  bool greatest = true;
  PairMask mask;
  Array value, index;  // out: (1, N); int64 (1, N)
};
void row_extrema(const MaskedLseProblem& without_heads, const std::vector<Extremum>&);

// A head on its way through the kernels. Vectors of the accumulation type, one entry a row or a column, padded by zeros
// to whole vectors past the last tile, so that no loop over a tile's columns has a tail; null where there is none.
struct LseHeadWork {
  const LseHead* head = nullptr;
  const void *row_bias = nullptr, *col_bias = nullptr;
  // forward, and a phi's one pass for values and gradients: running maximum, sum of exp(l - peak), sum of Y l; sum of phi; greatest logit and its column, or -1
  void *peak = nullptr, *sum = nullptr, *t = nullptr;
  int64_t* index = nullptr;
  // backward: lse and its gradient, (+inf, 0) where nothing was allowed; gradient of t
  const void *lse = nullptr, *grad_lse = nullptr, *grad_t = nullptr;
  void* scale_rows = nullptr;  // (N) sum over j of dL/dl_ij s_ij, or not wanted
  void *grad_row_bias = nullptr, *grad_col_bias = nullptr;  // or not wanted
};

// A level on its way through the kernels: heads [head, head_end), which see features [0, end), of which the next
// narrower level sees `begin`. See levels.h.
struct LseLevelWork {
  struct Side {
    void* factor = nullptr;  // per row: norm of all features over that of the level's; null: its scores are products
    void* radial = nullptr;  // backward, per row: the radial part of its gradient, or not wanted
  };
  int64_t begin = 0, end = 0, head = 0, head_end = 0;
  Side x, y;
};

struct MaskedLseWork {
  const MaskedLseProblem& problem;
  Plan plan;
  SweepPlan sweep;
  LseHeadWork* heads = nullptr;
  int64_t head_count = 0;
  const LseLevelWork* levels = nullptr;
  int64_t level_count = 0;
  int64_t tiles = 0;  // of a thread's workspace
  bool pack_x = true, pack_y = true;  // false: rows are used where they lie
  int64_t window = 0;  // so many columns at a time: y, y_norm, and dy unless it is the output, have room for those rows
                       // only. sweep, y null: packed a block at a time
  void *x = nullptr, *y = nullptr, *x_norm = nullptr, *y_norm = nullptr;
  void *dx = nullptr, *dy = nullptr;  // gradients of the packed rows; dy = dx where symmetric
  const void* weight = nullptr;       // sweep: (N)
  void* block = nullptr;              // sweep: exponentials of a block of rows, by blocks of columns
  char* threads = nullptr;                   // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct MaskedLseKernels {
  int64_t (*thread_elements)(const Plan&, int64_t tiles);
  void (*forward)(const MaskedLseWork&);
  void (*backward)(const MaskedLseWork&, const Array& dx, const Array& dy);
};
struct MaskedLseSweep {
  int64_t (*thread_elements)(const MaskedLseWork&);
  void (*run)(const MaskedLseWork&, const Array& dx, const Array& dy);
};

namespace base {
MaskedLseKernels masked_lse_kernels(bool doubles);
MaskedLseSweep masked_lse_sweep_kernel(bool doubles);
}
namespace avx2 {
MaskedLseKernels masked_lse_kernels(bool doubles);
MaskedLseSweep masked_lse_sweep_kernel(bool doubles);
}
namespace avx512 {
MaskedLseKernels masked_lse_kernels(bool doubles);
MaskedLseSweep masked_lse_sweep_kernel(bool doubles);
}

MaskedLseKernels masked_lse_kernels(bool doubles);  // of the instruction set in use
MaskedLseSweep masked_lse_sweep_kernel(bool doubles);

}  // namespace fastret
