// fastret._cuda: the only pybind11 file of the CUDA kernels. Arrays come as tuples of integers, as in
// csrc/cpu/module.cpp, and a stream as an integer. The emulation is this file too, with FASTRET_EMULATION.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>

#include "device.h"
#include "knn_vote.h"
#include "pq_topk.h"
#include "sampled_dot.h"
#include "topk.h"

namespace py = pybind11;

namespace {

using namespace fastret;

// (address, rows, cols, row stride, dtype code, bytes that may be touched); see fastret/backends/cpu/array.py
using ArrayTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int, int64_t>;
using MaybeArray = std::optional<ArrayTuple>;

Array array(const MaybeArray& t) {
  if (!t) return {};
  const auto& [address, rows, cols, stride, dtype, bytes] = *t;
  require(dtype >= 0 && dtype <= static_cast<int>(DType::u16), "dtype", "unknown code " + std::to_string(dtype));
  return {reinterpret_cast<void*>(address), rows, cols, stride, static_cast<DType>(dtype), bytes};
}

// x, bank, first, index, seed, count
using SampledTuple = std::tuple<ArrayTuple, ArrayTuple, MaybeArray, MaybeArray, MaybeArray, int64_t>;

cuda::SampledDotProblem sampled_problem(const SampledTuple& t) {
  const auto& [x, bank, first, index, seed, count] = t;
  return {array(x), array(bank), array(first), array(index), array(seed), count};
}

using Relation = std::optional<std::pair<ArrayTuple, ArrayTuple>>;
// same, different, distinct, offset, period (0: none), above, below; as csrc/cpu/module.cpp has it
using MaskTuple = std::tuple<Relation, Relation, Relation, std::optional<int64_t>, int64_t, MaybeArray, MaybeArray>;
// rows, columns, k, mask, first column
using SearchTuple = std::tuple<int64_t, int64_t, int64_t, MaskTuple, int64_t>;
// products, row, column, first row, first column, score
using StripTuple = std::tuple<ArrayTuple, MaybeArray, MaybeArray, int64_t, int64_t, int>;

PairMask::Relation relation(const Relation& r) {
  return r ? PairMask::Relation{array(r->first), array(r->second)} : PairMask::Relation{};
}

cuda::TopkSearch topk_search(const SearchTuple& t) {
  const auto& [rows, cols, k, mask, first_column] = t;
  const auto& [same, different, distinct, offset, period, above, below] = mask;
  return {rows, cols, k,
          {relation(same), relation(different), relation(distinct), offset.has_value(), offset.value_or(0), period,
           array(above), array(below)},
          first_column};
}

cuda::TopkStrip topk_strip(const StripTuple& t) {
  const auto& [products, row, col, first_row, first_col, score] = t;
  require(score >= 0 && score <= static_cast<int>(cuda::TopkScore::distance), "score", "unknown kind");
  return {array(products), array(row), array(col), first_row, first_col, static_cast<cuda::TopkScore>(score)};
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
  m.def("sampled_dot_forward", [](const SampledTuple& problem, const ArrayTuple& scores, uintptr_t stream) {
    cuda::sampled_dot_forward(sampled_problem(problem), array(scores), stream);
  });
  m.def("sampled_dot_backward",
        [](const SampledTuple& problem, const ArrayTuple& grad, const MaybeArray& partial, const ArrayTuple& dx,
           uintptr_t stream) {
          cuda::sampled_dot_backward(sampled_problem(problem), array(grad), array(partial), array(dx), stream);
        });
  m.def("sampled_dot_parts", [](const SampledTuple& problem) {
    return cuda::sampled_dot_parts(sampled_problem(problem));
  });
  m.def("knn_vote", [](const ArrayTuple& scores, const ArrayTuple& indices, const ArrayTuple& place, int64_t classes,
                       double scale, const ArrayTuple& winners, const ArrayTuple& shares, uintptr_t stream) {
    cuda::knn_vote({array(scores), array(indices), array(place), classes, scale}, array(winners), array(shares),
                   stream);
  });
  m.attr("topk_most") = cuda::topk_most();
  m.def("topk_state", &cuda::topk_state);
  m.def("topk_select", [](const SearchTuple& search, const StripTuple& strip, int64_t parts, bool begins,
                          const ArrayTuple& state, uintptr_t stream) {
    cuda::topk_select(topk_search(search), topk_strip(strip), parts, begins, array(state), stream);
  });
  m.def("topk_finish", [](const SearchTuple& search, bool distances, int64_t parts, const ArrayTuple& state,
                          const ArrayTuple& scores, const ArrayTuple& indices, uintptr_t stream) {
    cuda::topk_finish(topk_search(search), distances, parts, array(state), array(scores), array(indices), stream);
  });
  m.def("pq_topk_plan", [](int64_t queries, int64_t codes, int64_t books, int64_t words, int64_t k,
                           bool half_tables) {
    const cuda::PqTopkPlan plan = cuda::pq_topk_plan(queries, codes, books, words, k, half_tables);
    return std::make_tuple(plan.queries, plan.parts, plan.table_rows);
  });
  m.def("pq_topk", [](const ArrayTuple& query, const ArrayTuple& codebook, const ArrayTuple& codes, int64_t words,
                      int64_t k, int metric, int64_t first_index, bool half_tables, const MaybeArray& lists,
                      const MaybeArray& tables, const ArrayTuple& scores, const ArrayTuple& indices,
                      uintptr_t stream) {
    cuda::pq_topk({array(query), array(codebook), array(codes), words, k, static_cast<cuda::PqMetric>(metric),
                   first_index, half_tables},
                  array(lists), array(tables), array(scores), array(indices), stream);
  });
}
