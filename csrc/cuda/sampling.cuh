// What the sampling ops share: Gumbel-max over a span of a row, and what transformers' warpers keep of a row of scores.
//
//   top_k   scores at least the k-th largest (all ties)
//   top_p   from the least likely up (equals: lower ids first), tokens go while the running probability of what top_k left is at
//           most 1 − top_p; the last stays
//   min_p   scores at least the largest + log(min_p)
//
// Scores are log-probs over the temperature. Tokens below a bound that no kept token can be below are left out first; among the
// rest the border is found digit by digit of the scores' bits, by counts for top_k and by sums of probabilities for top_p. These
// are in fixed point: whatever order tokens are listed and added in, the sums have the same bits.
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
__device__ inline float scored(float log_prob, float temperature) {
  return log_prob / temperature + 0.0f;  // −0 is 0: their bits are to be equal as they are
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
template <class T, class F>
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

// The same for a span of row r of the mixture, with its temperature; value: this thread's scores.
template <class T>
__device__ inline Winner winner_of_scores(const Mixture& mixture, int64_t r, int64_t span, const MixtureRow& row, float temperature,
                                          const float (&value)[share_size], uint64_t seed, uint64_t offset) {
  const LogProb log_prob(row);
  return winner_of_span<T>(value, mixture.base.columns, span, seed, offset, noise_stream, [&](int64_t column) {
    return scored(log_prob(logit_of<T>(mixture, r, row, base, column), logit_of<T>(mixture, r, row, memory, column)), temperature);
  });
}

// This thread's scores of a span of row r.
template <class T>
__device__ inline void scores_of_share(const Mixture& mixture, int64_t r, int64_t span, const MixtureRow& row, float temperature,
                                       float (&value)[share_size]) {
  log_probs_of_share<T>(mixture, r, span, row, 0, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = scored(value[i], temperature);
}

// ------------------------------------------------------------------------------------------------------------------- cuts

constexpr int row_threads = 512;  // of a block that has a row of scores
constexpr uint32_t span_columns_u32 = span_columns;
constexpr int64_t rows_at_once = 128;  // that have scores in the workspace: about a block a multiprocessor

// Of rows that are at work, row by row. A token is named by its place: scores are stored as the shares that they were computed
// in, value i of all threads of a span one after the other.
struct Scores {
  float* score;      // (rows, span_columns · spans), −inf beyond the end of a row
  float* largest;    // (rows, block_threads · spans) of each share
  uint32_t* listed;  // (rows, span_columns · spans) places,
  float* listed_score;  // and their scores, which are looked at many times: one behind the other
  int64_t spans;
  int width;  // of the vectors in a share

  __device__ Scores row(int64_t i) const {
    return {score + i * spans * span_columns, largest + i * shares(), listed + i * spans * span_columns,
            listed_score + i * spans * span_columns, spans, width};
  }
  __device__ int64_t shares() const { return spans * block_threads; }
  __device__ uint32_t token_at(uint32_t place) const {
    const uint32_t thread = place % block_threads, i = place / block_threads % share_size;
    return (place - place % span_columns_u32) + (i / width * block_threads + thread) * width + i % width;
  }
};

inline Scores take_scores(Parts& parts, int64_t rows, const Rows& logits) {
  const int64_t spans = spans_of(logits.columns), all = smaller(rows, rows_at_once) * spans;
  return {.score = parts.take<float>(all * span_columns),
          .largest = parts.take<float>(all * block_threads),
          .listed = parts.take<uint32_t>(all * span_columns),
          .listed_score = parts.take<float>(all * span_columns),
          .spans = spans,
          .width = logits.dtype == DType::float32 ? width_of<float> : width_of<bfloat16>};
}

// Writes the block's span of a row of scores; `scores` is that row's.
template <class T>
__device__ inline void write_scores(const Mixture& mixture, int64_t r, int64_t span, const MixtureRow& row, float temperature,
                                    const Scores& scores) {
  float value[share_size], largest = -INFINITY;
  scores_of_share<T>(mixture, r, span, row, temperature, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    largest = fmaxf(largest, value[i]);
    scores.score[(span * share_size + i) * block_threads + threadIdx.x] = value[i];
  }
  scores.largest[span * block_threads + threadIdx.x] = largest;
}

// The largest of a row of scores, known to every thread of its block.
__device__ inline float largest_of(const Scores& scores) {
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < scores.shares(); i += row_threads) top = fmaxf(top, scores.largest[i]);
  return reduce_block<row_threads>(top, [](float a, float b) { return fmaxf(a, b); });
}

// The bits of a float as an unsigned number of the same order.
__device__ inline uint32_t rank_of(float x) {
  const uint32_t bits = bits_of_float(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Two halves of a warp swap half of their sums, then halves of these: in the end each pair of lanes has the sum of one of 2·half
// numbers, number lane / 2.
template <int half>
__device__ inline void fold(uint64_t* sum) {
  const bool upper = lane_of_thread() & (2 * half);
#pragma unroll
  for (int d = 0; d < half; ++d) {
    const uint64_t kept = upper ? sum[d + half] : sum[d], given = upper ? sum[d] : sum[d + half];
    sum[d] = kept + from_lane_across(given, 2 * half);
  }
  if constexpr (half > 1) fold<half / 2>(sum);
  else sum[0] += from_lane_across(sum[0], 1);
}

// Where a running sum of weights, in ascending order of keys, exceeds a limit.
struct Border {
  uint32_t key;    // the least for which the weights of all keys up to it sum to more than the limit
  uint64_t below;  // the sum of the weights of the keys below it
};

struct BorderSums {
  static constexpr int digit_bits = 4, digits = 1 << digit_bits, passes = 32 / digit_bits;
  unsigned long long of[passes][digits];
};

// item(i, use) calls use(key, weight) for item i of `count`. The sum of all weights exceeds the limit. Every thread must call it.
template <class F>
__device__ inline Border border_at(int64_t count, uint64_t limit, const F& item) {
  constexpr int digit_bits = BorderSums::digit_bits, digits = BorderSums::digits, passes = BorderSums::passes;
  BorderSums& sums = shared<BorderSums>();
  __syncthreads();  // a border before this one may still be read
  if (threadIdx.x < passes * digits) sums.of[threadIdx.x / digits][threadIdx.x % digits] = 0;
  __syncthreads();
  Border border{0, 0};
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 - (pass + 1) * digit_bits;
    uint64_t sum[digits] = {};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += row_threads)
      item(i, [&](uint32_t key, uint64_t weight) {
        if (uint64_t{key ^ border.key} >> (shift + digit_bits) != 0) return;  // the digits found so far differ
        const uint32_t digit = key >> shift & (digits - 1);
#pragma unroll
        for (uint32_t d = 0; d < digits; ++d) sum[d] += digit == d ? weight : 0;
      });
    if (warp_of_thread() * warp_size < count) {  // the warp has items
      fold<digits / 2>(sum);
      if (lane_of_thread() % 2 == 0) atomicAdd(&sums.of[pass][lane_of_thread() / 2], static_cast<unsigned long long>(sum[0]));
    }
    __syncthreads();  // the pass's sums are whole
    uint32_t digit = 0;
    for (; digit + 1 < digits && border.below + sums.of[pass][digit] <= limit; ++digit) border.below += sums.of[pass][digit];
    border.key |= digit << shift;
  }
  return border;
}

// The warpers that cut, with what the host computes of them once.
struct Cuts {
  int64_t top_k;
  double top_p;
  double min_p;
  double log_bound;  // of a probability over the likeliest one's, below which no token is kept (where top_k is 0)
  double log_min_p;
  float one;  // 1 in fixed point: exp(score − top) of any vocabulary add up to less than 2⁶²
};
template <class Op>
inline Cuts cuts_of(const Op& op) {
  const int64_t columns = op.mixture.base.columns;
  int weight_bits = 61;
  while (columns >> (61 - weight_bits) > 0) --weight_bits;
  // The margin is for the rounding of scores and sums: what it lets through is cut exactly later.
  const double share = op.top_p < 1 ? (1 - op.top_p) / static_cast<double>(columns) : op.min_p;
  return {.top_k = op.top_k,
          .top_p = op.top_p,
          .min_p = op.min_p,
          .log_bound = log(share) - 1e-2,
          .log_min_p = op.min_p > 0 ? log(op.min_p) : 0,
          .one = static_cast<float>(uint64_t{1} << weight_bits)};
}

// exp(score − top) in fixed point.
struct Weight {
  float top, one;
  __device__ uint64_t operator()(float score) const { return static_cast<uint64_t>(exponential(score - top) * one); }
};

// Which tokens of a row the warpers keep.
struct Kept {
  uint32_t lowest = 0;        // of the ranks of scores that are kept
  uint32_t border = 0;        // top_p keeps those above it,
  int64_t last_dropped = -1;  // and of equal ones the tokens above this
  float floor = -INFINITY;    // of the scores that min_p keeps

  __device__ bool has(float score, int64_t token) const {
    const uint32_t rank = rank_of(score);
    return rank >= lowest && (rank > border || (rank == border && token > last_dropped)) && score >= floor;
  }
};

// Finds what is kept of a row of scores whose largest is `top`, finite. Lists at least these tokens, in no order, and returns
// how many it listed. A block's work: every thread must call it.
__device__ inline int64_t keep(const Scores& scores, float top, const Cuts& cuts, Kept& kept) {
  const int64_t shares = scores.shares();
  const Weight weight_of{top, cuts.one};

  // A score that no token which is kept can lie below.
  //   top_k   the k-th largest of the maxima of shares: k shares have a token that reaches it
  //   top_p   all tokens with less than (1 − top_p) / V of the likeliest one's probability hold less than 1 − top_p together
  //   min_p   its own bound
  uint32_t least = rank_of(-INFINITY) + 1;
  if (cuts.top_k == 0) {
    least = rank_of(static_cast<float>(static_cast<double>(top) + cuts.log_bound));
  } else if (cuts.top_k <= shares) {
    const auto share = [&](int64_t i, const auto& use) { use(rank_of(scores.largest[i]), uint64_t{1}); };
    least = border_at(shares, static_cast<uint64_t>(shares - cuts.top_k), share).key;
  }
  if (least <= rank_of(-INFINITY)) least = rank_of(-INFINITY) + 1;
  kept.lowest = least;

  // The tokens from there on, in no order; and with top_p alone Σ exp(score − top) over all tokens, which it is a share of.
  uint32_t& length = shared<uint32_t>();
  if (threadIdx.x == 0) length = 0;
  __syncthreads();
  const bool needs_whole = cuts.top_p < 1 && cuts.top_k == 0;
  uint64_t whole = 0;
  for (int64_t i = threadIdx.x; i < shares; i += row_threads) {
    const bool has_any = rank_of(scores.largest[i]) >= least;
    if (!has_any && !needs_whole) continue;
    const int64_t span = i / block_threads, begin = span * span_columns + i % block_threads;
    uint32_t passing = 0;
#pragma unroll
    for (int j = 0; j < share_size; ++j) {
      const float s = scores.score[begin + j * block_threads];
      if (needs_whole) whole += weight_of(s);
      passing |= uint32_t{rank_of(s) >= least} << j;
    }
    if (!has_any) continue;
    uint32_t place = atomicAdd(&length, static_cast<uint32_t>(__popc(passing)));
    for (; passing != 0; passing &= passing - 1, ++place) {
      const int64_t at = begin + (__ffs(static_cast<int>(passing)) - 1) * block_threads;
      scores.listed[place] = static_cast<uint32_t>(at);
      scores.listed_score[place] = scores.score[at];
    }
  }
  __syncthreads();  // the list is whole
  const int64_t count = length;

  const auto key_of = [&](int64_t i) { return rank_of(scores.listed_score[i]); };
  if (cuts.top_k > 0 && cuts.top_k < count)
    kept.lowest = border_at(count, static_cast<uint64_t>(count - cuts.top_k), [&](int64_t i, const auto& use) { use(key_of(i), uint64_t{1}); }).key;

  if (cuts.top_p < 1) {
    const auto weight_at = [&](int64_t i) { return key_of(i) >= kept.lowest ? weight_of(scores.listed_score[i]) : 0; };
    uint64_t left = 0;
    for (int64_t i = threadIdx.x; i < count; i += row_threads) left += weight_at(i);
    left = sum_over_block<row_threads>(left);
    whole = needs_whole ? sum_over_block<row_threads>(whole) : left;
    const uint64_t share = static_cast<uint64_t>((1 - cuts.top_p) * static_cast<double>(whole));
    if (share >= whole - left) {
      uint64_t limit = share - (whole - left);
      if (limit >= left) limit = left - 1;  // the last token stays
      const Border at = border_at(count, limit, [&](int64_t i, const auto& use) { use(key_of(i), weight_at(i)); });
      kept.border = at.key;
      // Of the tokens at the border, all of one weight, so many go:
      const float border_score = float_of_bits(at.key ^ (at.key >> 31 ? 0x80000000u : 0xffffffffu));
      const uint64_t dropped = (limit - at.below) / weight_of(border_score);
      if (dropped > 0) {
        const auto tokens_there = [&](int64_t i, const auto& use) {
          if (key_of(i) == at.key) use(scores.token_at(scores.listed[i]), uint64_t{1});
        };
        kept.last_dropped = border_at(count, dropped - 1, tokens_there).key;
      }
    }
  }
  if (cuts.min_p > 0) kept.floor = static_cast<float>(static_cast<double>(top) + cuts.log_min_p);
  return count;
}

// The token drawn from what is kept, of the `count` that keep listed.
__device__ inline Winner winner_of_kept(const Scores& scores, int64_t count, const Kept& kept, uint64_t seed, uint64_t offset) {
  Winner best;
  for (int64_t i = threadIdx.x; i < count; i += row_threads) {
    const uint32_t token = scores.token_at(scores.listed[i]);
    const float score = scores.listed_score[i];
    if (!kept.has(score, token)) continue;
    const float noise = gumbel_of<float>(draw_of(seed, offset, noise_stream, token));
    best = Winner::merge(best, {static_cast<double>(score) + static_cast<double>(noise), static_cast<int32_t>(token)});
  }
  return reduce_block<row_threads>(best, Winner::merge);
}

}  // namespace
}  // namespace memdec::cuda
