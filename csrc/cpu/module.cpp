// fastret._C: the only pybind11 file. Tensors come as plain tuples of integers, so that nothing here depends on
// PyTorch's headers or ABI; every tuple is checked against the sizes it states before a pointer is used.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

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

namespace py = pybind11;

namespace {

using namespace fastret;

// (address, rows, cols, row stride, dtype code, bytes that may be touched); see fastret/backends/cpu/array.py
using ArrayTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int, int64_t>;

Array array(const ArrayTuple& t) {
  const auto& [address, rows, cols, stride, dtype, bytes] = t;
  require(dtype >= 0 && dtype <= static_cast<int>(DType::u16), "dtype", "unknown code " + std::to_string(dtype));
  return {reinterpret_cast<void*>(address), rows, cols, stride, static_cast<DType>(dtype), bytes};
}
Array array(const std::optional<ArrayTuple>& t) { return t ? array(*t) : Array{}; }

RankSumsProblem problem(const ArrayTuple& x, const std::optional<ArrayTuple>& y, const ArrayTuple& order,
                        const ArrayTuple& start, const ArrayTuple& count, bool exclude_self, bool normalize,
                        double temperature, int threads) {
  return {array(x),     array(y ? *y : x), array(order), array(start), array(count),
          !y.has_value(), exclude_self,      normalize,    temperature,  threads};
}

using MaybeArray = std::optional<ArrayTuple>;
using Relation = std::optional<std::pair<ArrayTuple, ArrayTuple>>;
// same, different, distinct, offset, period (0: none), above, below
using MaskTuple = std::tuple<Relation, Relation, Relation, std::optional<int64_t>, int64_t, MaybeArray, MaybeArray>;
// kind, index, offsets, shifts, weights, base, period, mask, weight, dense, factor, uniform; see PairTarget
using TargetTuple = std::tuple<int, MaybeArray, MaybeArray, std::vector<int64_t>, std::vector<double>, int64_t, int64_t,
                               MaskTuple, MaybeArray, MaybeArray, double, double>;
// scale, whether over columns, mask, target, row bias, column bias, reduction
using HeadTuple = std::tuple<double, bool, MaskTuple, TargetTuple, MaybeArray, MaybeArray, int>;
using LevelTuple = std::pair<int64_t, int64_t>;  // width, number of heads
using CentersTuple = std::pair<int64_t, double>;  // count, temperature or 0
using GradientTuple = std::tuple<MaybeArray, MaybeArray, MaybeArray>;  // scale, row bias, column bias

PairMask::Relation relation(const Relation& r) {
  return r ? PairMask::Relation{array(r->first), array(r->second)} : PairMask::Relation{};
}

PairMask mask(const MaskTuple& t) {
  const auto& [same, different, distinct, offset, period, above, below] = t;
  return {relation(same), relation(different), relation(distinct), offset.has_value(),
          offset.value_or(0), period, array(above), array(below)};
}

LseHead head(const HeadTuple& t) {
  const auto& [scale, column, head_mask, target, row_bias, col_bias, reduction] = t;
  const auto& [kind, index, offsets, shifts, weights, base, period, target_mask, weight, dense, factor, uniform] = target;
  return {scale, column, mask(head_mask),
          {static_cast<PairTarget::Kind>(kind), array(index), array(offsets), shifts, weights, base, period,
           mask(target_mask), array(weight), array(dense), factor, uniform},
          array(row_bias), array(col_bias), static_cast<Reduction>(reduction)};
}

LseGradient gradient(const GradientTuple& t) {
  const auto& [scale, row_bias, col_bias] = t;
  return {array(scale), array(row_bias), array(col_bias)};
}

MaskedLseProblem lse_problem(const ArrayTuple& x, const MaybeArray& y, const std::vector<HeadTuple>& heads,
                             bool normalize, int64_t first_column, int threads,
                             const std::vector<LevelTuple>& levels = {}, const CentersTuple& centers = {1, 0}) {
  MaskedLseProblem p{array(x), array(y ? *y : x), !y.has_value(), normalize, first_column, threads, {}, {},
                     {centers.first, centers.second}};
  for (const HeadTuple& h : heads) p.heads.push_back(head(h));
  for (const auto& [width, count] : levels) p.levels.push_back({width, count});
  return p;
}

PairDotProblem pair_problem(const ArrayTuple& x, const MaybeArray& y, const ArrayTuple& row, const ArrayTuple& column,
                            bool normalize, int threads) {
  return {array(x), array(y ? *y : x), array(row), array(column), !y.has_value(), normalize, threads};
}

// x, bank, first, index, seed, count, threads
SampledDotProblem sampled_problem(const ArrayTuple& x, const ArrayTuple& bank, const MaybeArray& first,
                                  const MaybeArray& index, uint64_t seed, int64_t count, int threads) {
  return {array(x), array(bank), array(first), array(index), seed, count, threads};
}

// x, keys, bias, logits, codebook, books
using AssignTuple = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray, ArrayTuple, int64_t>;
using FourArrays = std::tuple<MaybeArray, MaybeArray, MaybeArray, MaybeArray>;

SoftAssignProblem assign_problem(const AssignTuple& t, int threads) {
  const auto& [x, keys, bias, logits, codebook, books] = t;
  return {array(x), array(keys), array(bias), array(logits), array(codebook), books, threads};
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

  m.def("masked_lse_forward",
        [](const ArrayTuple& x, const MaybeArray& y, const std::vector<HeadTuple>& heads,
           const std::vector<LevelTuple>& levels, bool normalize, int64_t first_column, int threads,
           const std::vector<std::pair<ArrayTuple, ArrayTuple>>& results, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, heads, normalize, first_column, threads, levels, centers);
          std::vector<LseResult> out;
          for (const auto& [lse, t] : results) out.push_back({array(lse), array(t)});
          const py::gil_scoped_release release;
          masked_lse_forward(p, out);
        });
  m.def("masked_lse_backward",
        [](const ArrayTuple& x, const MaybeArray& y, const std::vector<HeadTuple>& heads,
           const std::vector<LevelTuple>& levels, bool normalize, int64_t first_column, int threads,
           const std::vector<std::tuple<ArrayTuple, MaybeArray, MaybeArray>>& upstream, const MaybeArray& dx,
           const MaybeArray& dy, const std::vector<GradientTuple>& gradients, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, heads, normalize, first_column, threads, levels, centers);
          std::vector<LseUpstream> in;
          for (const auto& [lse, grad_lse, grad_t] : upstream)
            in.push_back({array(lse), array(grad_lse), array(grad_t)});
          std::vector<LseGradient> out;
          for (const GradientTuple& g : gradients) out.push_back(gradient(g));
          const py::gil_scoped_release release;
          masked_lse_backward(p, in, array(dx), array(dy), out);
        });
  m.def("masked_lse_sweep",
        [](const ArrayTuple& x, const MaybeArray& y, const HeadTuple& h, bool normalize, int64_t first_column,
           int threads, const ArrayTuple& weight, const ArrayTuple& lse, const ArrayTuple& t, const MaybeArray& dx,
           const MaybeArray& dy, const GradientTuple& g, const CentersTuple& centers) {
          const MaskedLseProblem p = lse_problem(x, y, {h}, normalize, first_column, threads, {}, centers);
          const LseResult result{array(lse), array(t)};
          const LseGradient out = gradient(g);
          const py::gil_scoped_release release;
          masked_lse_sweep(p, array(weight), result, array(dx), array(dy), out);
        });
  m.def("row_extrema",
        [](const ArrayTuple& x, const MaybeArray& y, const std::vector<std::tuple<bool, MaskTuple>>& extrema,
           bool normalize, int64_t first_column, int threads,
           const std::vector<std::pair<ArrayTuple, ArrayTuple>>& results) {
          require(results.size() == extrema.size(), "results", "expected one an extremum");
          const MaskedLseProblem p = lse_problem(x, y, {}, normalize, first_column, threads);
          std::vector<Extremum> wanted;
          for (size_t k = 0; k < extrema.size(); ++k) {
            const auto& [greatest, allowed] = extrema[k];
            wanted.push_back({greatest, mask(allowed), array(results[k].first), array(results[k].second)});
          }
          const py::gil_scoped_release release;
          row_extrema(p, wanted);
        });
  m.def("pair_dot_forward", [](const ArrayTuple& x, const MaybeArray& y, const ArrayTuple& row,
                               const ArrayTuple& column, bool normalize, int threads, const ArrayTuple& scores) {
    const PairDotProblem p = pair_problem(x, y, row, column, normalize, threads);
    const py::gil_scoped_release release;
    pair_dot_forward(p, array(scores));
  });
  m.def("pair_dot_backward",
        [](const ArrayTuple& x, const MaybeArray& y, const ArrayTuple& row, const ArrayTuple& column, bool normalize,
           int threads, const ArrayTuple& grad, const MaybeArray& dx, const MaybeArray& dy) {
          const PairDotProblem p = pair_problem(x, y, row, column, normalize, threads);
          const py::gil_scoped_release release;
          pair_dot_backward(p, array(grad), array(dx), array(dy));
        });
  m.def("segment_mean_forward", [](const ArrayTuple& x, const ArrayTuple& index, bool mean, int threads,
                                   const ArrayTuple& result, const ArrayTuple& counts) {
    const SegmentMeanProblem p{array(index), mean, threads};
    const py::gil_scoped_release release;
    segment_mean_forward(p, array(x), array(result), array(counts));
  });
  m.def("segment_mean_backward", [](const ArrayTuple& grad, const ArrayTuple& index, const ArrayTuple& counts,
                                    bool mean, int threads, const ArrayTuple& dx) {
    const SegmentMeanProblem p{array(index), mean, threads};
    const py::gil_scoped_release release;
    segment_mean_backward(p, array(grad), array(counts), array(dx));
  });
  m.def("topk", [](const ArrayTuple& x, const ArrayTuple& y, int64_t k, const MaskTuple& allowed, int metric,
                   int64_t first_column, int threads, const ArrayTuple& scores, const ArrayTuple& indices) {
    require(metric >= 0 && metric <= static_cast<int>(TopkMetric::l2), "metric", "unknown kind");
    const TopkProblem p{array(x), array(y), k, mask(allowed), static_cast<TopkMetric>(metric), first_column, threads};
    const py::gil_scoped_release release;
    topk(p, array(scores), array(indices));
  });
  m.def("topk_plan", [](int64_t n, int64_t m, int64_t k, int64_t key_bytes, int threads) {
    const TopkPlan p = topk_plan(n, m, k, key_bytes, threads);
    return std::tuple{p.row_block, p.parts, p.part_cols, p.capacity};
  });
  m.def("pq_topk", [](const ArrayTuple& query, const ArrayTuple& codebook, const ArrayTuple& codes, int64_t words,
                      int64_t k, int metric, int64_t first_index, bool half_tables, int threads,
                      const ArrayTuple& scores, const ArrayTuple& indices) {
    require(metric >= 0 && metric <= static_cast<int>(PqMetric::dot), "metric", "unknown kind");
    const PqTopkProblem p{array(query), array(codebook), array(codes), words, k, static_cast<PqMetric>(metric),
                          first_index, half_tables, threads};
    const py::gil_scoped_release release;
    pq_topk(p, array(scores), array(indices));
  });
  m.def("pq_topk_plan", [](int64_t groups, int64_t n, int64_t words, int64_t k, int threads) {
    const PqTopkPlan p = pq_topk_plan(groups, n, words, k, threads);
    return std::tuple{p.parts, p.part_rows, p.capacity};
  });
  m.def("sampled_dot_forward",
        [](const ArrayTuple& x, const ArrayTuple& bank, const MaybeArray& first, const MaybeArray& index, uint64_t seed,
           int64_t count, int threads, const ArrayTuple& scores) {
          const SampledDotProblem p = sampled_problem(x, bank, first, index, seed, count, threads);
          const py::gil_scoped_release release;
          sampled_dot_forward(p, array(scores));
        });
  m.def("sampled_dot_backward",
        [](const ArrayTuple& x, const ArrayTuple& bank, const MaybeArray& first, const MaybeArray& index, uint64_t seed,
           int64_t count, int threads, const ArrayTuple& grad, const MaybeArray& dx, const MaybeArray& d_bank) {
          const SampledDotProblem p = sampled_problem(x, bank, first, index, seed, count, threads);
          const py::gil_scoped_release release;
          sampled_dot_backward(p, array(grad), array(dx), array(d_bank));
        });
  m.def("patchmix", [](const ArrayTuple& x, const ArrayTuple& groups,
                       const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, int threads,
                       const ArrayTuple& out) {
    const auto& [planes, down, lines, across, piece] = sizes;
    const PatchMixProblem p{array(x), array(groups), planes, down, lines, across, piece, threads};
    const py::gil_scoped_release release;
    patchmix(p, array(out));
  });
  m.def("soft_assign_forward",
        [](const AssignTuple& problem, int threads, const ArrayTuple& codes, const MaybeArray& lse,
           const MaybeArray& soft, const MaybeArray& usage, const MaybeArray& purity) {
          const SoftAssignProblem p = assign_problem(problem, threads);
          const SoftAssignResult r{array(codes), array(lse), array(soft), array(usage), array(purity)};
          const py::gil_scoped_release release;
          soft_assign_forward(p, r);
        });
  m.def("soft_assign_backward",
        [](const AssignTuple& problem, int threads, const FourArrays& in, const MaybeArray& lse,
           const ArrayTuple& codes, bool straight_through, const FourArrays& out) {
          const SoftAssignProblem p = assign_problem(problem, threads);
          const auto& [soft, hard, usage, purity] = in;
          const auto& [rows, keys, bias, codebook] = out;
          const SoftAssignUpstream u{array(soft),   array(hard), array(usage),    array(purity),
                                     array(lse),    array(codes), straight_through};
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
