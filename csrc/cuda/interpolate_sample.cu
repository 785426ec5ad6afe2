// interpolate_sample: a token drawn from p_mix by Gumbel-max, argmax over v of log p_mix(v) / T + g(v), g(v) the Gumbel noise
// of (seed, offset, v): core/noise.h, as on the CPU, so that one seed draws one token on both.
//
//   nothing warped    a coin of probability α picks one of the two components, and the draw is from that one: argmax of
//                     z(v) + g(v). Half the bytes, no exponentials of logits, no sums.
//   temperature only  argmax of log p_mix(v) / T + g(v).
//   cuts              scores log p_mix / T are written, and what the warpers keep is found as transformers defines it:
//       top_k   scores at least the k-th largest (all ties)
//       top_p   from the least likely up (equals: lower ids first), tokens go while the running probability of what top_k left
//               is at most 1 − top_p; the last stays
//       min_p   scores at least the largest + log(min_p)
//
// With cuts a block has a row. Tokens below a bound that no kept token can be below are left out first; among the rest the
// border is found digit by digit of the scores' bits, by counts for top_k and by sums of probabilities for top_p. These are in
// fixed point: whatever order tokens are listed and added in, the sums have the same bits.
//
// Traffic: coin: each logit of one tensor once. Temperature: each logit of both twice. Cuts: each logit of both twice, V scores
// written and read in the second-level cache, and the list of candidates eight times for each of top_k and top_p; up to 128 rows
// have 8 bytes a token in the workspace.
#include "core/noise.h"
#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

__device__ inline uint64_t seed_of(const InterpolateSample& op, int64_t r) {
  return op.seeds ? static_cast<uint64_t>(op.seeds[r]) : op.seed + static_cast<uint64_t>(r) * golden;
}
__device__ inline uint64_t offset_of(const InterpolateSample& op, int64_t r) {
  return op.offsets ? static_cast<uint64_t>(op.offsets[r]) : op.offset;
}

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

// ---------------------------------------------------------------------------------------------------- Gumbel-max over a span

__device__ inline float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

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
                                        const F& value_at) {
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
      const Random4 four = draws_of(seed, offset, noise_stream, static_cast<uint32_t>((column + part) / 4));
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
      const uint32_t draw = draw_of(seed, offset, noise_stream, static_cast<uint32_t>(column));
      if (reaches((z - shift) + noise_bound(draw))) consider(z, draw, column);
    }
  }
  return reduce_block<block_threads>(best, Winner::merge);
}

// Nothing warped: a block a span of the row that the coin picks.
template <class T>
__global__ void __launch_bounds__(block_threads) draw_from_spans(InterpolateSample op, Winner* winners) {
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const uint64_t seed = seed_of(op, r), offset = offset_of(op, r);
  const double alpha = alpha_of(op.mixture, r);
  Winner winner = Winner::broken();
  if (alpha >= 0 && alpha <= 1) {
    const bool heads = uniform(draw_of(seed, offset, coin_stream, 0)) < alpha;
    const T* const z = row_of<const T>(heads ? op.mixture.memory : op.mixture.base, r);
    float value[share_size];
    load_share(z, columns, span, value);
    winner = winner_of_span<T>(value, columns, span, seed, offset, [&](int64_t column) { return widened(z[column]); });
  }
  if (threadIdx.x == 0) winners[blockIdx.x] = winner;
}

// Temperature only: a block a span of the mixture.
template <class T>
__global__ void __launch_bounds__(block_threads) draw_from_mixed_spans(InterpolateSample op, const Softmax<float>* states, Winner* winners) {
  const Mixture& mixture = op.mixture;
  const int64_t columns = mixture.base.columns, spans = spans_of(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const float temperature = static_cast<float>(op.temperature);
  const MixtureRow row = mixture_of_row(mixture, r, [&](int64_t i) { return states[i]; });
  float value[share_size];
  log_probs_of_share<T>(mixture, r, span, row, 0, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] /= temperature;
  const LogProb log_prob(row);
  const Winner winner = winner_of_span<T>(value, columns, span, seed_of(op, r), offset_of(op, r), [&](int64_t column) {
    const float z_base = row.uses(base) ? widened(row_of<const T>(mixture.base, r)[column]) : -INFINITY;
    const float z_memory = row.uses(memory) ? widened(row_of<const T>(mixture.memory, r)[column]) : -INFINITY;
    return log_prob(z_base, z_memory) / temperature;
  });
  if (threadIdx.x == 0) winners[blockIdx.x] = winner;
}

// A warp a row: the best of its spans.
__global__ void __launch_bounds__(warp_size) pick_winners(InterpolateSample op, const Winner* winners) {
  const int64_t r = blockIdx.x, spans = spans_of(op.mixture.base.columns);
  Winner best;
  for (int64_t i = threadIdx.x; i < spans; i += warp_size) best = Winner::merge(best, winners[r * spans + i]);
  best = reduce_warp(best, Winner::merge);
  if (threadIdx.x == 0) op.tokens[r] = best.token;
}

// ------------------------------------------------------------------------------------------------------------------- cuts

constexpr int row_threads = 512;
constexpr uint32_t span_columns_u32 = span_columns;
constexpr int64_t rows_at_once = 128;  // that have scores in the workspace: about a block a multiprocessor

// Of the rows that are at work, row by row. A token is named by its place: scores are stored as the shares that they were
// computed in, value i of all threads of a span one after the other.
struct Scores {
  float* score;      // (rows, span_columns · spans), −inf beyond the end of a row
  float* largest;    // (rows, block_threads · spans) of each share
  uint32_t* listed;  // (rows, span_columns · spans) places
  int width;         // of the vectors in a share

  __device__ uint32_t token_at(uint32_t place) const {
    const uint32_t thread = place % block_threads, i = place / block_threads % share_size;
    return (place - place % span_columns_u32) + (i / width * block_threads + thread) * width + i % width;
  }
};

template <class T>
__global__ void __launch_bounds__(block_threads) score_spans(InterpolateSample op, const Softmax<float>* states, int64_t first,
                                                            Scores scores) {
  const int64_t spans = spans_of(op.mixture.base.columns), r = first + blockIdx.x / spans, span = blockIdx.x % spans;
  const MixtureRow row = mixture_of_row(op.mixture, r, [&](int64_t i) { return states[i]; });
  const float temperature = static_cast<float>(op.temperature);
  float value[share_size], largest = -INFINITY;
  log_probs_of_share<T>(op.mixture, r, span, row, 0, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    value[i] = value[i] / temperature + 0.0f;  // −0 is 0: their bits are to be equal as they are
    largest = fmaxf(largest, value[i]);
    scores.score[(int64_t{blockIdx.x} * share_size + i) * block_threads + threadIdx.x] = value[i];
  }
  scores.largest[int64_t{blockIdx.x} * block_threads + threadIdx.x] = largest;
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

// item(i, use) calls use(key, weight) for item i of `count`. The sum of all weights exceeds the limit. Every thread must call it.
template <class F>
__device__ inline Border border_at(int64_t count, uint64_t limit, const F& item) {
  constexpr int digit_bits = 4, digits = 1 << digit_bits, passes = 32 / digit_bits;
  struct Sums {
    unsigned long long of[passes][digits];
  };
  Sums& sums = shared<Sums>();
  __syncthreads();  // a border before this one may still be read
  if (threadIdx.x < passes * digits) sums.of[threadIdx.x / digits][threadIdx.x % digits] = 0;
  __syncthreads();
  Border border{0, 0};
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 - (pass + 1) * digit_bits;
    uint64_t sum[digits] = {};
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

// A block a row: the token drawn from what the warpers keep of its scores.
__global__ void __launch_bounds__(row_threads) draw_from_scores(InterpolateSample op, const Softmax<float>* states, int64_t first,
                                                               Scores scores, double log_bound, double log_min_p, int weight_bits) {
  const int64_t spans = spans_of(op.mixture.base.columns), shares = spans * block_threads, r = first + blockIdx.x;
  const float* const score = scores.score + blockIdx.x * spans * span_columns;
  const float* const largest = scores.largest + blockIdx.x * shares;
  uint32_t* const listed = scores.listed + blockIdx.x * spans * span_columns;
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < shares; i += row_threads) top = fmaxf(top, largest[i]);
  top = reduce_block<row_threads>(top, [](float a, float b) { return fmaxf(a, b); });
  if (mixture_of_row(op.mixture, r, [&](int64_t i) { return states[i]; }).broken() || !(top > -INFINITY)) {
    if (threadIdx.x == 0) op.tokens[r] = -1;
    return;
  }
  // exp(score − top) in fixed point: the sum over any vocabulary stays below 2⁶².
  const float one = static_cast<float>(uint64_t{1} << weight_bits);
  const auto weight_of_score = [&](float s) { return static_cast<uint64_t>(exponential(s - top) * one); };

  // A score that no token which is kept can lie below.
  //   top_k   the k-th largest of the maxima of shares: k shares have a token that reaches it
  //   top_p   all tokens with less than (1 − top_p) / V of the likeliest one's probability hold less than 1 − top_p together
  //   min_p   its own bound
  uint32_t least = rank_of(-INFINITY) + 1;
  if (op.top_k == 0) {
    least = rank_of(static_cast<float>(static_cast<double>(top) + log_bound));
  } else if (op.top_k <= shares) {
    const auto share = [&](int64_t i, const auto& use) { use(rank_of(largest[i]), uint64_t{1}); };
    least = border_at(shares, static_cast<uint64_t>(shares - op.top_k), share).key;
  }
  if (least <= rank_of(-INFINITY)) least = rank_of(-INFINITY) + 1;

  // The tokens from there on, in no order; and with top_p alone Σ exp(score − top) over all tokens, which it is a share of.
  uint32_t& length = shared<uint32_t>();
  if (threadIdx.x == 0) length = 0;
  __syncthreads();
  const bool needs_whole = op.top_p < 1 && op.top_k == 0;
  uint64_t whole = 0;
  for (int64_t i = threadIdx.x; i < shares; i += row_threads) {
    const bool has_any = rank_of(largest[i]) >= least;
    if (!has_any && !needs_whole) continue;
    const int64_t span = i / block_threads, begin = span * span_columns + i % block_threads;
    uint32_t passing = 0;
#pragma unroll
    for (int j = 0; j < share_size; ++j) {
      const float s = score[begin + j * block_threads];
      if (needs_whole) whole += weight_of_score(s);
      passing |= uint32_t{rank_of(s) >= least} << j;
    }
    if (!has_any) continue;
    uint32_t place = atomicAdd(&length, static_cast<uint32_t>(__popc(passing)));
    for (; passing != 0; passing &= passing - 1)
      listed[place++] = static_cast<uint32_t>(begin + (__ffs(static_cast<int>(passing)) - 1) * block_threads);
  }
  __syncthreads();  // the list is whole
  const int64_t count = length;

  const auto key_of = [&](int64_t i) { return rank_of(score[listed[i]]); };
  uint32_t lowest = 0;  // of the keys that top_k keeps
  if (op.top_k > 0 && op.top_k < count)
    lowest = border_at(count, static_cast<uint64_t>(count - op.top_k), [&](int64_t i, const auto& use) { use(key_of(i), uint64_t{1}); }).key;

  uint32_t border = 0;        // top_p keeps the keys above it,
  int64_t last_dropped = -1;  // and of equal keys the tokens above this
  if (op.top_p < 1) {
    const auto weight_at = [&](int64_t i) { return key_of(i) >= lowest ? weight_of_score(score[listed[i]]) : 0; };
    uint64_t left = 0;
    for (int64_t i = threadIdx.x; i < count; i += row_threads) left += weight_at(i);
    left = sum_over_block<row_threads>(left);
    whole = needs_whole ? sum_over_block<row_threads>(whole) : left;
    const uint64_t share = static_cast<uint64_t>((1 - op.top_p) * static_cast<double>(whole));
    if (share >= whole - left) {
      uint64_t limit = share - (whole - left);
      if (limit >= left) limit = left - 1;  // the last token stays
      const Border at = border_at(count, limit, [&](int64_t i, const auto& use) { use(key_of(i), weight_at(i)); });
      border = at.key;
      // Of the tokens at the border, all of one weight, so many go:
      const float border_score = float_of_bits(border ^ (border >> 31 ? 0x80000000u : 0xffffffffu));
      const uint64_t dropped = (limit - at.below) / weight_of_score(border_score);
      if (dropped > 0) {
        const auto tokens_there = [&](int64_t i, const auto& use) {
          if (key_of(i) == border) use(scores.token_at(listed[i]), uint64_t{1});
        };
        last_dropped = border_at(count, dropped - 1, tokens_there).key;
      }
    }
  }

  const float floor = op.min_p > 0 ? static_cast<float>(static_cast<double>(top) + log_min_p) : -INFINITY;
  const uint64_t seed = seed_of(op, r), offset = offset_of(op, r);
  Winner best;
  for (int64_t i = threadIdx.x; i < count; i += row_threads) {
    const uint32_t key = key_of(i), token = scores.token_at(listed[i]);
    const float s = score[listed[i]];
    if (key < lowest || key < border || (key == border && int64_t{token} <= last_dropped) || s < floor) continue;
    const double noisy = static_cast<double>(s) + static_cast<double>(gumbel_of<float>(draw_of(seed, offset, noise_stream, token)));
    best = Winner::merge(best, {noisy, static_cast<int32_t>(token)});
  }
  best = reduce_block<row_threads>(best, Winner::merge);
  if (threadIdx.x == 0) op.tokens[r] = best.token;
}

// ---------------------------------------------------------------------------------------------------------------- launcher

bool has_cuts(const InterpolateSample& op) { return op.top_k > 0 || op.top_p < 1 || op.min_p > 0; }

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states = nullptr;
  Winner* winners = nullptr;
  Scores scores{};
};

Scratch scratch_of(const InterpolateSample& op, Parts& parts) {
  const Rows& rows = op.mixture.base;
  const bool cuts = has_cuts(op);
  Scratch scratch;
  if (cuts || op.temperature != 1) scratch.states = parts.take<Softmax<float>>(span_states(op.mixture));
  if (!cuts) {
    scratch.winners = parts.take<Winner>(rows.count * spans_of(rows.columns));
    return scratch;
  }
  const int64_t spans = smaller(rows.count, rows_at_once) * spans_of(rows.columns);
  scratch.scores.score = parts.take<float>(spans * span_columns);
  scratch.scores.largest = parts.take<float>(spans * block_threads);
  scratch.scores.listed = parts.take<uint32_t>(spans * span_columns);
  return scratch;
}

template <class T>
void draw_warped(const InterpolateSample& op, Scratch scratch, cudaStream_t stream) {
  const Rows& rows = op.mixture.base;
  const int64_t spans = spans_of(rows.columns);
  int weight_bits = 61;
  while (rows.columns >> (61 - weight_bits) > 0) --weight_bits;
  // The margin is for the rounding of scores and sums: what it lets through is cut exactly later.
  const double share = op.top_p < 1 ? (1 - op.top_p) / static_cast<double>(rows.columns) : op.min_p;
  const double log_bound = log(share) - 1e-2, log_min_p = op.min_p > 0 ? log(op.min_p) : 0;
  scratch.scores.width = width_of<T>;
  for (int64_t first = 0; first < rows.count; first += rows_at_once) {
    const int64_t count = smaller(rows_at_once, rows.count - first);
    launch(score_spans<T>, count * spans, block_threads, 0, stream, op, scratch.states, first, scratch.scores);
    launch(draw_from_scores, count, row_threads, 0, stream, op, scratch.states, first, scratch.scores, log_bound, log_min_p, weight_bits);
  }
}

}  // namespace

int64_t workspace_bytes(const InterpolateSample& op) {
  Parts parts(nullptr);
  scratch_of(op, parts);
  return parts.bytes();
}

Status interpolate_sample(const InterpolateSample& op, const Launch& where) {
  const Rows& rows = op.mixture.base;
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (rows.count == 0) return;
    Parts parts(where.workspace);
    const Scratch scratch = scratch_of(op, parts);
    const int64_t blocks = rows.count * spans_of(rows.columns);
    if (scratch.states) launch(reduce_spans<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, scratch.states);
    if (has_cuts(op)) {
      draw_warped<T>(op, scratch, stream);
      return;
    }
    if (scratch.states) launch(draw_from_mixed_spans<T>, blocks, block_threads, 0, stream, op, scratch.states, scratch.winners);
    else launch(draw_from_spans<T>, blocks, block_threads, 0, stream, op, scratch.winners);
    launch(pick_winners, rows.count, warp_size, 0, stream, op, scratch.winners);
  });
}

}  // namespace memdec::cuda
