// The process's own BLAS (the sgemm_/dgemm_ that PyTorch's CPU library carries), found at run time, never linked.
#pragma once
#include <cstdint>

namespace fastret {

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
using Dgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                       const int*, const double*, const int*, const double*, double*, const int*);

struct Blas {
  Sgemm sgemm = nullptr;
  Dgemm dgemm = nullptr;
  int (*set_threads_local)(int) = nullptr;  // MKL: threads of calls from this thread; returns the old value

  template <class T> bool available() const;
};
template <> inline bool Blas::available<float>() const { return sgemm != nullptr; }
template <> inline bool Blas::available<double>() const { return dgemm != nullptr; }

Blas& blas();                                                            // the one in use; empty until set
void set_blas(uintptr_t sgemm, uintptr_t dgemm, uintptr_t set_threads);  // self-tested; throws if it is wrong

// BLAS calls of this thread run on this thread alone while the object lives.
class SerialBlas {
 public:
  SerialBlas() : old_(blas().set_threads_local ? blas().set_threads_local(1) : 0) {}
  ~SerialBlas() {
    if (blas().set_threads_local) blas().set_threads_local(old_);
  }
  SerialBlas(const SerialBlas&) = delete;

 private:
  int old_;
};

}  // namespace fastret
