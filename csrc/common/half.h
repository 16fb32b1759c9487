// float32 from and to the 16-bit types, the bits by themselves: for processors without such arithmetic. In an anonymous
// namespace, so that no two instruction sets share a symbol.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fastret {
namespace {

FASTRET_HOST_DEVICE inline float widen(float v) { return v; }
FASTRET_HOST_DEVICE inline double widen(double v) { return v; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTRET_HOST_DEVICE inline float float_from(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
FASTRET_HOST_DEVICE inline uint32_t bits_of(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  return bits;
}

FASTRET_HOST_DEVICE inline float widen(BFloat16 v) { return float_from(uint32_t(v.bits) << 16); }
FASTRET_HOST_DEVICE inline float widen(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  if (exponent == 31) return float_from(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return float_from(sign | bits_of(float(fraction) * 0x1p-24f));
  return float_from(sign | (exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even; NaN stays NaN.
FASTRET_HOST_DEVICE inline void narrow(float v, float& out) { out = v; }
FASTRET_HOST_DEVICE inline void narrow(double v, double& out) { out = v; }
FASTRET_HOST_DEVICE inline void narrow(float v, BFloat16& out) {
  const uint32_t bits = bits_of(v);
  out.bits = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTRET_HOST_DEVICE inline void narrow(float v, Half& out) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (v != v) {
    out.bits = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: the addition aligns and rounds
    out.bits = uint16_t(sign | (bits_of(float_from(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

}  // namespace
}  // namespace fastret
