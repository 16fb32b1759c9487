// sampled_dot reads rows of the bank where they lie, which is anywhere: each is asked for a few rows ahead. Columns are
// known, or drawn, a piece at a time. A row of dx, and a row of d_bank, has one writer, who adds in the order of the
// columns: the same sum in every run and with any number of threads.
#include "sampled_dot.h"

#include <type_traits>

#include "../common/philox.h"
#include "pack.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// T: what is computed in, X and B: what rows are stored as.
template <class T, class X, class B> class SampledDot {
 public:
  explicit SampledDot(const SampledDotWork& w) : w_(w), p_(w.problem), d_(p_.x.cols), columns_(p_.columns()) {}

  void forward(const Array& scores) const {
    const int64_t pieces = (columns_ + kPiece - 1) / kPiece;
#pragma omp parallel num_threads(p_.threads)
    {
      const Space space(w_, d_);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < p_.x.rows * pieces; ++task) {
        const int64_t i = task / pieces, begin = task % pieces * kPiece, end = std::min(columns_, begin + kPiece);
        const T* x = wide(p_.x.as<X>() + i * p_.x.stride, space.x);
        T* to = scores.as<T>() + i * scores.stride + begin;
        for_rows(i, begin, end, space, [&](int64_t k, const T* row) { to[k] = dot(x, row, d_); });
      }
    }
  }

  void backward(const Array& grad, const Array& dx, const Array& d_bank) const {
#pragma omp parallel num_threads(p_.threads)
    {
      const Space space(w_, d_);
      if (dx.data) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p_.x.rows; ++i) row_gradient(i, grad, dx, space);
      }
      if (d_bank.data) bank_gradient(grad, d_bank, space);
    }
  }

 private:
  static constexpr int64_t kPiece = 256, kAhead = 8, kLine = 64 / sizeof(B);

  struct Space {
    T *x, *row, *sum;
    int64_t* columns;
    Space(const SampledDotWork& w, int64_t d) {
      char* base = w.threads + thread_number() * w.thread_bytes;
      const int64_t bytes = (d * int64_t(sizeof(T)) + 63) / 64 * 64;
      x = reinterpret_cast<T*>(base);
      row = reinterpret_cast<T*>(base + bytes);
      sum = reinterpret_cast<T*>(base + 2 * bytes);
      columns = reinterpret_cast<int64_t*>(base + 3 * bytes);
    }
  };

  // A row where it lies, or widened into the buffer.
  template <class S> const T* wide(const S* row, T* buffer) const {
    if constexpr (std::is_same_v<S, T>) return row;
    else {
      for (int64_t c = 0; c < d_; ++c) buffer[c] = widen(row[c]);
      return buffer;
    }
  }

  // Columns begin .. end - 1 of row i.
  void find_columns(int64_t i, int64_t begin, int64_t end, int64_t* out) const {
    if (begin < p_.own() && begin < end) {
      *out++ = p_.first.as<int64_t>()[i];
      ++begin;
    }
    const int64_t from = begin - p_.own(), to = end - p_.own();
    if (!p_.draws()) {
      const int64_t* index = p_.index.as<int64_t>() + i * p_.index.stride;
      std::copy(index + from, index + to, out);
      return;
    }
    const uint64_t size = uint64_t(p_.bank.rows);
    for (int64_t k = from; k < to;) {
      const PhiloxWords drawn = philox(uint32_t(k / 4), uint32_t(i), p_.seed);
      for (int64_t lane = k % 4; lane < 4 && k < to; ++lane, ++k) *out++ = int64_t(drawn.word[lane] * size >> 32);
    }
  }

  void ask_for(int64_t column) const {
    const B* row = p_.bank.as<B>() + column * p_.bank.stride;
    for (int64_t c = 0; c < d_; c += kLine) __builtin_prefetch(row + c);
  }

  // Calls visit(k, row) for the columns begin + k < end of row i; no more than kPiece.
  template <class Visit> void for_rows(int64_t i, int64_t begin, int64_t end, const Space& space, Visit visit) const {
    const int64_t count = end - begin;
    find_columns(i, begin, end, space.columns);
    for (int64_t k = 0; k < std::min(kAhead, count); ++k) ask_for(space.columns[k]);
    for (int64_t k = 0; k < count; ++k) {
      if (k + kAhead < count) ask_for(space.columns[k + kAhead]);
      visit(k, wide(p_.bank.as<B>() + space.columns[k] * p_.bank.stride, space.row));
    }
  }

  void row_gradient(int64_t i, const Array& grad, const Array& dx, const Space& space) const {
    std::fill(space.sum, space.sum + d_, T(0));
    for (int64_t begin = 0; begin < columns_; begin += kPiece) {
      const T* g = grad.as<T>() + i * grad.stride + begin;
      for_rows(i, begin, std::min(columns_, begin + kPiece), space, [&](int64_t k, const T* row) {
        const T weight = g[k];
        for (int64_t c = 0; c < d_; ++c) space.sum[c] += weight * row[c];
      });
    }
    X* to = dx.as<X>() + i * dx.stride;
    for (int64_t c = 0; c < d_; ++c) narrow(space.sum[c], to[c]);
  }

  // A thread owns a range of the bank, and goes through the columns of all rows.
  void bank_gradient(const Array& grad, const Array& d_bank, const Space& space) const {
    const int64_t team = team_size(), each = (p_.bank.rows + team - 1) / team;
    const int64_t low = std::min(p_.bank.rows, thread_number() * each), high = std::min(p_.bank.rows, low + each);
    for (int64_t j = low; j < high; ++j) {
      T* row = d_bank.as<T>() + j * d_bank.stride;
      std::fill(row, row + d_, T(0));
    }
    for (int64_t i = 0; i < p_.x.rows; ++i) {
      const T* x = wide(p_.x.as<X>() + i * p_.x.stride, space.x);
      for (int64_t begin = 0; begin < columns_; begin += kPiece) {
        const int64_t end = std::min(columns_, begin + kPiece);
        const T* g = grad.as<T>() + i * grad.stride + begin;
        find_columns(i, begin, end, space.columns);
        for (int64_t k = 0; k < end - begin; ++k) {
          if (space.columns[k] < low || space.columns[k] >= high) continue;
          T* row = d_bank.as<T>() + space.columns[k] * d_bank.stride;
          for (int64_t c = 0; c < d_; ++c) row[c] += g[k] * x[c];
        }
      }
    }
  }

  const SampledDotWork& w_;
  const SampledDotProblem& p_;
  const int64_t d_, columns_;
};

template <class T, class Visit> void with_kernel(const SampledDotWork& w, Visit visit) {
  with_type<T>(w.problem.x, [&](auto* x) {
    with_type<T>(w.problem.bank, [&](auto* bank) {
      visit(SampledDot<T, std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(bank)>>(w));
    });
  });
}
template <class T> void forward(const SampledDotWork& w, const Array& scores) {
  with_kernel<T>(w, [&](const auto& kernel) { kernel.forward(scores); });
}
template <class T>
void backward(const SampledDotWork& w, const Array& grad, const Array& dx, const Array& d_bank) {
  with_kernel<T>(w, [&](const auto& kernel) { kernel.backward(grad, dx, d_bank); });
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
SampledDotKernels sampled_dot_kernels(bool doubles) {
  return doubles ? SampledDotKernels{forward<double>, backward<double>}
                 : SampledDotKernels{forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
