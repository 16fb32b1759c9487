// segment_mean: a thread owns whole segments, or slices of their features, and adds their rows one after the other: one
// writer a result, the same sum in every run and with any number of threads.
#include "segment_mean.h"

#include <type_traits>

#include "pack.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// T: results, S: what rows are stored as. Sums are of doubles: of a million floats they keep every digit.
template <class T, class S> void forward_rows(const SegmentMeanWork& w, const Array& x, const Array& result) {
  const int64_t d = x.cols, segments = result.rows, slices = (d + w.slice - 1) / w.slice;
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(S);  // rows asked for early: they lie anywhere, 5x as slow without
  const S* rows = x.as<S>();
#pragma omp parallel num_threads(w.problem.threads)
  {
    double* const sums = w.threads + thread_number() * w.slice;
    // which thread takes a segment changes nothing, and segments have unequal numbers of rows
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < segments * slices; ++task) {
      const int64_t s = task / slices, begin = task % slices * w.slice, width = std::min(w.slice, d - begin);
      const int64_t first = w.rows.start[s], last = w.rows.start[s + 1];
      std::fill(sums, sums + width, 0.0);
      for (int64_t k = first; k < last; ++k) {
        if (w.rows.order && k + kAhead < w.rows.start[segments]) {
          const S* next = rows + w.rows.order[k + kAhead] * x.stride + begin;
          for (int64_t c = 0; c < width; c += kLine) __builtin_prefetch(next + c);
        }
        const S* row = rows + w.rows.item(k) * x.stride + begin;
        for (int64_t c = 0; c < width; ++c) sums[c] += double(widen(row[c]));
      }
      const double divisor = w.problem.mean ? double(std::max<int64_t>(1, last - first)) : 1.0;
      T* to = result.as<T>() + s * result.stride + begin;
      for (int64_t c = 0; c < width; ++c) to[c] = T(sums[c] / divisor);
    }
  }
}

template <class T, class S>
void backward_rows(const SegmentMeanProblem& p, const Array& grad, const Array& counts, const Array& dx) {
  const int64_t d = dx.cols, *index = p.index.as<int64_t>(), *count = counts.as<int64_t>();
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t i = 0; i < dx.rows; ++i) {
    S* to = dx.as<S>() + i * dx.stride;
    const int64_t s = index[i];
    if (s < 0) {
      std::fill(to, to + d, S{});
      continue;
    }
    const T *from = grad.as<T>() + s * grad.stride, divisor = p.mean ? T(count[s]) : T(1);
    for (int64_t c = 0; c < d; ++c) narrow(from[c] / divisor, to[c]);
  }
}

template <class T> void forward(const SegmentMeanWork& w, const Array& x, const Array& result) {
  with_type<T>(x, [&](auto* data) { forward_rows<T, std::remove_pointer_t<decltype(data)>>(w, x, result); });
}
template <class T>
void backward(const SegmentMeanProblem& p, const Array& grad, const Array& counts, const Array& dx) {
  with_type<T>(dx, [&](auto* data) { backward_rows<T, std::remove_pointer_t<decltype(data)>>(p, grad, counts, dx); });
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
SegmentMeanKernels segment_mean_kernels(bool doubles) {
  return doubles ? SegmentMeanKernels{forward<double>, backward<double>}
                 : SegmentMeanKernels{forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
