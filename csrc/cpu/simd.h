// The vectors that kernels are written with: one interface, three implementations, chosen when a file is compiled.
//
// A kernel file is compiled once a SIMD level, each time with another MEMDEC_LEVEL (portable, avx2, avx512), which is also the
// namespace that the code lands in. Inside such a file nothing of the standard library with external linkage may be used
// (std::max, std::vector, ...): the linker keeps one copy of those for all levels, perhaps the one with AVX-512 in it.
//
//   vec_t<T>                     accumulator vector for elements T: of float for float, bfloat16, float16; of double for double
//   vec_t<T>::width, ::scalar
//   broadcast<V>(x)
//   load(p), load_some(p, n, fill), store(p, v), store_some(p, v, n)     p: const T*, unaligned; 0 ≤ n < width elements touched
//   a + b, a − b, a * b, a / b, fma(a, b, c) = a·b + c
//   max(a, b), min(a, b)         b where either is NaN: max(x, accumulated) skips a NaN, max(accumulated, x) takes it on
//   less(a, b), equal(a, b)      a mask; any(mask), first(mask) = the lowest lane set; select(mask, a, b) = mask ? a : b
//   reduce_add(v), reduce_max(v) lanes in a fixed tree; reduce_max(v) wants no NaN
//   exp(v)                       float32: 1.1 ulp; 0 below −87.33 and for −inf; NaN for NaN; arguments at most 88
//   log(v)                       float32: 0.9 ulp; −inf for 0, +inf for +inf, NaN below 0 and for NaN
//   nonzero_words(p)             of 64 words of 64 bits, which are not 0: a bit each
//   lowest_bit(x)                the number of zeros below the lowest bit set, 64 where none is
//   stream(to, from, n)          copies n bytes past the caches: to memory that nobody reads soon, and that is not fetched first
//   streamed()                   after the last of them, before another thread may look
#pragma once

#include "core/number.h"

#if defined(MEMDEC_LEVEL_IS_avx512) || defined(MEMDEC_LEVEL_IS_avx2)
#include <immintrin.h>
#endif

namespace memdec::MEMDEC_LEVEL {

// Lanes as an array: the portable level, and float64 on every level. The loops are for the compiler to vectorise.
template <class S, int W>
struct Lanes {
  using scalar = S;
  static constexpr int width = W;
  S lane[W];
};
template <int W>
struct LaneMask {
  bool lane[W];
};

template <class V, class F>
inline V each_lane(F f) {
  V result;
  for (int i = 0; i < V::width; ++i) result.lane[i] = f(i);
  return result;
}

template <class S, int W>
inline Lanes<S, W> operator+(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] + b.lane[i]; });
}
template <class S, int W>
inline Lanes<S, W> operator-(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] - b.lane[i]; });
}
template <class S, int W>
inline Lanes<S, W> operator*(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] * b.lane[i]; });
}
template <class S, int W>
inline Lanes<S, W> operator/(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] / b.lane[i]; });
}
template <class S, int W>
inline Lanes<S, W> fma(Lanes<S, W> a, Lanes<S, W> b, Lanes<S, W> c) {
  return a * b + c;  // libm's fma is a function call where the machine has no such instruction
}
template <class S, int W>
inline Lanes<S, W> max(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <class S, int W>
inline Lanes<S, W> min(Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <class S, int W>
inline LaneMask<W> less(Lanes<S, W> a, Lanes<S, W> b) {
  LaneMask<W> mask;
  for (int i = 0; i < W; ++i) mask.lane[i] = a.lane[i] < b.lane[i];
  return mask;
}
template <class S, int W>
inline LaneMask<W> equal(Lanes<S, W> a, Lanes<S, W> b) {
  LaneMask<W> mask;
  for (int i = 0; i < W; ++i) mask.lane[i] = a.lane[i] == b.lane[i];
  return mask;
}
template <int W>
inline bool any(LaneMask<W> mask) {
  bool found = false;
  for (int i = 0; i < W; ++i) found |= mask.lane[i];
  return found;
}
template <int W>
inline int first(LaneMask<W> mask) {
  for (int i = 0; i < W; ++i)
    if (mask.lane[i]) return i;
  return W;
}
template <class S, int W>
inline Lanes<S, W> select(LaneMask<W> mask, Lanes<S, W> a, Lanes<S, W> b) {
  return each_lane<Lanes<S, W>>([&](int i) { return mask.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <class S, int W>
inline S reduce_add(Lanes<S, W> v) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
template <class S, int W>
inline S reduce_max(Lanes<S, W> v) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
  return v.lane[0];
}
template <class V>
inline V broadcast(typename V::scalar x) {
  return each_lane<V>([&](int) { return x; });
}

using VecD = Lanes<double, 4>;

inline VecD exp(VecD v) {
  return each_lane<VecD>([&](int i) { return ::exp(v.lane[i]); });
}
inline VecD log(VecD v) {
  return each_lane<VecD>([&](int i) { return ::log(v.lane[i]); });
}
inline VecD load(const double* p) {
  return each_lane<VecD>([&](int i) { return p[i]; });
}
inline VecD load_some(const double* p, int64_t n, double fill) {
  return each_lane<VecD>([&](int i) { return i < n ? p[i] : fill; });
}
inline void store(double* p, VecD v) {
  for (int i = 0; i < VecD::width; ++i) p[i] = v.lane[i];
}
inline void store_some(double* p, VecD v, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = v.lane[i];
}

#if defined(MEMDEC_LEVEL_IS_avx512)

struct VecF {
  using scalar = float;
  static constexpr int width = 16;
  __m512 v;
};
using MaskF = __mmask16;

template <>
inline VecF broadcast<VecF>(float x) {
  return {_mm512_set1_ps(x)};
}
inline VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VecF min(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline MaskF less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline MaskF equal(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline bool any(MaskF mask) { return mask != 0; }
inline int first(MaskF mask) { return __builtin_ctz(mask | 0x10000u); }
inline VecF select(MaskF mask, VecF a, VecF b) { return {_mm512_mask_blend_ps(mask, b.v, a.v)}; }
inline float reduce_add(VecF a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(VecF a) { return _mm512_reduce_max_ps(a.v); }

inline VecF round_nearest(VecF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a · 2^n for a whole n in [−126, 128].
inline VecF scale_by_power(VecF a, VecF n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// x = mantissa · 2^exponent with the mantissa in [√½, √2), for x > 0.
inline void split_exponent(VecF x, VecF& mantissa, VecF& exponent) {
  const __m512 fraction = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512 power = _mm512_getexp_ps(x.v);
  const MaskF upper = _mm512_cmp_ps_mask(fraction, _mm512_set1_ps(1.41421356f), _CMP_GE_OQ);
  mantissa = {_mm512_mask_mul_ps(fraction, upper, fraction, _mm512_set1_ps(0.5f))};
  exponent = {_mm512_mask_add_ps(power, upper, power, _mm512_set1_ps(1.0f))};
}

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
inline __m256i narrow_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline __mmask16 low_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VecF load(const bfloat16* p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline VecF load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline VecF load_some(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), low_lanes(n), p)};
}
inline VecF load_some(const bfloat16* p, int64_t n, float fill) {
  return select(low_lanes(n), {widen(_mm256_maskz_loadu_epi16(low_lanes(n), p))}, broadcast<VecF>(fill));
}
inline VecF load_some(const float16* p, int64_t n, float fill) {
  return select(low_lanes(n), {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(low_lanes(n), p))}, broadcast<VecF>(fill));
}
inline void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
inline void store(bfloat16* p, VecF a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_to_bf16(a.v)); }
inline void store(float16* p, VecF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_some(float* p, VecF a, int64_t n) { _mm512_mask_storeu_ps(p, low_lanes(n), a.v); }
inline void store_some(bfloat16* p, VecF a, int64_t n) { _mm256_mask_storeu_epi16(p, low_lanes(n), narrow_to_bf16(a.v)); }
inline void store_some(float16* p, VecF a, int64_t n) {
  _mm256_mask_storeu_epi16(p, low_lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(MEMDEC_LEVEL_IS_avx2)

struct VecF {
  using scalar = float;
  static constexpr int width = 8;
  __m256 v;
};
struct MaskF {
  __m256 v;
};

template <>
inline VecF broadcast<VecF>(float x) {
  return {_mm256_set1_ps(x)};
}
inline VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VecF max(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VecF min(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
inline MaskF less(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline MaskF equal(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline bool any(MaskF mask) { return _mm256_movemask_ps(mask.v) != 0; }
inline int first(MaskF mask) { return __builtin_ctz(static_cast<unsigned>(_mm256_movemask_ps(mask.v)) | 0x100u); }
inline VecF select(MaskF mask, VecF a, VecF b) { return {_mm256_blendv_ps(b.v, a.v, mask.v)}; }
inline float reduce_add(VecF a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(VecF a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline VecF round_nearest(VecF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VecF scale_by_power(VecF a, VecF n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
inline void split_exponent(VecF x, VecF& mantissa, VecF& exponent) {
  // A subnormal is first lifted into the normal range.
  const __m256 small = _mm256_cmp_ps(x.v, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
  const __m256 lifted = _mm256_blendv_ps(x.v, _mm256_mul_ps(x.v, _mm256_set1_ps(0x1p24f)), small);
  const __m256i bits = _mm256_castps_si256(lifted);
  const __m256i shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));  // the bits of √½
  const __m256i power = _mm256_srai_epi32(shifted, 23);
  mantissa = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)))};
  exponent = {_mm256_sub_ps(_mm256_cvtepi32_ps(power), _mm256_and_ps(small, _mm256_set1_ps(24.0f)))};
}

inline __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
inline __m128i narrow_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
inline __m128i narrow_to_fp16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VecF load(const bfloat16* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline VecF load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
inline void store(bfloat16* p, VecF a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_bf16(a.v)); }
inline void store(float16* p, VecF a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_fp16(a.v)); }

#else

using VecF = Lanes<float, 8>;
using MaskF = LaneMask<8>;

inline VecF round_nearest(VecF a) {
  // Adding and taking away 1.5·2^23 leaves the nearest whole number, for |a| < 2^22.
  const VecF magic = broadcast<VecF>(12582912.0f);
  return (a + magic) - magic;
}
inline VecF scale_by_power(VecF a, VecF n) {
  return each_lane<VecF>([&](int i) {
    const float whole = n.lane[i] > -127.0f && n.lane[i] < 129.0f ? n.lane[i] : 0.0f;  // NaN and far away: any number will do
    return a.lane[i] * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
  });
}
inline void split_exponent(VecF x, VecF& mantissa, VecF& exponent) {
  for (int i = 0; i < VecF::width; ++i) {
    const bool small = x.lane[i] < 0x1p-126f;
    const uint32_t bits = bits_of_float(small ? x.lane[i] * 0x1p24f : x.lane[i]);
    const int32_t power = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // the bits of √½
    mantissa.lane[i] = float_of_bits(bits - (static_cast<uint32_t>(power) << 23));
    exponent.lane[i] = static_cast<float>(power) - (small ? 24.0f : 0.0f);
  }
}

template <class T>
inline VecF load(const T* p) {
  return each_lane<VecF>([&](int i) { return to_float(p[i]); });
}
template <class T>
inline void store(T* p, VecF v) {
  for (int i = 0; i < VecF::width; ++i) p[i] = from_float<T>(v.lane[i]);
}

#endif

#if !defined(MEMDEC_LEVEL_IS_avx512)
template <class T>
inline VecF load_some(const T* p, int64_t n, float fill) {
  float lane[VecF::width];
  for (int i = 0; i < VecF::width; ++i) lane[i] = i < n ? to_float(p[i]) : fill;
  return load(lane);
}
template <class T>
inline void store_some(T* p, VecF v, int64_t n) {
  T lane[VecF::width];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}
#endif

// exp(x) = 2^n · exp(r), n = round(x / ln 2), r = x − n·ln 2 in [−ln 2 / 2, ln 2 / 2] with ln 2 in two parts;
// exp(r) = 1 + r + r²·P(r), P the degree-4 polynomial of least relative error there (3e-9).
inline VecF exp(VecF x) {
  const auto constant = [](float c) { return broadcast<VecF>(c); };
  const VecF n = round_nearest(x * constant(1.44269504f));
  const VecF r = fma(n, constant(2.12194440e-4f), fma(n, constant(-0.693359375f), x));
  VecF p = constant(1.38144672e-3f);
  p = fma(p, r, constant(8.36878084e-3f));
  p = fma(p, r, constant(4.16683927e-2f));
  p = fma(p, r, constant(0.166665196f));
  p = fma(p, r, constant(0.49999994f));
  p = fma(p, r * r, r) + constant(1.0f);
  // Below, the result would be subnormal or n out of range; −inf ends up here as well. A NaN is not less than anything.
  return select(less(x, constant(-87.33f)), constant(0.0f), scale_by_power(p, n));
}

// log(x) = e·ln 2 + log(1 + t), 1 + t the mantissa in [√½, √2);
// log(1 + t) = t − t²/2 + t³·P(t), P the degree-7 polynomial of least relative error there (6e-9).
inline VecF log(VecF x) {
  const auto constant = [](float c) { return broadcast<VecF>(c); };
  VecF mantissa, e;
  split_exponent(x, mantissa, e);
  const VecF t = mantissa - constant(1.0f);
  VecF p = constant(-7.63450265e-2f);
  p = fma(p, t, constant(0.12761578f));
  p = fma(p, t, constant(-0.13160181f));
  p = fma(p, t, constant(0.142017573f));
  p = fma(p, t, constant(-0.166233569f));
  p = fma(p, t, constant(0.200012267f));
  p = fma(p, t, constant(-0.250008196f));
  p = fma(p, t, constant(0.333333313f));
  const VecF square = t * t;
  VecF y = fma(p * t, square, e * constant(-2.12194440e-4f));
  y = fma(square, constant(-0.5f), y);
  y = fma(e, constant(0.693359375f), t + y);
  y = select(equal(x, constant(INFINITY)), x, y);
  y = select(equal(x, constant(0.0f)), constant(-INFINITY), y);
  const VecF invalid = x - x;  // 0, or NaN for NaN and ±inf
  y = select(less(x, constant(0.0f)), constant(NAN), y);
  return select(equal(x, x), y, invalid);
}

inline uint64_t lowest_bit(uint64_t x) {
#if defined(MEMDEC_LEVEL_IS_avx512) || defined(MEMDEC_LEVEL_IS_avx2)
  return _tzcnt_u64(x);
#else
  return x ? static_cast<uint64_t>(__builtin_ctzll(x)) : 64;
#endif
}

inline uint64_t nonzero_words(const uint64_t* words) {
  uint64_t bits = 0;
#if defined(MEMDEC_LEVEL_IS_avx512)
  for (int w = 0; w < 64; w += 8) {
    const __m512i some = _mm512_loadu_si512(words + w);
    bits |= static_cast<uint64_t>(_mm512_test_epi64_mask(some, some)) << w;
  }
#elif defined(MEMDEC_LEVEL_IS_avx2)
  for (int w = 0; w < 64; w += 4) {
    const __m256i zero = _mm256_cmpeq_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + w)), _mm256_setzero_si256());
    bits |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zero)) ^ 15) << w;
  }
#else
  for (int w = 0; w < 64; ++w) bits |= static_cast<uint64_t>(words[w] != 0) << w;
#endif
  return bits;
}

#if defined(MEMDEC_LEVEL_IS_avx512) || defined(MEMDEC_LEVEL_IS_avx2)
inline void stream(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t unaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % 64);
  const int64_t head = unaligned < bytes ? unaligned : bytes;
  __builtin_memcpy(out, in, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64)
    for (int64_t half = 0; half < 64; half += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + half), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + half)));
  __builtin_memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
}
inline void streamed() { _mm_sfence(); }
#else
inline void stream(void* to, const void* from, int64_t bytes) { __builtin_memcpy(to, from, static_cast<size_t>(bytes)); }
inline void streamed() {}
#endif

template <class T>
struct vec_of {
  using type = VecF;
};
template <>
struct vec_of<double> {
  using type = VecD;
};
template <class T>
using vec_t = typename vec_of<T>::type;

}  // namespace memdec::MEMDEC_LEVEL
