// topk on the CPU. topk_setup.cpp checks and allocates; topk.cpp, once per instruction set, computes. The definition is
// fastret/backends/reference/topk.py.
#pragma once
#include "../common/array.h"
#include "../common/plan.h"
#include "../common/pair_mask.h"

namespace fastret {

enum class TopkMetric : int { cosine = 0, dot = 1, l2 = 2 };

struct TopkProblem {
  Array x, y;     // (N, D) queries, (M, D) gallery, of types that may differ where neither is float64
  int64_t k = 1;  // results a query
  PairMask mask;
  TopkMetric metric = TopkMetric::cosine;
  int64_t first_column = 0;  // global number of y's first row
  int threads = 1;

  bool distances() const { return metric == TopkMetric::l2; }
};

// out: scores (N, k), best first; indices int64 (N, k), global. Where there are fewer: the worst score, and -1.
void topk(const TopkProblem&, const Array& scores, const Array& indices);

struct TopkWork {
  const TopkProblem& problem;
  TopkPlan plan;
  int64_t keep = 0;              // k, but no more than there are columns
  bool pack_y = true;            // false: rows are used where they lie
  void* parts = nullptr;         // where there are several parts: keep candidates a row and part, and how many
  int64_t* part_counts = nullptr;
  char* threads = nullptr;       // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct TopkKernels {
  int64_t (*thread_bytes)(const TopkWork&);
  void (*run)(const TopkWork&, const Array& scores, const Array& indices);
};

namespace base { TopkKernels topk_kernels(bool doubles); }
namespace avx2 { TopkKernels topk_kernels(bool doubles); }
namespace avx512 { TopkKernels topk_kernels(bool doubles); }

TopkKernels topk_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
