// What the sampling ops share: the key and the counter of a row, and Gumbel-max over a span of it and over a row's spans.
#pragma once

#include "core/noise.h"
#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

// The key and the counter of row r, for an op with the fields of InterpolateSample.
template <class Op>
__device__ inline uint64_t seed_of(const Op& op, int64_t r) {
  const uint64_t seed = op.seeds ? static_cast<uint64_t>(op.seeds[r * op.seeds_stride]) : op.seed;
  return op.seeds_stride == 0 ? seed + static_cast<uint64_t>(r) * golden : seed;
}
template <class Op>
__device__ inline uint64_t offset_of(const Op& op, int64_t r) {
  return op.offsets ? static_cast<uint64_t>(op.offsets[r * op.offsets_stride]) : op.offset;
}

// What is done to log-probs before a draw.
template <class Op>
__host__ __device__ inline bool has_cuts(const Op& op) {
  return op.top_k > 0 || op.top_p < 1 || op.min_p > 0;
}
template <class Op>
__host__ __device__ inline bool is_plain(const Op& op) {
  return !has_cuts(op) && op.temperature == 1;
}
// 1 / T, neither 0 nor infinite.
template <class Op>
__device__ inline float sharpness_of(const Op& op) {
  return fminf(fmaxf(1 / static_cast<float>(op.temperature), 1e-30f), 1e30f);
}
__device__ inline float scored(float log_prob, float sharpness) {
  return log_prob * sharpness + 0.0f;  // −0 is 0: their bits are to be equal as they are
}

// ---------------------------------------------------------------------------------------------------- Gumbel-max over a span

// A token and its score with its noise. Scores are compared in float64: a float32 logit and its noise add up without rounding
// much, whatever common offset the row has.
struct Winner {
  double score = -INFINITY;
  int32_t token = -1;
  int32_t padding = 0;  // no undefined bits in a shuffle

  static __device__ Winner merge(Winner a, Winner b) {
    return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
  }
  // Beats everything: a row with a NaN or a +inf in it has no token.
  static __device__ Winner broken() { return {INFINITY, -1}; }
};

// A bound of a draw's noise, exact for large noise: E ≥ u, so −log E ≤ −log u. Rounding may leave it short by less than slack.
__device__ inline float noise_bound(uint32_t draw) {
  return (32 - fast_log2(static_cast<float>(draw) + 0.5f)) * 0.693147180559945309f;
}
constexpr float slack = 1e-3f;

// The best of the block's span, known to every thread of it. value: this thread's share; value_at(column): the same from
// memory, for the few threads that look again.
//
// A noise costs two logarithms, a bound of it one fast one. So each thread computes the noise of the one token with the largest
// bound, and only threads with a further token whose bound reaches the best of the block so found compute more.
//
// is_thin: most values are −inf, and fours of them draw no random numbers.
template <class T, bool is_thin = false, class F>
__device__ inline Winner winner_of_span(const float (&value)[share_size], int64_t columns, int64_t span, uint64_t seed, uint64_t offset,
                                        Stream stream, const F& value_at) {
  constexpr int w = width_of<T>;
  static_assert(w % 4 == 0, "a vector begins with the first of four draws");
  float top = -INFINITY;
  bool broken = false;
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    top = fmaxf(top, value[i]);
    broken |= !(value[i] < INFINITY);
  }
  const float shift = top == -INFINITY ? 0 : top;  // so that bounds keep their digits at any offset
  float first = -INFINITY, second = -INFINITY, first_value = 0;
  uint32_t first_draw = 0;
  int first_place = 0;
  for_each_vector<T>(span, 0, [&](int v, int64_t column) {
#pragma unroll
    for (int part = 0; part < w; part += 4) {
      if constexpr (is_thin) {
        const float* const z = value + v * w + part;
        if (!(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) > -INFINITY)) continue;
      }
      const Random4 four = draws_of(seed, offset, stream, static_cast<uint32_t>((column + part) / 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = value[v * w + part + i], bound = (z - shift) + noise_bound(four.word[i]);
        if (bound > first) {
          second = first, first = bound, first_value = z, first_draw = four.word[i], first_place = v * w + part + i;
        } else {
          second = fmaxf(second, bound);
        }
      }
    }
  });
  Winner best;
  const auto consider = [&](float z, uint32_t draw, int64_t column) {
    const double score = static_cast<double>(z) + static_cast<double>(gumbel_of<float>(draw));
    best = Winner::merge(best, {score, static_cast<int32_t>(column)});
  };
  if (first > -INFINITY) consider(first_value, first_draw, column_of<T>(span, first_place));
  if (broken) best = Winner::broken();
  best = reduce_block<block_threads>(best, Winner::merge);
  const auto reaches = [&, to_beat = best.score](float bound) { return static_cast<double>(shift) + bound > to_beat - slack; };
  if (second > -INFINITY && reaches(second)) {
#pragma unroll 1
    for (int i = 0; i < share_size; ++i) {
      const int64_t column = column_of<T>(span, i);
      if (column >= columns) continue;
      const float z = value_at(column);
      const uint32_t draw = draw_of(seed, offset, stream, static_cast<uint32_t>(column));
      if (reaches((z - shift) + noise_bound(draw))) consider(z, draw, column);
    }
  }
  return reduce_block<block_threads>(best, Winner::merge);
}

// The same for a span of row r of the mixture, over the temperature; value: this thread's scores.
template <class T, class Row>
__device__ inline Winner winner_of_scores(const Mixture& mixture, int64_t r, int64_t span, const Row& row, float sharpness,
                                          const float (&value)[share_size], uint64_t seed, uint64_t offset) {
  const LogProb log_prob(row);
  return winner_of_span<T>(value, mixture.base.columns, span, seed, offset, noise_stream, [&](int64_t column) {
    return scored(log_prob(logit_of<T>(mixture, r, row, base, column), logit_of<T>(mixture, r, row, memory, column)), sharpness);
  });
}

// -------------------------------------------------------------------------------------------------- Gumbel-max over the spans

static_assert(span_columns == draw_columns, "the states of a row's spans are what one of them is drawn by");

// The noise that a warp draws a span of a row by, the first step of a draw in two: that of span number i is its lane i mod 32's. What
// `early` spans of each lane want is found when this is made, which can be before there are states.
struct SpanNoise {
  static constexpr int early = 2;  // 64 spans are 262144 tokens
  uint64_t seed, offset;
  double noise[early];

  __device__ SpanNoise(uint64_t of_seed, uint64_t at_offset) : seed(of_seed), offset(at_offset) {
#pragma unroll
    for (int i = 0; i < early; ++i) noise[i] = of_span(lane_of_thread() + i * warp_size);
  }
  __device__ double of_span(int64_t span) const {
    return gumbel_of<double>(draw_of(seed, offset, block_stream, static_cast<uint32_t>(span)));
  }

  // The span of largest log Σ exp(score) + noise, state(span) being the softmax state of one's scores; −1 where there is a NaN, a
  // +inf or nothing but −inf. Every lane must call it, and knows the result.
  template <class F>
  __device__ int64_t drawn(int64_t spans, const F& state) const {
    Winner best;
    const auto consider = [&](int64_t span, Softmax<float> of, double noise_of) {
      const Winner here{of.logsumexp() + noise_of, static_cast<int32_t>(span)};
      best = Winner::merge(best, of.sum >= 0 ? here : Winner::broken());
    };
    Softmax<float> first[early];  // all loads are under way before the first is used
#pragma unroll
    for (int i = 0; i < early; ++i)
      if (const int64_t span = lane_of_thread() + i * warp_size; span < spans) first[i] = state(span);
#pragma unroll
    for (int i = 0; i < early; ++i) consider(lane_of_thread() + i * warp_size, first[i], noise[i]);
    for (int64_t span = lane_of_thread() + early * warp_size; span < spans; span += warp_size) consider(span, state(span), of_span(span));
    return reduce_warp(best, Winner::merge).token;
  }
};

// This thread's scores of a span of row r.
template <class T, class Row>
__device__ inline void scores_of_share(const Mixture& mixture, int64_t r, int64_t span, const Row& row, float sharpness,
                                       float (&value)[share_size]) {
  log_probs_of_share<T>(mixture, r, span, row, 0, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = scored(value[i], sharpness);
}

}  // namespace
}  // namespace memdec::cuda
