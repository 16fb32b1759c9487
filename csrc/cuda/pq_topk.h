// pq_topk on CUDA. The definition is fastret/backends/reference/pq_topk.py.
#pragma once
#include "../common/array.h"

namespace fastret {
namespace cuda {

enum class PqMetric : int { l2 = 0, l21 = 1, dot = 2 };

struct PqTopkProblem {
  Array query;     // float32 (Q, M L)
  Array codebook;  // float32 (M K, L): the K words of a book, book after book
  Array codes;     // (N, M), 8 or 16 bits each; whoever calls has made sure that all are below K
  int64_t words = 1;  // K
  int64_t k = 1;      // results a query
  PqMetric metric = PqMetric::l2;
  int64_t first_index = 0;  // global number of the first code
  bool half_tables = false;  // entries are rounded to float16, as fastret/ops/pq_topk.py has it
};

// How the work is cut, on the device that is current; nothing of it changes a result.
struct PqTopkPlan {
  int queries = 1;         // of a block, which share their lookups' codes: 12, 4 or 1; of float16, 16, 8 or 1
  bool in_shared = true;   // tables; else one query's lie in global memory
  int places = 64;         // kept candidates a query
  int64_t parts = 1;       // of the codes: as many as keep the device busy
  int64_t part_rows = 0;
  int64_t table_rows = 0;  // tables in global memory: blocks of a launch
  int64_t shared_bytes = 0;
};
PqTopkPlan pq_topk_plan(int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k, bool half_tables);

// lists: int64 (Q parts, k) where there are several parts; tables: (table_rows, M K) in their type where that is not 0.
// out: scores float32 (Q, k), best first; indices int64 (Q, k), global. Where there are fewer: the worst score, and -1.
void pq_topk(const PqTopkProblem&, const Array& lists, const Array& tables, const Array& scores, const Array& indices,
             uintptr_t stream);

}  // namespace cuda
}  // namespace fastret
