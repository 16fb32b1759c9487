// soft_assign on the CPU. soft_assign_setup.cpp checks and allocates; soft_assign.cpp, once per instruction set,
// computes. The definition, and which result and gradient is there when, is at the top of fastret/ops/soft_assign.py.
#pragma once
#include "../common/array.h"
#include "../common/plan.h"

namespace fastret {

// Rows of x, logits, soft and their gradients are of one type, all else of the type sums are kept in.
struct SoftAssignProblem {
  Array x;           // (N, M E), with keys
  Array keys, bias;  // (M K, E), (M, K) or no data; no keys: logits are given
  Array logits;      // (N, M K)
  Array codebook;    // (M K, L)
  int64_t books = 1;
  int threads = 1;

  const Array& rows() const { return keys.data ? x : logits; }
  int64_t words() const { return codebook.rows / books; }
};

struct SoftAssignResult {
  Array codes;         // int64 (N, M)
  Array lse;           // (N, M), where any of the following is wanted
  Array soft;          // (N, M L)
  Array usage, purity;  // (M, K), (N, M)
};
struct SoftAssignUpstream {
  Array soft, hard, usage, purity;  // no data: zero
  Array lse, codes;                 // lse: no data where only hard arrives, for the codebook alone
  bool straight_through = false;
};
struct SoftAssignGradient {
  Array rows;                  // of x, or of the logits; no data: no gradient of the scores is wanted
  Array keys, bias, codebook;  // keys, bias: there where rows is and they are
};

void soft_assign_forward(const SoftAssignProblem&, const SoftAssignResult&);
void soft_assign_backward(const SoftAssignProblem&, const SoftAssignUpstream&, const SoftAssignGradient&);

struct SoftAssignWork {
  const SoftAssignProblem& problem;
  AssignPlan plan;
  void* sums = nullptr;     // of each range but the first: sums over its rows, in the order of the outputs
  int64_t range_sums = 0;   // elements of these a range
  void* dots = nullptr;     // backward, by_words: (M, N) sums over words of p p'
  char* threads = nullptr;  // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct SoftAssignKernels {
  int64_t (*thread_bytes)(const SoftAssignWork&);
  void (*forward)(const SoftAssignWork&, const SoftAssignResult&);
  void (*backward)(const SoftAssignWork&, const SoftAssignUpstream&, const SoftAssignGradient&);
};

namespace base { SoftAssignKernels soft_assign_kernels(bool doubles); }
namespace avx2 { SoftAssignKernels soft_assign_kernels(bool doubles); }
namespace avx512 { SoftAssignKernels soft_assign_kernels(bool doubles); }

SoftAssignKernels soft_assign_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
