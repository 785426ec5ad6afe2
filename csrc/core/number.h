// Number formats and small maths shared by the CPU and (later) the CUDA kernels.
//
// Everything in csrc/core has internal linkage (an unnamed namespace): the same header is compiled at several SIMD levels, and
// one shared copy of a function, chosen by the linker, could hold instructions that the machine at hand does not have.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define MEMDEC_HD __host__ __device__
#else
#define MEMDEC_HD
#endif

namespace memdec {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

MEMDEC_HD inline float float_of_bits(uint32_t bits) {
  union {
    uint32_t from;
    float to;
  } u{bits};
  return u.to;
}

MEMDEC_HD inline uint32_t bits_of_float(float value) {
  union {
    float from;
    uint32_t to;
  } u{value};
  return u.to;
}

MEMDEC_HD inline float to_float(float x) { return x; }
MEMDEC_HD inline double to_float(double x) { return x; }
MEMDEC_HD inline float to_float(bfloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

MEMDEC_HD inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, exact in float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return float_of_bits(sign | bits_of_float(magnitude));
  }
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
  return float_of_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// Rounds to nearest, ties to even, as torch does. NaN stays NaN.
template <class T>
MEMDEC_HD inline T from_float(float x);

template <>
MEMDEC_HD inline float from_float<float>(float x) {
  return x;
}

template <>
MEMDEC_HD inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return bfloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bfloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
MEMDEC_HD inline float16 from_float<float16>(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return float16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float32 adder round at 2^-24
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return float16{static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return float16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// The type a kernel accumulates in, and in which losses and log-probs are returned.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

template <class T, class A>
MEMDEC_HD inline T narrow(A x) {
  return from_float<T>(x);
}
template <>
MEMDEC_HD inline double narrow<double, double>(double x) {
  return x;
}

MEMDEC_HD inline float exponential(float x) { return expf(x); }
MEMDEC_HD inline double exponential(double x) { return exp(x); }
MEMDEC_HD inline float logarithm(float x) { return logf(x); }
MEMDEC_HD inline double logarithm(double x) { return log(x); }

// log(exp(a) + exp(b)); −inf is an empty sum, NaN propagates.
template <class A>
MEMDEC_HD inline A logaddexp(A a, A b) {
  const A high = a > b ? a : b;
  const A low = a > b ? b : a;
  if (high == low) return high + static_cast<A>(0.693147180559945309);  // also both −inf, both +inf
  return high + static_cast<A>(log1p(static_cast<double>(exponential(low - high))));
}

}  // namespace
}  // namespace memdec
