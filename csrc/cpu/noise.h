// Gumbel noise of many tokens at once: Philox4x32-10 in lanes, then −log(−log1p(−u)).
#pragma once

#include "core/philox.h"
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

// Separate streams of one (seed, offset): the second half of the counter's low word. Draft, acceptance and residual follow.
enum Stream : uint32_t { noise_stream = 0, coin_stream = 1 };

constexpr int philox_lanes = 16;
constexpr int64_t noise_columns = 1024;  // of noise at a time: stays in the first-level cache
constexpr double largest_gumbel = 22.9;  // −log(−log1p(−2⁻³³)) = 33 log 2, rounded up

// Draw v is word v mod 4 of Philox at counter (v div 4, stream, offset).
inline uint32_t draw_of(uint64_t seed, uint64_t offset, Stream stream, uint32_t v) {
  return philox(seed, (static_cast<uint64_t>(stream) << 32) | (v / 4), offset).word[v % 4];
}

// word[w][i] = word w of Philox at counter (block[i], noise_stream, offset). The loops over lanes are for the compiler.
inline void philox_of_blocks(uint64_t seed, uint64_t offset, const uint32_t* block, uint32_t (&word)[4][philox_lanes]) {
  uint32_t(&c0)[philox_lanes] = word[0], (&c1)[philox_lanes] = word[1], (&c2)[philox_lanes] = word[2], (&c3)[philox_lanes] = word[3];
  for (int i = 0; i < philox_lanes; ++i) {
    c0[i] = block[i];
    c1[i] = noise_stream;
    c2[i] = static_cast<uint32_t>(offset);
    c3[i] = static_cast<uint32_t>(offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < philox_lanes; ++i) {
      const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0[i];
      const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(product1);
      c3[i] = static_cast<uint32_t>(product0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// noise[i] = −log(E), E = −log1p(−u), u = (k + ½)·2⁻³². For draws above ½, E = −log(1 − u) from the complement of k, because
// in float32 u itself would round to 1. n ≤ noise_columns; noise is written up to the next multiple of 16.
inline void gumbel_of_draws(const uint32_t* draw, int64_t n, float* noise) {
  float w[noise_columns], correction[noise_columns];
  for (int64_t i = 0; i < n; ++i) {
    const bool upper = draw[i] >> 31;
    const float x = (static_cast<float>(static_cast<int32_t>(upper ? ~draw[i] : draw[i])) + 0.5f) * 0x1p-32f;
    // log1p(−x) = log(w) + (−x − (w − 1)) / w with w = 1 − x as rounded; w − 1 is exact.
    w[i] = upper ? x : 1.0f - x;
    correction[i] = upper ? 0.0f : (-x - (w[i] - 1.0f)) / w[i];
  }
  for (int64_t i = n; i % VecF::width != 0; ++i) w[i] = 0.5f, correction[i] = 0.0f;
  const VecF zero = broadcast<VecF>(0);
  for (int64_t i = 0; i < n; i += VecF::width) store(noise + i, zero - log(zero - (log(load(w + i)) + load(correction + i))));
}
inline void gumbel_of_draws(const uint32_t* draw, int64_t n, double* noise) {
  for (int64_t i = 0; i < n; ++i) {
    const double exponential = draw[i] >> 31 ? -::log(uniform(~draw[i])) : -::log1p(-uniform(draw[i]));
    noise[i] = -::log(exponential);
  }
}

// The noise of tokens first … first + n − 1; first is a multiple of 4, n ≤ noise_columns.
template <class A>
inline void gumbel_of_range(uint64_t seed, uint64_t offset, int64_t first, int64_t n, A* noise) {
  uint32_t draw[noise_columns];
  for (int64_t i = 0; i < n; i += 4 * philox_lanes) {
    uint32_t block[philox_lanes], word[4][philox_lanes];
    for (int j = 0; j < philox_lanes; ++j) block[j] = static_cast<uint32_t>((first + i) / 4 + j);
    philox_of_blocks(seed, offset, block, word);
    for (int j = 0; j < philox_lanes; ++j)
      for (int k = 0; k < 4; ++k) draw[i + 4 * j + k] = word[k][j];
  }
  gumbel_of_draws(draw, n, noise);
}

// The noise of n ≤ noise_columns tokens.
template <class A>
inline void gumbel_of_tokens(uint64_t seed, uint64_t offset, const int32_t* tokens, int64_t n, A* noise) {
  uint32_t draw[noise_columns];
  for (int64_t i = 0; i < n; i += philox_lanes) {
    uint32_t block[philox_lanes], word[4][philox_lanes];
    for (int j = 0; j < philox_lanes; ++j) block[j] = i + j < n ? static_cast<uint32_t>(tokens[i + j]) / 4 : 0;
    philox_of_blocks(seed, offset, block, word);
    for (int j = 0; j < philox_lanes && i + j < n; ++j) draw[i + j] = word[tokens[i + j] % 4][j];
  }
  gumbel_of_draws(draw, n, noise);
}

}  // namespace memdec::MEMDEC_LEVEL
