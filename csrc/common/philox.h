// Philox4x32-10: four words of 32 bits from a counter and a key, the same as in fastret/backends/sampling.py. One text
// for the CPU and for CUDA; in an anonymous namespace, so that no two instruction sets share a symbol.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fastret {
namespace {

struct PhiloxWords {
  uint32_t word[4];
};

FASTRET_HOST_DEVICE inline PhiloxWords philox(uint32_t c0, uint32_t c1, uint64_t key) {
  uint32_t c2 = 0, c3 = 0, k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t next0 = uint32_t(p1 >> 32) ^ c1 ^ k0, next2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace fastret
