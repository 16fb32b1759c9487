// fastret._C. How arrays come from Python: csrc/common/binding.h.
#include <tuple>
#include <utility>
#include <vector>

#include "../common/binding.h"
#include "blas.h"
#include "masked_lse.h"
#include "pair_dot.h"
#include "patchmix.h"
#include "pq_topk.h"
#include "rank_sums.h"
#include "sampled_dot.h"
#include "segment_mean.h"
#include "settings.h"
#include "soft_assign.h"
#include "topk.h"

namespace pybind11::detail {

// kind, index, offsets, shifts, weights, base, period, mask, weight, dense, factor, uniform
template <> struct type_caster<fastret::PairTarget> {
  PYBIND11_TYPE_CASTER(fastret::PairTarget, const_name("PairTarget"));
  bool load(handle source, bool convert) {
    using fastret::MaybeArray;
    return load_parts<int, MaybeArray, MaybeArray, std::vector<int64_t>, std::vector<double>, int64_t, int64_t,
                      fastret::PairMask, MaybeArray, MaybeArray, double, double>(
        source, convert,
        [this](int kind, const MaybeArray& index, const MaybeArray& offsets, const std::vector<int64_t>& shifts,
               const std::vector<double>& weights, int64_t base, int64_t period, const fastret::PairMask& mask,
               const MaybeArray& weight, const MaybeArray& dense, double factor, double uniform) {
          value = {static_cast<fastret::PairTarget::Kind>(kind), array(index), array(offsets), shifts, weights, base,
                   period, mask, array(weight), array(dense), factor, uniform};
        });
  }
};

// scale, whether over columns, mask, target, row bias, column bias, reduction
template <> struct type_caster<fastret::LseHead> {
  PYBIND11_TYPE_CASTER(fastret::LseHead, const_name("LseHead"));
  bool load(handle source, bool convert) {
    using fastret::MaybeArray;
    return load_parts<double, bool, fastret::PairMask, fastret::PairTarget, MaybeArray, MaybeArray, int>(
        source, convert,
        [this](double scale, bool column, const fastret::PairMask& mask, const fastret::PairTarget& target,
               const MaybeArray& row_bias, const MaybeArray& col_bias, int reduction) {
          value = {scale, column, mask, target, array(row_bias), array(col_bias),
                   static_cast<fastret::Reduction>(reduction)};
        });
  }
};

// scale, row bias, column bias
template <> struct type_caster<fastret::LseGradient> {
  PYBIND11_TYPE_CASTER(fastret::LseGradient, const_name("LseGradient"));
  bool load(handle source, bool convert) {
    using fastret::MaybeArray;
    return load_parts<MaybeArray, MaybeArray, MaybeArray>(
        source, convert, [this](const MaybeArray& scale, const MaybeArray& row_bias, const MaybeArray& col_bias) {
          value = {array(scale), array(row_bias), array(col_bias)};
        });
  }
};

}  // namespace pybind11::detail

namespace py = pybind11;

namespace {

using namespace fastret;

RankSumsProblem problem(const Array& x, const MaybeArray& y, const Array& order, const Array& start, const Array& count,
                        bool exclude_self, bool normalize, double temperature, int threads) {
  return {x, y.value_or(x), order, start, count, !y.has_value(), exclude_self, normalize, temperature, threads};
}

using LevelTuple = std::pair<int64_t, int64_t>;   // width, number of heads
using CentersTuple = std::pair<int64_t, double>;  // count, temperature or 0

MaskedLseProblem lse_problem(const Array& x, const MaybeArray& y, const std::vector<LseHead>& heads, bool normalize,
                             int64_t first_column, int threads,
                             const std::vector<LevelTuple>& levels = {}, const CentersTuple& centers = {1, 0}) {
  MaskedLseProblem p{x, y.value_or(x), !y.has_value(), normalize, first_column, threads, heads, {},
                     {centers.first, centers.second}};
  for (const auto& [width, count] : levels) p.levels.push_back({width, count});
  return p;
}

PairDotProblem pair_problem(const Array& x, const MaybeArray& y, const Array& row, const Array& column, bool normalize,
                            int threads) {
  return {x, y.value_or(x), row, column, !y.has_value(), normalize, threads};
}

// x, bank, first, index, seed, count, threads
SampledDotProblem sampled_problem(const Array& x, const Array& bank, const MaybeArray& first, const MaybeArray& index,
                                  uint64_t seed, int64_t count, int threads) {
  return {x, bank, array(first), array(index), seed, count, threads};
}

// x, keys, bias, logits, codebook, books
using AssignTuple = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray, Array, int64_t>;
using FourArrays = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray>;

SoftAssignProblem assign_problem(const AssignTuple& t, int threads) {
  const auto& [x, keys, bias, logits, codebook, books] = t;
  return {array(x), array(keys), array(bias), array(logits), codebook, books, threads};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastret";

  m.def("rank_sums_forward",
        [](const Array& x, const MaybeArray& y, const Array& order, const Array& start, const Array& count,
           bool exclude_self, bool normalize, double temperature, int threads, const Array& rank_all,
           const Array& rank_pos) {
          const RankSumsProblem p = problem(x, y, order, start, count, exclude_self, normalize, temperature, threads);
          const py::gil_scoped_release release;
          rank_sums_forward(p, rank_all, rank_pos);
        });
  m.def("rank_sums_backward",
        [](const Array& x, const MaybeArray& y, const Array& order, const Array& start, const Array& count,
           bool exclude_self, bool normalize, double temperature, int threads, const Array& grad_all,
           const Array& grad_pos, const MaybeArray& dx, const MaybeArray& dy) {
          const RankSumsProblem p = problem(x, y, order, start, count, exclude_self, normalize, temperature, threads);
          const py::gil_scoped_release release;
          rank_sums_backward(p, grad_all, grad_pos, array(dx), array(dy));
        });

  m.def("masked_lse_forward",
        [](const Array& x, const MaybeArray& y, const std::vector<LseHead>& heads,
           const std::vector<LevelTuple>& levels, bool normalize, int64_t first_column, int threads,
           const std::vector<std::pair<Array, Array>>& results, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, heads, normalize, first_column, threads, levels, centers);
          std::vector<LseResult> out;
          for (const auto& [lse, t] : results) out.push_back({lse, t});
          const py::gil_scoped_release release;
          masked_lse_forward(p, out);
        });
  m.def("masked_lse_backward",
        [](const Array& x, const MaybeArray& y, const std::vector<LseHead>& heads,
           const std::vector<LevelTuple>& levels, bool normalize, int64_t first_column, int threads,
           const std::vector<std::tuple<Array, MaybeArray, MaybeArray>>& upstream, const MaybeArray& dx,
           const MaybeArray& dy, const std::vector<LseGradient>& gradients, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, heads, normalize, first_column, threads, levels, centers);
          std::vector<LseUpstream> in;
          for (const auto& [lse, grad_lse, grad_t] : upstream)
            in.push_back({lse, array(grad_lse), array(grad_t)});
          const py::gil_scoped_release release;
          masked_lse_backward(p, in, array(dx), array(dy), gradients);
        });
  m.def("masked_lse_sweep",
        [](const Array& x, const MaybeArray& y, const LseHead& h, bool normalize, int64_t first_column,
           int threads, const Array& weight, const Array& lse, const Array& t, const MaybeArray& dx,
           const MaybeArray& dy, const LseGradient& g, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, {h}, normalize, first_column, threads, {}, centers);
          const py::gil_scoped_release release;
          masked_lse_sweep(p, weight, {lse, t}, array(dx), array(dy), g);
        });
  m.def("row_extrema",
        [](const Array& x, const MaybeArray& y, const std::vector<std::tuple<bool, PairMask>>& extrema,
           bool normalize, int64_t first_column, int threads,
           const std::vector<std::pair<Array, Array>>& results) {
          require(results.size() == extrema.size(), "results", "expected one an extremum");
          const MaskedLseProblem p = lse_problem(x, y, {}, normalize, first_column, threads);
          std::vector<Extremum> wanted;
          for (size_t k = 0; k < extrema.size(); ++k) {
            const auto& [greatest, allowed] = extrema[k];
            wanted.push_back({greatest, allowed, results[k].first, results[k].second});
          }
          const py::gil_scoped_release release;
          row_extrema(p, wanted);
        });
  m.def("pair_dot_forward", [](const Array& x, const MaybeArray& y, const Array& row,
                               const Array& column, bool normalize, int threads, const Array& scores) {
    const PairDotProblem p = pair_problem(x, y, row, column, normalize, threads);
    const py::gil_scoped_release release;
    pair_dot_forward(p, scores);
  });
  m.def("pair_dot_backward",
        [](const Array& x, const MaybeArray& y, const Array& row, const Array& column, bool normalize,
           int threads, const Array& grad, const MaybeArray& dx, const MaybeArray& dy) {
          const PairDotProblem p = pair_problem(x, y, row, column, normalize, threads);
          const py::gil_scoped_release release;
          pair_dot_backward(p, grad, array(dx), array(dy));
        });
  m.def("segment_mean_forward", [](const Array& x, const Array& index, bool mean, int threads,
                                   const Array& result, const Array& counts) {
    const SegmentMeanProblem p{index, mean, threads};
    const py::gil_scoped_release release;
    segment_mean_forward(p, x, result, counts);
  });
  m.def("segment_mean_backward", [](const Array& grad, const Array& index, const Array& counts,
                                    bool mean, int threads, const Array& dx) {
    const SegmentMeanProblem p{index, mean, threads};
    const py::gil_scoped_release release;
    segment_mean_backward(p, grad, counts, dx);
  });
  m.def("topk", [](const Array& x, const Array& y, int64_t k, const PairMask& allowed, int metric,
                   int64_t first_column, int threads, const Array& scores, const Array& indices) {
    require(metric >= 0 && metric <= static_cast<int>(TopkMetric::l2), "metric", "unknown kind");
    const TopkProblem p{x, y, k, allowed, static_cast<TopkMetric>(metric), first_column, threads};
    const py::gil_scoped_release release;
    topk(p, scores, indices);
  });
  m.def("topk_plan", [](int64_t n, int64_t m, int64_t k, int64_t key_bytes, int threads) {
    const TopkPlan p = topk_plan(n, m, k, key_bytes, threads);
    return std::tuple{p.row_block, p.parts, p.part_cols, p.capacity};
  });
  m.def("pq_topk", [](const Array& query, const Array& codebook, const Array& codes, int64_t words,
                      int64_t k, int metric, int64_t first_index, bool half_tables, int threads,
                      const Array& scores, const Array& indices) {
    require(metric >= 0 && metric <= static_cast<int>(PqMetric::dot), "metric", "unknown kind");
    const PqTopkProblem p{query, codebook, codes, words, k, static_cast<PqMetric>(metric),
                          first_index, half_tables, threads};
    const py::gil_scoped_release release;
    pq_topk(p, scores, indices);
  });
  m.def("pq_topk_plan", [](int64_t groups, int64_t n, int64_t words, int64_t k, int threads) {
    const PqTopkPlan p = pq_topk_plan(groups, n, words, k, threads);
    return std::tuple{p.parts, p.part_rows, p.capacity};
  });
  m.def("sampled_dot_forward",
        [](const Array& x, const Array& bank, const MaybeArray& first, const MaybeArray& index, uint64_t seed,
           int64_t count, int threads, const Array& scores) {
          const SampledDotProblem p = sampled_problem(x, bank, first, index, seed, count, threads);
          const py::gil_scoped_release release;
          sampled_dot_forward(p, scores);
        });
  m.def("sampled_dot_backward",
        [](const Array& x, const Array& bank, const MaybeArray& first, const MaybeArray& index, uint64_t seed,
           int64_t count, int threads, const Array& grad, const MaybeArray& dx, const MaybeArray& d_bank) {
          const SampledDotProblem p = sampled_problem(x, bank, first, index, seed, count, threads);
          const py::gil_scoped_release release;
          sampled_dot_backward(p, grad, array(dx), array(d_bank));
        });
  m.def("patchmix", [](const Array& x, const Array& groups,
                       const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, int threads,
                       const Array& out) {
    const auto& [planes, down, lines, across, piece] = sizes;
    const PatchMixProblem p{x, groups, planes, down, lines, across, piece, threads};
    const py::gil_scoped_release release;
    patchmix(p, out);
  });
  m.def("soft_assign_forward",
        [](const AssignTuple& problem, int threads, const Array& codes, const MaybeArray& lse,
           const MaybeArray& soft, const MaybeArray& usage, const MaybeArray& purity) {
          const SoftAssignProblem p = assign_problem(problem, threads);
          const SoftAssignResult r{codes, array(lse), array(soft), array(usage), array(purity)};
          const py::gil_scoped_release release;
          soft_assign_forward(p, r);
        });
  m.def("soft_assign_backward",
        [](const AssignTuple& problem, int threads, const FourArrays& in, const MaybeArray& lse,
           const Array& codes, bool straight_through, const FourArrays& out) {
          const SoftAssignProblem p = assign_problem(problem, threads);
          const auto& [soft, hard, usage, purity] = in;
          const auto& [rows, keys, bias, codebook] = out;
          const SoftAssignUpstream u{array(soft), array(hard), array(usage), array(purity), array(lse), codes,
                                     straight_through};
          const SoftAssignGradient g{array(rows), array(keys), array(bias), array(codebook)};
          const py::gil_scoped_release release;
          soft_assign_backward(p, u, g);
        });
  m.def("assign_plan",
        [](int64_t n, int64_t books, int64_t words, int64_t sum_bytes, int64_t item_bytes, int threads) {
          const AssignPlan p = assign_plan(n, books, words, sum_bytes, item_bytes, threads);
          return std::tuple{p.words, p.ranges, p.range_rows, p.by_words, p.sum_words};
        });
  m.def("sweep_plan", [](int64_t n, int64_t m, int64_t d, int64_t item_bytes, int threads, int64_t centers) {
    const SweepPlan p = sweep_plan(n, m, d, item_bytes, threads, centers);
    return std::tuple{p.rows, p.col_block, p.keep};
  });

  m.def("plan", [](int64_t n, int64_t m, bool symmetric, int threads) {
    const Plan p = plan(n, m, symmetric, threads);
    return std::pair{p.row_block, p.col_block};
  });
  m.def("window", [](int64_t n, int64_t m, int64_t d, int64_t item_bytes, int threads) {
    return window(m, d * item_bytes, plan(n, m, false, threads), threads);
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
