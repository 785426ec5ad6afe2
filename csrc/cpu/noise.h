// Gumbel noise of many tokens at once: Philox4x32-10 in lanes, then −log(−log1p(−u)).
#pragma once

#include "core/noise.h"
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

constexpr int philox_lanes = 16;
constexpr int64_t noise_columns = 1024;  // of noise at a time: stays in the first-level cache
constexpr double largest_gumbel = 22.9;  // −log(−log1p(−2⁻³³)) = 33 log 2, rounded up

// Lanes of 64 bits of which the low 32 count: what multiply leaves in the upper half of a lane is never read.
#if defined(MEMDEC_LEVEL_IS_avx512)
struct Counters {
  static constexpr int width = 8;
  __m512i v;
};
inline Counters lanes_of(uint32_t x) { return {_mm512_set1_epi64(x)}; }
inline Counters load_lanes(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_lanes(uint64_t* p, Counters a) { _mm512_storeu_si512(p, a.v); }
inline Counters multiply(Counters a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))}; }
inline Counters high(Counters a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline Counters operator^(Counters a, Counters b) { return {_mm512_xor_si512(a.v, b.v)}; }
// Two words of each lane: a in the low half, b in the high one.
inline Counters paired(Counters a, Counters b) { return {_mm512_mask_shuffle_epi32(a.v, 0xaaaa, b.v, _MM_PERM_CCAA)}; }
#elif defined(MEMDEC_LEVEL_IS_avx2)
struct Counters {
  static constexpr int width = 4;
  __m256i v;
};
inline Counters lanes_of(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
inline Counters load_lanes(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store_lanes(uint64_t* p, Counters a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Counters multiply(Counters a, uint32_t b) { return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(b))}; }
inline Counters high(Counters a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline Counters operator^(Counters a, Counters b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Counters paired(Counters a, Counters b) { return {_mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa)}; }
#else
struct Counters {
  static constexpr int width = 4;
  uint64_t v[4];
};
template <class F>
inline Counters each_counter(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Counters lanes_of(uint32_t x) {
  return each_counter([&](int) -> uint64_t { return x; });
}
inline Counters load_lanes(const uint64_t* p) {
  return each_counter([&](int i) { return p[i]; });
}
inline void store_lanes(uint64_t* p, Counters a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
inline Counters multiply(Counters a, uint32_t b) {
  return each_counter([&](int i) { return (a.v[i] & 0xffffffffu) * b; });
}
inline Counters high(Counters a) {
  return each_counter([&](int i) { return a.v[i] >> 32; });
}
inline Counters operator^(Counters a, Counters b) {
  return each_counter([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline Counters paired(Counters a, Counters b) {
  return each_counter([&](int i) { return (a.v[i] & 0xffffffffu) | b.v[i] << 32; });
}
#endif

// pairs[2·i] = words 0 and 1 of Philox at counter (block[i], stream, offset), pairs[2·i + 1] = words 2 and 3, for
// philox_lanes blocks; the lower word of a pair is in the lower half.
inline void philox_of_blocks(uint64_t seed, uint64_t offset, const uint64_t* block, uint64_t* pairs,
                             Stream stream = noise_stream) {
  constexpr int w = Counters::width, parts = philox_lanes / w;
  Counters c0[parts], c1[parts], c2[parts], c3[parts];
  for (int p = 0; p < parts; ++p) {
    c0[p] = load_lanes(block + p * w);
    c1[p] = lanes_of(stream);
    c2[p] = lanes_of(static_cast<uint32_t>(offset));
    c3[p] = lanes_of(static_cast<uint32_t>(offset >> 32));
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Counters key0 = lanes_of(k0), key1 = lanes_of(k1);
    for (int p = 0; p < parts; ++p) {
      const Counters product0 = multiply(c0[p], 0xD2511F53u), product1 = multiply(c2[p], 0xCD9E8D57u);
      c0[p] = high(product1) ^ c1[p] ^ key0;
      c2[p] = high(product0) ^ c3[p] ^ key1;
      c1[p] = product1;
      c3[p] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int p = 0; p < parts; ++p) {
    uint64_t low[w], upper[w];
    store_lanes(low, paired(c0[p], c1[p]));
    store_lanes(upper, paired(c2[p], c3[p]));
    for (int i = 0; i < w; ++i) {
      pairs[2 * (p * w + i)] = low[i];
      pairs[2 * (p * w + i) + 1] = upper[i];
    }
  }
}

// The draws of tokens first … first + n − 1, and what follows up to a multiple of 64; first is a multiple of 4.
inline void draws_of_range(uint64_t seed, uint64_t offset, int64_t first, int64_t n, uint32_t* draw,
                           Stream stream = noise_stream) {
  for (int64_t i = 0; i < n; i += 4 * philox_lanes) {
    uint64_t block[philox_lanes], pairs[2 * philox_lanes];
    for (int j = 0; j < philox_lanes; ++j) block[j] = static_cast<uint64_t>((first + i) / 4 + j);
    philox_of_blocks(seed, offset, block, pairs, stream);
    for (int j = 0; j < 2 * philox_lanes; ++j) {
      draw[i + 2 * j] = static_cast<uint32_t>(pairs[j]);
      draw[i + 2 * j + 1] = static_cast<uint32_t>(pairs[j] >> 32);
    }
  }
}

// The draws of n tokens in any order.
inline void draws_of_tokens(uint64_t seed, uint64_t offset, const int32_t* tokens, int64_t n, uint32_t* draw) {
  for (int64_t i = 0; i < n; i += philox_lanes) {
    uint64_t block[philox_lanes], pairs[2 * philox_lanes];
    for (int j = 0; j < philox_lanes; ++j) block[j] = i + j < n ? static_cast<uint64_t>(tokens[i + j] / 4) : 0;
    philox_of_blocks(seed, offset, block, pairs);
    for (int j = 0; j < philox_lanes && i + j < n; ++j) {
      const int word = tokens[i + j] % 4;
      draw[i + j] = static_cast<uint32_t>(pairs[2 * j + word / 2] >> (word % 2 * 32));
    }
  }
}

// The noise of V::width draws: gumbel_of (core/noise.h), in lanes.
template <class V>
inline V gumbel(const uint32_t* draw);

template <>
inline VecF gumbel<VecF>(const uint32_t* draw) {
  float near[VecF::width], upper[VecF::width];
  for (int i = 0; i < VecF::width; ++i) {
    const uint32_t mask = 0u - (draw[i] >> 31);
    near[i] = static_cast<float>(static_cast<int32_t>(draw[i] ^ mask));
    upper[i] = float_of_bits(mask & 0x3f800000u);  // 1 or 0
  }
  const VecF zero = broadcast<VecF>(0), one = broadcast<VecF>(1);
  const VecF x = (load(near) + broadcast<VecF>(0.5f)) * broadcast<VecF>(0x1p-32f);
  // log1p(−x) = log(w) + (−x − (w − 1)) / w with w = 1 − x as rounded; w − 1 is exact.
  const VecF w = one - x;
  const auto is_upper = less(zero, load(upper));
  const VecF correction = select(is_upper, zero, (zero - x - (w - one)) / w);
  return zero - log(zero - (log(select(is_upper, x, w)) + correction));
}
template <>
inline VecD gumbel<VecD>(const uint32_t* draw) {
  return each_lane<VecD>([&](int i) { return gumbel_of<double>(draw[i]); });
}

}  // namespace memdec::MEMDEC_LEVEL
