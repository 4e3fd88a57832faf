// Half precision in integers, rounded to nearest even, as CUDA's conversions are. For tests.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7FFF;
  if (magnitude < 0x0400) return std::copysign(std::ldexp(float(magnitude), -24), __uint_as_float(sign | 1));
  const uint32_t exponent = magnitude >= 0x7C00 ? 0x7F800000 : 0x38000000;
  return __uint_as_float(sign | (magnitude >= 0x7C00 ? exponent | (magnitude & 0x3FF) << 13 : exponent + (magnitude << 13)));
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7F800000) return {0x7FFF};
  if (magnitude >= 0x477FF000) return {uint16_t(sign | 0x7C00)};
  if (magnitude < 0x38800000) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(std::fabs(value), 24))))};
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)};
}
