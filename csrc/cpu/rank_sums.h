// rank_sums on the CPU. rank_sums_setup.cpp checks, lays out and allocates; rank_sums.cpp, once per instruction set, computes.
#pragma once
#include "../common/array.h"
#include "../common/class_layout.h"
#include "../common/plan.h"

namespace fastret {

struct RankSumsProblem {
  Array x, y;                 // (N, D) queries, (M, D) gallery; y is x where `symmetric`
  Array order, start, count;  // int64 (1, M), (1, N), (1, N): see class_layout.h
  bool symmetric = false;     // gallery = batch
  bool exclude_self = false;  // the query is neither a positive nor a competitor of itself (symmetric only)
  bool normalize = true;
  double temperature = 0;
  int threads = 1;
};

// out: rank_all, rank_pos (1, P), query-major, a query's positives in ascending gallery order
void rank_sums_forward(const RankSumsProblem&, const Array& rank_all, const Array& rank_pos);

// in: grad_all, grad_pos (1, P). out: dx (N, D), dy (M, D); no data where not wanted
void rank_sums_backward(const RankSumsProblem&, const Array& grad_all, const Array& grad_pos, const Array& dx,
                        const Array& dy);

// What the kernels work on: everything sorted by class, buffers of the accumulation type allocated.
struct RankSumsWork {
  const RankSumsProblem& problem;
  const ClassLayout& layout;
  Plan plan;
  bool pack_x = true, pack_y = true;   // false: rows are used where they lie
  void *x = nullptr, *y = nullptr;     // sorted unit rows
  void *x_norm = nullptr, *y_norm = nullptr;
  void* positives = nullptr;           // (P) score of each positive pair, in sorted order; in backward then dS
  void* slopes = nullptr;              // (P) sum over negatives of sigmoid'
  void *dx = nullptr, *dy = nullptr;   // gradients of the sorted unit rows; dy = dx where symmetric
  const int64_t *dx_cycles = nullptr, *dy_cycles = nullptr;  // where dx is the output itself, to unsort it in place
  int64_t dx_cycle_count = 0, dy_cycle_count = 0;
  char* threads = nullptr;             // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct RankSumsKernels {
  int64_t (*thread_elements)(const Plan&, int64_t largest_class);
  void (*forward)(const RankSumsWork&, const Array& rank_all, const Array& rank_pos);
  void (*backward)(const RankSumsWork&, const Array& grad_all, const Array& grad_pos, const Array& dx, const Array& dy);
};

namespace base { RankSumsKernels rank_sums_kernels(bool doubles); }
namespace avx2 { RankSumsKernels rank_sums_kernels(bool doubles); }
namespace avx512 { RankSumsKernels rank_sums_kernels(bool doubles); }

RankSumsKernels rank_sums_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
