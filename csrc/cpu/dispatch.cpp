// Chooses the instruction set and the multiplier of tiles: by processor, by environment variable, or as told.
#include <cstdlib>
#include <stdexcept>

#include "blas.h"
#include "masked_lse.h"
#include "pair_dot.h"
#include "pq_topk.h"
#include "rank_sums.h"
#include "sampled_dot.h"
#include "segment_mean.h"
#include "settings.h"
#include "soft_assign.h"
#include "topk.h"

namespace fastret {
namespace {

#if defined(__x86_64__)
bool is_intel() { return __builtin_cpu_is("intel"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

std::string from_environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

Settings initial_settings() {
  Settings s;
  s.isa = supported_isas().back();
  return s;
}

// The micro-kernel beats MKL by 2x on AMD with AVX-512 (MKL takes its AVX2 path there) and equals it with AVX2; on
// Intel MKL is 1.6x faster, and plain SSE2 code is slower everywhere.
bool blas_by_processor() {
  if (settings().isa == "base") return true;
#if defined(__x86_64__)
  return is_intel();
#else
  return true;
#endif
}

}  // namespace

Settings& settings() {
  static Settings instance = initial_settings();
  return instance;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas{"base"};
#if defined(__x86_64__)
  if (has_avx2()) isas.push_back("avx2");
  if (has_avx512()) isas.push_back("avx512");
#endif
  return isas;
}

void set_isa(const std::string& name) {
  const std::vector<std::string> isas = supported_isas();
  const std::string wanted = name.empty() ? from_environment("FASTRET_ISA") : name;
  if (wanted.empty()) {
    settings().isa = isas.back();
    return;
  }
  for (const std::string& isa : isas)
    if (isa == wanted) {
      settings().isa = isa;
      return;
    }
  std::string known;
  for (const std::string& isa : isas) known += " " + isa;
  throw std::invalid_argument("FASTRET_ISA: this processor runs" + known + ", not '" + wanted + "'");
}

void set_gemm(const std::string& name) {
  const std::string wanted = name.empty() ? from_environment("FASTRET_GEMM") : name;
  if (!wanted.empty() && wanted != "own" && wanted != "blas")
    throw std::invalid_argument("FASTRET_GEMM: expected own or blas, got '" + wanted + "'");
  if (wanted == "blas" && !blas().available<float>())
    throw std::invalid_argument("FASTRET_GEMM: no BLAS was found in this process");
  settings().use_blas = wanted.empty() ? blas_by_processor() : wanted == "blas";
}

#if defined(__x86_64__)
#define FASTRET_OF_ISA(call)                          \
  if (settings().isa == "avx512") return avx512::call; \
  if (settings().isa == "avx2") return avx2::call;     \
  return base::call
#else
#define FASTRET_OF_ISA(call) return base::call
#endif

RankSumsKernels rank_sums_kernels(bool doubles) { FASTRET_OF_ISA(rank_sums_kernels(doubles)); }
MaskedLseKernels masked_lse_kernels(bool doubles) { FASTRET_OF_ISA(masked_lse_kernels(doubles)); }
MaskedLseSweep masked_lse_sweep_kernel(bool doubles) { FASTRET_OF_ISA(masked_lse_sweep_kernel(doubles)); }
PairDotKernels pair_dot_kernels(bool doubles) { FASTRET_OF_ISA(pair_dot_kernels(doubles)); }
SegmentMeanKernels segment_mean_kernels(bool doubles) { FASTRET_OF_ISA(segment_mean_kernels(doubles)); }
SampledDotKernels sampled_dot_kernels(bool doubles) { FASTRET_OF_ISA(sampled_dot_kernels(doubles)); }
SoftAssignKernels soft_assign_kernels(bool doubles) { FASTRET_OF_ISA(soft_assign_kernels(doubles)); }
TopkKernels topk_kernels(bool doubles) { FASTRET_OF_ISA(topk_kernels(doubles)); }
PqTopkKernels pq_topk_kernels(bool doubles) { FASTRET_OF_ISA(pq_topk_kernels(doubles)); }

}  // namespace fastret
