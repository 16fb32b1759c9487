// fastret._cuda. How arrays come from Python: csrc/common/binding.h; a stream is an integer. The emulation is this file
// too, with FASTRET_EMULATION.
#include <tuple>

#include "../common/binding.h"
#include "device.h"
#include "knn_vote.h"
#include "pq_topk.h"
#include "sampled_dot.h"
#include "topk.h"

namespace py = pybind11;

namespace {

using namespace fastret;

// x, bank, first, index, seed, count
using SampledTuple = std::tuple<Array, Array, MaybeArray, MaybeArray, MaybeArray, int64_t>;

cuda::SampledDotProblem sampled_problem(const SampledTuple& t) {
  const auto& [x, bank, first, index, seed, count] = t;
  return {x, bank, array(first), array(index), array(seed), count};
}

// rows, columns, k, mask, first column
using SearchTuple = std::tuple<int64_t, int64_t, int64_t, PairMask, int64_t>;
// products, row, column, first row, first column, score
using StripTuple = std::tuple<Array, MaybeArray, MaybeArray, int64_t, int64_t, int>;

cuda::TopkSearch topk_search(const SearchTuple& t) {
  const auto& [rows, cols, k, mask, first_column] = t;
  return {rows, cols, k, mask, first_column};
}

cuda::TopkStrip topk_strip(const StripTuple& t) {
  const auto& [products, row, col, first_row, first_col, score] = t;
  require(score >= 0 && score <= static_cast<int>(cuda::TopkScore::distance), "score", "unknown kind");
  return {products, array(row), array(col), first_row, first_col, static_cast<cuda::TopkScore>(score)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastret";

#ifdef FASTRET_EMULATION
  m.attr("device_type") = "cpu";
  m.def("set_order", &cuda::set_order);
#else
  m.attr("device_type") = "cuda";
#endif
  m.def("device_error", &cuda::device_error);
  m.def("sampled_dot_forward", [](const SampledTuple& problem, const Array& scores, uintptr_t stream) {
    cuda::sampled_dot_forward(sampled_problem(problem), scores, stream);
  });
  m.def("sampled_dot_backward",
        [](const SampledTuple& problem, const Array& grad, const MaybeArray& partial, const Array& dx,
           uintptr_t stream) {
          cuda::sampled_dot_backward(sampled_problem(problem), grad, array(partial), dx, stream);
        });
  m.def("sampled_dot_parts", [](const SampledTuple& problem) {
    return cuda::sampled_dot_parts(sampled_problem(problem));
  });
  m.def("knn_vote", [](const Array& scores, const Array& indices, const Array& place, int64_t classes,
                       double scale, const Array& winners, const Array& shares, uintptr_t stream) {
    cuda::knn_vote({scores, indices, place, classes, scale}, winners, shares,
                   stream);
  });
  m.attr("topk_most") = cuda::topk_most();
  m.def("topk_state", &cuda::topk_state);
  m.def("topk_select", [](const SearchTuple& search, const StripTuple& strip, int64_t parts, bool begins,
                          const Array& state, uintptr_t stream) {
    cuda::topk_select(topk_search(search), topk_strip(strip), parts, begins, state, stream);
  });
  m.def("topk_finish", [](const SearchTuple& search, bool distances, int64_t parts, const Array& state,
                          const Array& scores, const Array& indices, uintptr_t stream) {
    cuda::topk_finish(topk_search(search), distances, parts, state, scores, indices, stream);
  });
  m.def("pq_topk_plan", [](int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k,
                           bool half_tables) {
    const cuda::PqTopkPlan plan = cuda::pq_topk_plan(queries, codes, books, words, k, half_tables);
    return std::make_tuple(plan.queries, plan.parts, plan.table_rows);
  });
  m.def("pq_topk", [](const Array& query, const Array& codebook, const Array& codes, int64_t words,
                      int64_t k, int metric, int64_t first_index, bool half_tables, const MaybeArray& lists,
                      const MaybeArray& tables, const Array& scores, const Array& indices,
                      uintptr_t stream) {
    cuda::pq_topk({query, codebook, codes, words, k, static_cast<cuda::PqMetric>(metric),
                   first_index, half_tables},
                  array(lists), array(tables), scores, indices, stream);
  });
}
