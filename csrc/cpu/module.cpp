// fastret._C: the only pybind11 file. Tensors come as plain tuples of integers, so that nothing here depends on
// PyTorch's headers or ABI; every tuple is checked against the sizes it states before a pointer is used.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "blas.h"
#include "rank_sums.h"
#include "settings.h"

namespace py = pybind11;

namespace {

using namespace fastret;

// (address, rows, cols, row stride, dtype code, bytes that may be touched); see fastret/backends/cpu/array.py
using ArrayTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int, int64_t>;

Array array(const ArrayTuple& t) {
  const auto& [address, rows, cols, stride, dtype, bytes] = t;
  require(dtype >= 0 && dtype <= static_cast<int>(DType::i64), "dtype", "unknown code " + std::to_string(dtype));
  return {reinterpret_cast<void*>(address), rows, cols, stride, static_cast<DType>(dtype), bytes};
}
Array array(const std::optional<ArrayTuple>& t) { return t ? array(*t) : Array{}; }

RankSumsProblem problem(const ArrayTuple& x, const std::optional<ArrayTuple>& y, const ArrayTuple& order,
                        const ArrayTuple& start, const ArrayTuple& count, bool exclude_self, bool normalize,
                        double temperature, int threads) {
  return {array(x),     array(y ? *y : x), array(order), array(start), array(count),
          !y.has_value(), exclude_self,      normalize,    temperature,  threads};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastret";

  m.def("rank_sums_forward",
        [](const ArrayTuple& x, const std::optional<ArrayTuple>& y, const ArrayTuple& order, const ArrayTuple& start,
           const ArrayTuple& count, bool exclude_self, bool normalize, double temperature, int threads,
           const ArrayTuple& rank_all, const ArrayTuple& rank_pos) {
          const RankSumsProblem p = problem(x, y, order, start, count, exclude_self, normalize, temperature, threads);
          const py::gil_scoped_release release;
          rank_sums_forward(p, array(rank_all), array(rank_pos));
        });
  m.def("rank_sums_backward",
        [](const ArrayTuple& x, const std::optional<ArrayTuple>& y, const ArrayTuple& order, const ArrayTuple& start,
           const ArrayTuple& count, bool exclude_self, bool normalize, double temperature, int threads,
           const ArrayTuple& grad_all, const ArrayTuple& grad_pos, const std::optional<ArrayTuple>& dx,
           const std::optional<ArrayTuple>& dy) {
          const RankSumsProblem p = problem(x, y, order, start, count, exclude_self, normalize, temperature, threads);
          const py::gil_scoped_release release;
          rank_sums_backward(p, array(grad_all), array(grad_pos), array(dx), array(dy));
        });

  m.def("plan", [](int64_t n, int64_t m, bool symmetric, int threads) {
    const Plan p = plan(n, m, symmetric, threads);
    return std::pair{p.row_block, p.col_block};
  });
  m.def("tournament", [](int64_t blocks) {
    std::vector<std::vector<std::pair<int64_t, int64_t>>> rounds;
    const Tournament t(blocks);
    for (int64_t r = 0; r < t.rounds(); ++r) {
      rounds.emplace_back();
      for (int64_t k = 0; k < t.pairs(); ++k) rounds.back().push_back(t.pair(r, k));
    }
    return rounds;
  });

  m.def("supported_isas", &supported_isas);
  m.def("isa", [] { return settings().isa; });
  m.def("set_isa", &set_isa);
  m.def("gemm", [] { return settings().use_blas && blas().available<float>() ? "blas" : "own"; });
  m.def("set_gemm", &set_gemm);
  m.def("set_blas", &set_blas);
  m.def("openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
}
