// pair_dot works from the rows as they lie, widened one at a time: there is no packed copy. Forward goes through the
// list in pieces, backward row by row, each row's pairs in the order of the list: one writer a row, the same sum in
// every run and with any number of threads.
#include "pair_dot.h"

#include <type_traits>

#include "pack.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// T: what is computed in, S: what rows are stored as.
template <class T, class S> class PairDot {
 public:
  explicit PairDot(const PairDotWork& w) : w_(w), p_(w.problem), d_(p_.x.cols) {}

  void forward(T* scores) const {
    constexpr int64_t kPiece = 256;
    const int64_t pairs = p_.row.cols, *row = p_.row.as<int64_t>(), *column = p_.column.as<int64_t>();
#pragma omp parallel num_threads(p_.threads)
    {
      const Space space(w_, d_);
      norms(space);
#pragma omp for schedule(static)
      for (int64_t b = 0; b < (pairs + kPiece - 1) / kPiece; ++b) {
        int64_t held = -1;  // the row that space.unit is made of
        for (int64_t p = b * kPiece; p < std::min(pairs, (b + 1) * kPiece); ++p) {
          if (row[p] != held) unit(p_.x, x_norm(), row[p], space.unit);
          held = row[p];
          const T raw = dot(space.unit, wide(p_.y, column[p], space.other), d_);
          scores[p] = p_.normalize ? raw / y_norm()[column[p]] : raw;  // no larger than the norm: cannot overflow
        }
      }
    }
  }

  void backward(const T* grad, const Array& dx, const Array& dy) const {
#pragma omp parallel num_threads(p_.threads)
    {
      const Space space(w_, d_);
      norms(space);
      const Side by_row{w_.by_row, p_.column.as<int64_t>(), p_.y, y_norm()};
      const Side by_column{w_.by_column, p_.row.as<int64_t>(), p_.x, x_norm()};
      // which thread takes a row changes nothing, and rows have unequal numbers of pairs
      if (dx.data) {
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < p_.x.rows; ++i) {
          std::fill(space.sum, space.sum + d_, T(0));
          add(by_row, i, grad, space);
          if (p_.symmetric) add(by_column, i, grad, space);
          deliver(p_.x, x_norm(), i, dx, space);
        }
      }
      if (dy.data) {
#pragma omp for schedule(dynamic, 16)
        for (int64_t j = 0; j < p_.y.rows; ++j) {
          std::fill(space.sum, space.sum + d_, T(0));
          add(by_column, j, grad, space);
          deliver(p_.y, y_norm(), j, dy, space);
        }
      }
    }
  }

 private:
  // One row each.
  struct Space {
    T *unit, *other, *sum;
    Space(const PairDotWork& w, int64_t d)
        : unit(static_cast<T*>(w.threads) + thread_number() * w.thread_elements), other(unit + d), sum(other + d) {}
  };
  // Pairs of the rows that receive a gradient, and the other row of each pair.
  struct Side {
    const Groups& groups;
    const int64_t* partner;
    const Array& rows;
    const T* norm;
  };

  const T* x_norm() const { return static_cast<const T*>(w_.x_norm); }
  const T* y_norm() const { return static_cast<const T*>(w_.y_norm); }

  void norms(const Space& space) const {
    if (!p_.normalize) return;
    norms_of(p_.x, static_cast<T*>(w_.x_norm), space.other);
    if (!p_.symmetric) norms_of(p_.y, static_cast<T*>(w_.y_norm), space.other);
  }

  void norms_of(const Array& a, T* out, T* buffer) const {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.rows; ++i) {
      const T norm = norm_of(wide(a, i, buffer), d_);
      out[i] = norm < T(kNormEps) ? T(kNormEps) : norm;
    }
  }

  // Row i where it lies, or widened into the buffer.
  const T* wide(const Array& a, int64_t i, T* buffer) const {
    const S* row = a.as<S>() + i * a.stride;
    if constexpr (std::is_same_v<S, T>) return row;
    for (int64_t k = 0; k < d_; ++k) buffer[k] = widen(row[k]);
    return buffer;
  }

  void unit(const Array& a, const T* norm, int64_t i, T* out) const {
    const T *row = wide(a, i, out), divisor = p_.normalize ? norm[i] : T(1);
    for (int64_t k = 0; k < d_; ++k) out[k] = row[k] / divisor;
  }

  void add(const Side& side, int64_t i, const T* grad, const Space& space) const {
    for (int64_t k = side.groups.start[i]; k < side.groups.start[i + 1]; ++k) {
      const int64_t p = side.groups.item(k), other = side.partner[p];
      const T *row = wide(side.rows, other, space.other), inverse = p_.normalize ? T(1) / side.norm[other] : T(1);
      const T g = grad[p];  // not g * inverse, which may underflow
      for (int64_t c = 0; c < d_; ++c) space.sum[c] += row[c] * inverse * g;
    }
  }

  void deliver(const Array& rows, const T* norm, int64_t i, const Array& out, const Space& space) const {
    if (p_.normalize) {
      unit(rows, norm, i, space.unit);
      project_row(space.sum, space.unit, norm[i], d_);
    }
    S* to = out.as<S>() + i * out.stride;
    for (int64_t k = 0; k < d_; ++k) narrow(space.sum[k], to[k]);
  }

  const PairDotWork& w_;
  const PairDotProblem& p_;
  const int64_t d_;
};

template <class T, class Visit> void with_kernel(const PairDotWork& w, Visit visit) {
  with_type<T>(w.problem.x, [&](auto* data) { visit(PairDot<T, std::remove_pointer_t<decltype(data)>>(w)); });
}
template <class T> void forward(const PairDotWork& w, const Array& scores) {
  with_kernel<T>(w, [&](const auto& kernel) { kernel.forward(scores.as<T>()); });
}
template <class T> void backward(const PairDotWork& w, const Array& grad, const Array& dx, const Array& dy) {
  with_kernel<T>(w, [&](const auto& kernel) { kernel.backward(grad.as<T>(), dx, dy); });
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
PairDotKernels pair_dot_kernels(bool doubles) {
  return doubles ? PairDotKernels{forward<double>, backward<double>} : PairDotKernels{forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
