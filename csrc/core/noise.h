// Gumbel noise as a pure function of (seed, offset, token): what every backend must agree on, so that one seed draws one token.
#pragma once

#include "core/philox.h"

namespace memdec {
namespace {

// Separate streams of one (seed, offset): the second half of the counter's low word. A draft is drawn as interpolate_sample
// draws, with noise_stream and block_stream; what verify_draft draws beside it, acceptance and next token, has streams of its own.
enum Stream : uint32_t { noise_stream = 0, coin_stream = 1, acceptance_stream = 2, residual_stream = 3, block_stream = 4 };

// A draw from a whole vocabulary takes two steps. Of its blocks of this many tokens one is drawn, block s by its log Σ exp(score)
// and draw s of block_stream; then a token of that block, by scores and noise_stream. P(block) · P(token | block) is P(token): the
// same law for an exponential a token, where one step takes a random number and two logarithms.
constexpr int64_t draw_columns = 4096;

// Where one seed serves all rows, row r draws with seed + r · golden, 2⁶⁴/φ.
constexpr uint64_t golden = 0x9E3779B97F4A7C15u;

// Draws 4·block … 4·block + 3 of a stream.
MEMDEC_HD inline Random4 draws_of(uint64_t seed, uint64_t offset, Stream stream, uint32_t block) {
  return philox(seed, (static_cast<uint64_t>(stream) << 32) | block, offset);
}

// Draw v is word v mod 4 of Philox at counter (v div 4, stream, offset).
MEMDEC_HD inline uint32_t draw_of(uint64_t seed, uint64_t offset, Stream stream, uint32_t v) {
  const Random4 four = draws_of(seed, offset, stream, v / 4);
  const uint32_t low = v & 1 ? four.word[1] : four.word[0], upper = v & 1 ? four.word[3] : four.word[2];
  return v & 2 ? upper : low;  // no array indexed at run time, which on a GPU would lie in memory
}

// The noise of a draw: −log(E), E = −log1p(−u), u = (k + ½)·2⁻³². For draws above ½, E = −log(1 − u) from the complement of k,
// because in float32 u itself would round to 1.
template <class A>
MEMDEC_HD inline A gumbel_of(uint32_t draw);

template <>
MEMDEC_HD inline float gumbel_of<float>(uint32_t draw) {
  const bool upper = draw >> 31;
  const float x = (static_cast<float>(upper ? ~draw : draw) + 0.5f) * 0x1p-32f;
  if (upper) return -logarithm(-logarithm(x));
  // log1p(−x) = log(w) + (−x − (w − 1)) / w with w = 1 − x as rounded; w − 1 is exact.
  const float w = 1 - x;
  return -logarithm(-(logarithm(w) + (-x - (w - 1)) / w));
}
template <>
MEMDEC_HD inline double gumbel_of<double>(uint32_t draw) {
  const double exponential = draw >> 31 ? -::log(uniform(~draw)) : -::log1p(-uniform(draw));
  return -::log(exponential);
}

}  // namespace
}  // namespace memdec
