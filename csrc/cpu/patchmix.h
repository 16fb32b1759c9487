// patchmix on the CPU: bytes are moved, whatever they mean, so one variant serves every type and instruction set. The
// definition is fastret/backends/reference/patchmix.py.
#pragma once
#include "../common/array.h"

namespace fastret {

// An image lies as planes x down x lines x across x piece bytes: down x across patches, of `lines` pieces each.
struct PatchMixProblem {
  Array x;       // (B, bytes of an image)
  Array groups;  // int64 (1, down across)
  int64_t planes = 1, down = 1, lines = 1, across = 1, piece = 1;
  int threads = 1;
};

// out: as x, with patch t of image b that of image (b + groups[t]) mod B.
void patchmix(const PatchMixProblem&, const Array& out);

}  // namespace fastret
