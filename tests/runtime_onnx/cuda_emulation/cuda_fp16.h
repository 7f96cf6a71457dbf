// float16 of the emulation: stored bits, converted with rounding to the nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, size = h.bits & 0x7fffu;
  if (size >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  if (size >= 0x400u) return __uint_as_float(sign | (size + 0x1c000u) << 13);
  return (sign ? -1.f : 1.f) * static_cast<float>(size) * 0x1p-24f;
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  unsigned out;
  if (size > 0x7f800000u)
    out = 0x7e00u;
  else if (size >= 0x477ff000u)  // 65520 and above
    out = 0x7c00u;
  else if (size < 0x38800000u)  // below 2^-14: in units of 2^-24
    out = static_cast<unsigned>(std::nearbyint(__uint_as_float(size) * 0x1p24f));
  else
    out = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  return {static_cast<unsigned short>(sign | out)};
}
