// The weighted vote of nearest neighbours on CUDA. The definition is fastret/backends/reference/knn_vote.py.
#pragma once
#include "../common/array.h"

namespace fastret {
namespace cuda {

struct KnnVoteProblem {
  Array scores;   // float32 (Q, k), best first
  Array indices;  // int64 (Q, k), -1 where nobody is
  Array place;    // int64 (1, M): the class of each indexed row, from 0 to classes - 1
  int64_t classes = 0;
  double scale = 1;  // of the scores in the exponent
};

// out: winners (Q, top) int64, the most voted for first, -1 for nobody; shares (Q, top) float32 of the vote.
void knn_vote(const KnnVoteProblem&, const Array& winners, const Array& shares, uintptr_t stream);

}  // namespace cuda
}  // namespace fastret
