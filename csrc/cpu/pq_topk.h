// pq_topk on the CPU. pq_topk_setup.cpp checks and allocates; pq_topk.cpp, once per instruction set, computes. The
// definition is fastret/backends/reference/pq_topk.py.
#pragma once
#include "../common/array.h"
#include "../common/plan.h"

namespace fastret {

enum class PqMetric : int { l2 = 0, l21 = 1, dot = 2 };

struct PqTopkProblem {
  Array query;        // (Q, M L), float or double
  Array codebook;     // (M K, L) of the same type: the K words of a book, book after book
  Array codes;        // (N, M), 8 or 16 bits each; whoever calls has made sure that all are below K
  int64_t words = 1;  // K
  int64_t k = 1;      // results a query
  PqMetric metric = PqMetric::l2;
  int64_t first_index = 0;  // global number of the first code
  bool half_tables = false;  // entries are rounded to float16, as fastret/ops/pq_topk.py has it
  int threads = 1;

  int64_t books() const { return codes.cols; }
  bool distances() const { return metric != PqMetric::dot; }
};

// out: scores (Q, k), best first; indices int64 (Q, k), global. Where there are fewer: the worst score, and -1.
void pq_topk(const PqTopkProblem&, const Array& scores, const Array& indices);

struct PqTopkWork {
  const PqTopkProblem& problem;
  PqTopkPlan plan;
  int64_t keep = 0;              // k, but no more than there are codes
  void* parts = nullptr;         // where there are several parts: keep candidates a query and part, and how many
  int64_t* part_counts = nullptr;
  char* threads = nullptr;       // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct PqTopkKernels {
  int64_t lanes;  // queries of a group
  int64_t (*thread_bytes)(const PqTopkWork&);
  void (*run)(const PqTopkWork&, const Array& scores, const Array& indices);
};

namespace base { PqTopkKernels pq_topk_kernels(bool doubles); }
namespace avx2 { PqTopkKernels pq_topk_kernels(bool doubles); }
namespace avx512 { PqTopkKernels pq_topk_kernels(bool doubles); }

PqTopkKernels pq_topk_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
