// What transformers' warpers keep of a row of scores (log-probs over the temperature), and the draw from it.
//
//   top_k   scores at least the k-th largest (all ties)
//   top_p   from the least likely up (equals: lower ids first), tokens go while the running probability of what top_k left is at
//           most 1 − top_p; the last stays
//   min_p   scores at least the largest + log(min_p)
//
// top_k and top_p end at a border: the score at which a sum over the tokens from the least likely up, of 1 or of their
// probabilities, exceeds a limit. Tens of thousands of tokens may have a part in it, so the whole device looks for it, in four
// kernels:
//
//   score   a block a span: its scores, and the largest of them
//   bin     a block a span: counts and sums of what lies in each of 1024 bins of equal width below the row's largest score
//   draw    a block a span: the bins' sums tell which bin the border is in. Tokens in the bins above are kept, and the best of them
//           is drawn; those in the border's bin, few as a rule, are listed
//   cut     a block a row: the border among the listed, and the draw from what is kept of them
//
// Sums are in fixed point: in whatever order tokens are listed and added, they have the same bits. How wide the bins are is a
// matter of time alone: the listed may be a whole row.
#pragma once

#include "cuda/sampling.cuh"
#include "cuda/scan.cuh"

namespace memdec::cuda {
namespace {

constexpr int row_threads = 512;  // of a block that has a row
constexpr int bin_bits = 10, bins = 1 << bin_bits;

// How many rows have scores in the workspace at a time: 2560 spans are 42 MB, which the second-level cache of a large device holds.
inline int64_t rows_at_once(int64_t columns) { return smaller(256, larger(1, 2560 / spans_of(columns))); }

// The best of some tokens, and the sum of their weights.
struct Drawn {
  Winner winner;
  uint64_t mass = 0;
};

struct Bins {
  unsigned long long mass[bins];
  uint32_t count[bins];
};

// Of rows that are at work, row by row.
struct Scores {
  float* score;  // (rows, spans · span_columns), undefined beyond the end of a row
  float* top;    // (rows, spans) the largest of a span; −inf in all of a row's from which nothing can be drawn
  Bins* binned;  // (rows,)
  uint32_t* listed;     // (rows, spans · span_columns) tokens, in no order,
  float* listed_score;  // and their scores
  uint32_t* length;     // (rows,) of the list
  Drawn* drawn;         // (rows, spans) of what is kept and not listed
  int64_t columns;

  __device__ Scores row(int64_t i) const {
    const int64_t spans = spans_of(columns), tokens = i * spans * span_columns;
    return {score + tokens, top + i * spans, binned + i, listed + tokens, listed_score + tokens, length + i, drawn + i * spans, columns};
  }
};

inline Scores take_scores(Parts& parts, int64_t rows, int64_t columns) {
  const int64_t count = smaller(rows, rows_at_once(columns)), spans = count * spans_of(columns);
  return {.score = parts.take<float>(spans * span_columns),
          .top = parts.take<float>(spans),
          .binned = parts.take<Bins>(count),
          .listed = parts.take<uint32_t>(spans * span_columns),
          .listed_score = parts.take<float>(spans * span_columns),
          .length = parts.take<uint32_t>(count),
          .drawn = parts.take<Drawn>(spans),
          .columns = columns};
}

// The warpers that cut, with what the host computes of them once.
struct Cuts {
  int64_t top_k;  // 0: none
  double top_p;
  double min_p;
  double log_min_p;
  float bins_a_unit;  // of score
  float one;          // 1 in fixed point: exp(score − top) of any vocabulary add up to less than 2⁶²

  bool have_borders() const { return top_k > 0 || top_p < 1; }
};
template <class Op>
inline Cuts cuts_of(const Op& op) {
  const int64_t columns = op.mixture.base.columns;
  int weight_bits = 61;
  while (columns >> (61 - weight_bits) > 0) --weight_bits;
  // Bins reach down to where, at temperature 1, a token has e⁻⁶⁴ of the likeliest one's probability; no border of top_p lies as low
  // as (1 − top_p) / V, since all tokens below that hold less than 1 − top_p together.
  double range = 64 / op.temperature;
  if (op.top_p < 1) range = fmin(range, -log((1 - op.top_p) / static_cast<double>(columns)) + 1e-2);
  return {.top_k = op.top_k < columns ? op.top_k : 0,
          .top_p = op.top_p,
          .min_p = op.min_p,
          .log_min_p = op.min_p > 0 ? log(op.min_p) : 0,
          .bins_a_unit = static_cast<float>(fmin(bins / range, 1e30)),
          .one = static_cast<float>(uint64_t{1} << weight_bits)};
}

// exp(score − top) in fixed point.
struct Weight {
  float top, one;
  __device__ uint64_t operator()(float score) const { return static_cast<uint64_t>(decay(score - top) * one); }
};

// The bits of a float as an unsigned number of the same order.
__device__ inline uint32_t rank_of(float x) {
  const uint32_t bits = bits_of_float(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float score_of_rank(uint32_t rank) { return float_of_bits(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu)); }

// The bin of a score; no higher score is in a lower bin.
__device__ inline int bin_of(float score, float top, const Cuts& cuts) {
  return bins - 1 - static_cast<int>(fminf((top - score) * cuts.bins_a_unit, bins - 1));
}

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
__device__ inline float floor_of(float top, const Cuts& cuts) {
  return cuts.min_p > 0 ? static_cast<float>(static_cast<double>(top) + cuts.log_min_p) : -INFINITY;
}

// ------------------------------------------------------------------------------------------------------------------- sums

// Sums of 64 bits that the threads of a block add to. Shared memory adds up to 32 bits at a time: what overflows is carried.
struct SharedSums {
  uint32_t low[bins], high[bins];

  __device__ void clear(int bin) { low[bin] = high[bin] = 0; }
  __device__ void add(int bin, uint64_t weight) {
    const uint32_t part = static_cast<uint32_t>(weight), before = atomicAdd(&low[bin], part);
    const uint32_t rest = static_cast<uint32_t>(weight >> 32) + (before + part < before);
    if (rest > 0) atomicAdd(&high[bin], rest);
  }
  __device__ uint64_t of(int bin) const { return uint64_t{high[bin]} << 32 | low[bin]; }
};

// A bin, its sum, and the sum of those below it.
struct Place {
  int bin;
  uint64_t below, sum;
};

// The sums of all bins, some with each thread of a block. Every thread must make each call.
template <int threads>
struct Sums {
  static constexpr int each = bins / threads;
  uint64_t sum[each], before, own = 0;

  template <class F>
  explicit __device__ Sums(const F& of_bin) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      sum[i] = of_bin(static_cast<int>(threadIdx.x) * each + i);
      own += sum[i];
    }
    before = Team<threads>::sum_before(own);
  }
  __device__ uint64_t total() const { return sum_over_block<threads>(own); }

  // The one bin for which is_it(place).
  template <class F>
  __device__ Place find(const F& is_it) const {
    Place& found = shared<Place>();
    __syncthreads();  // one that was found before may still be read
    Place place{static_cast<int>(threadIdx.x) * each, before, 0};
#pragma unroll
    for (int i = 0; i < each; ++i, ++place.bin) {
      place.sum = sum[i];
      if (is_it(place)) found = place;
      place.below += sum[i];
    }
    __syncthreads();
    return found;
  }
  // The bin in which the running sum exceeds a limit, which is less than the total.
  __device__ Place exceeding(uint64_t limit) const {
    return find([=](const Place& place) { return place.below <= limit && limit - place.below < place.sum; });
  }
};

// Where a running sum of weights, in ascending order of keys, exceeds a limit.
struct Border {
  uint32_t key;    // the least for which the weights of all keys up to it sum to more than the limit
  uint64_t below;  // the sum of the weights of the keys below it
};

// item(i, use) calls use(key, weight) for item i of `count`, or leaves it out. Keys lie in [lowest, highest], and the sum of all
// weights exceeds the limit. Every thread of the row's block must call it.
template <class F>
__device__ inline Border border_at(int64_t count, uint32_t lowest, uint32_t highest, uint64_t limit, const F& item) {
  SharedSums& sums = shared<SharedSums>();
  Border border{lowest, 0};
  int bits = 32 - __clz(static_cast<int>(highest - lowest));
  while (bits > 0) {  // the border is in [border.key, border.key + 2^bits)
    const int shift = bits > bin_bits ? bits - bin_bits : 0;
    for (int b = threadIdx.x; b < bins; b += row_threads) sums.clear(b);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += row_threads)
      item(i, [&](uint32_t key, uint64_t weight) {
        const uint32_t bin = (key - border.key) >> shift;
        if (key >= border.key && bin < bins) sums.add(static_cast<int>(bin), weight);
      });
    __syncthreads();  // the sums are whole
    const Sums<row_threads> all([&](int b) { return sums.of(b); });
    const Place at = all.exceeding(limit - border.below);
    border.key += static_cast<uint32_t>(at.bin) << shift;
    border.below += at.below;
    bits = shift;
  }
  return border;
}

// ---------------------------------------------------------------------------------------------------------------- kernels

// The block's span of a row of scores; clears what the next kernels add to. `scores` is the row's.
template <class T, class Row>
__device__ inline void write_scores(const Mixture& mixture, int64_t r, int64_t span, const Row& row, float sharpness,
                                    const Scores& scores) {
  float value[share_size], top = -INFINITY;
  scores_of_share<T>(mixture, r, span, row, sharpness, value);
#pragma unroll
  for (int i = 0; i < share_size; ++i) top = fmaxf(top, value[i]);  // −inf in a broken row, which is all NaN
  store_floats<T>(scores.score, scores.columns, span, value, 0);
  top = reduce_block<block_threads>(top, [](float a, float b) { return fmaxf(a, b); });
  const int64_t threads = spans_of(scores.columns) * block_threads, thread = span * block_threads + threadIdx.x;
  for (int64_t b = thread; b < bins; b += threads) scores.binned->mass[b] = 0, scores.binned->count[b] = 0;
  if (thread == 0) *scores.length = 0;
  if (threadIdx.x == 0) scores.top[span] = top;
}

// The largest score of a row, known to every thread of its block.
__device__ inline float top_of(const Scores& scores) {
  float top = -INFINITY;
  for (int64_t span = lane_of_thread(); span < spans_of(scores.columns); span += warp_size) top = fmaxf(top, scores.top[span]);
  return reduce_warp(top, [](float a, float b) { return fmaxf(a, b); });
}

// A block a span of the rows at work. Not where there is no border.
__global__ void __launch_bounds__(block_threads) bin_scores(Scores all, Cuts cuts) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(all.columns), span = blockIdx.x % spans;
  const Scores scores = all.row(blockIdx.x / spans);
  float value[share_size];
  load_share(static_cast<const float*>(scores.score), scores.columns, span, value);
  const float top = top_of(scores);
  if (!(top > -INFINITY)) return;

  struct SpanBins {
    SharedSums mass;
    uint32_t count[bins];
  };
  SpanBins& mine = shared<SpanBins>();
  for (int b = threadIdx.x; b < bins; b += block_threads) mine.mass.clear(b), mine.count[b] = 0;
  __syncthreads();
  const Weight weight_of{top, cuts.one};
  const bool counts = cuts.top_k > 0, weighs = cuts.top_p < 1;
  uint64_t lowest_mass = 0;  // the lowest bin has all that lies further down: most tokens, at times
  uint32_t lowest_count = 0;
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    const int bin = bin_of(value[i], top, cuts);
    const uint64_t weight = weighs ? weight_of(value[i]) : 0;
    lowest_mass += bin == 0 ? weight : 0;
    lowest_count += bin == 0 && value[i] > -INFINITY;
    if (bin > 0 && weighs) mine.mass.add(bin, weight);
    if (bin > 0 && counts) atomicAdd(&mine.count[bin], 1u);
  }
  lowest_mass = reduce_warp(lowest_mass, [](uint64_t a, uint64_t b) { return a + b; });
  lowest_count = reduce_warp(lowest_count, [](uint32_t a, uint32_t b) { return a + b; });
  if (lane_of_thread() == 0) {
    mine.mass.add(0, lowest_mass);
    atomicAdd(&mine.count[0], lowest_count);
  }
  __syncthreads();  // the span's sums are whole
  for (int b = threadIdx.x; b < bins; b += block_threads) {
    if (const uint64_t mass = mine.mass.of(b); mass > 0) atomicAdd(&scores.binned->mass[b], static_cast<unsigned long long>(mass));
    if (const uint32_t count = mine.count[b]; count > 0) atomicAdd(&scores.binned->count[b], count);
  }
}

// The bins in which a token is kept or not by its score: [first, last], none where there is no border. Tokens in the bins above are
// kept (unless min_p drops them), tokens below are not.
struct Undecided {
  int first = 0, last = -1;
  bool has_kth = false;  // top_k drops tokens, of those in these bins so many:
  uint64_t excess = 0;
  uint64_t below = 0, above = 0;  // the mass of the bins below, if top_p is to drop it, and above
};

// Every thread of the block must call it.
template <int threads>
__device__ inline Undecided undecided_of(const Scores& scores, const Cuts& cuts) {
  Undecided found;
  if (cuts.top_k > 0) {
    const Sums<threads> counts([&](int b) { return scores.binned->count[b]; });
    const uint64_t total = counts.total(), top_k = static_cast<uint64_t>(cuts.top_k);
    if (top_k < total) {
      const Place kth = counts.exceeding(total - top_k);
      found = {.first = kth.bin, .last = kth.bin, .has_kth = true, .excess = total - top_k - kth.below};
    }
  }
  if (cuts.top_p < 1) {
    const Sums<threads> masses([&](int b) { return scores.binned->mass[b]; });
    const uint64_t total = masses.total();
    // What top_k drops, at most: the more it is, the higher the border of top_p.
    uint64_t dropped = 0;
    if (found.has_kth) {
      const Place kth = masses.find([&](const Place& place) { return place.bin == found.first; });
      dropped = kth.below + kth.sum;
    }
    const uint64_t limit = dropped + static_cast<uint64_t>((1 - cuts.top_p) * static_cast<double>(total - dropped));
    const Place at = masses.exceeding(limit < total ? limit : total - 1);  // the last token stays
    found.last = at.bin;
    found.above = total - at.below - at.sum;
    if (!found.has_kth) found.first = at.bin, found.below = at.below;
  }
  return found;
}

// What is kept of the block's span whatever the border is within its bins: their mass, if it is asked for, and their best, if one
// is to be drawn. Lists the tokens that the border is among. Every thread must call it.
__device__ inline Drawn draw_from_span(const Scores& scores, int64_t span, const Cuts& cuts, bool weighs, bool draws, uint64_t seed,
                                       uint64_t offset) {
  float value[share_size];
  load_share(static_cast<const float*>(scores.score), scores.columns, span, value);
  const float top = top_of(scores);
  if (!(top > -INFINITY)) return {};
  const Undecided undecided = undecided_of<block_threads>(scores, cuts);
  const Weight weight_of{top, cuts.one};
  const float floor = floor_of(top, cuts);
  const auto is_kept = [&](float score, int bin) { return bin > undecided.last && score >= floor && score > -INFINITY; };
  uint32_t listed = 0;
  uint64_t mass = 0;
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    const int bin = bin_of(value[i], top, cuts);
    listed |= uint32_t{bin >= undecided.first && bin <= undecided.last && value[i] > -INFINITY} << i;
    if (!is_kept(value[i], bin)) value[i] = -INFINITY;
    else if (weighs) mass += weight_of(value[i]);
  }
  if (listed != 0) {
    uint32_t place = atomicAdd(scores.length, static_cast<uint32_t>(__popc(listed)));
    for (; listed != 0; listed &= listed - 1, ++place) {
      const int64_t column = column_of<float>(span, __ffs(static_cast<int>(listed)) - 1);
      scores.listed[place] = static_cast<uint32_t>(column);
      scores.listed_score[place] = scores.score[column];
    }
  }
  Drawn drawn;
  if (weighs) drawn.mass = sum_over_block<block_threads>(mass);
  if (draws)
    drawn.winner = winner_of_span<float, true>(value, scores.columns, span, seed, offset, noise_stream, [&](int64_t column) {
      const float score = scores.score[column];
      return is_kept(score, bin_of(score, top, cuts)) ? score : -INFINITY;
    });
  return drawn;
}

// What is kept of a row whose largest score is `top`, finite. Every thread of its block must call it.
__device__ inline Kept cut_row(const Scores& scores, float top, const Cuts& cuts) {
  Kept kept{.lowest = rank_of(-INFINITY) + 1, .floor = floor_of(top, cuts)};
  const Undecided undecided = undecided_of<row_threads>(scores, cuts);
  if (undecided.last < 0) return kept;
  const int64_t count = *scores.length;
  const auto key_of = [&](int64_t i) { return rank_of(scores.listed_score[i]); };
  struct Range {
    uint32_t lowest = UINT32_MAX, highest = 0;
  } range;
  for (int64_t i = threadIdx.x; i < count; i += row_threads) {
    const uint32_t key = key_of(i);
    if (key < range.lowest) range.lowest = key;
    if (key > range.highest) range.highest = key;
  }
  range = reduce_block<row_threads>(range, [](Range a, Range b) {
    return Range{a.lowest < b.lowest ? a.lowest : b.lowest, a.highest > b.highest ? a.highest : b.highest};
  });

  if (undecided.has_kth) {
    const auto counted = [&](int64_t i, const auto& use) { use(key_of(i), uint64_t{1}); };
    kept.lowest = border_at(count, range.lowest, range.highest, undecided.excess, counted).key;
  }
  if (cuts.top_p < 1) {
    const Weight weight_of{top, cuts.one};
    const auto weighed = [&](int64_t i, const auto& use) {
      if (const uint32_t key = key_of(i); key >= kept.lowest) use(key, weight_of(score_of_rank(key)));
    };
    uint64_t left = 0;
    for (int64_t i = threadIdx.x; i < count; i += row_threads) weighed(i, [&](uint32_t, uint64_t weight) { left += weight; });
    left = sum_over_block<row_threads>(left);
    const uint64_t whole = undecided.below + left + undecided.above;
    uint64_t limit = static_cast<uint64_t>((1 - cuts.top_p) * static_cast<double>(whole)) - undecided.below;
    if (limit >= left) limit = left - 1;  // the last token stays
    const Border at = border_at(count, range.lowest, range.highest, limit, weighed);
    kept.border = at.key;
    // Of the tokens at the border, all of one weight, so many go:
    const uint64_t dropped = (limit - at.below) / weight_of(score_of_rank(at.key));
    if (dropped > 0) {
      const auto tokens_there = [&](int64_t i, const auto& use) {
        if (key_of(i) == at.key) use(scores.listed[i], uint64_t{1});
      };
      kept.last_dropped = border_at(count, 0, static_cast<uint32_t>(scores.columns - 1), dropped - 1, tokens_there).key;
    }
  }
  return kept;
}

// All that is kept of a row: what draw_from_span left, and of the listed what `kept` has. Every thread of its block must call it.
__device__ inline Drawn draw_from_row(const Scores& scores, float top, const Cuts& cuts, const Kept& kept, bool weighs, bool draws,
                                      uint64_t seed, uint64_t offset) {
  const Weight weight_of{top, cuts.one};
  Drawn drawn;
  for (int64_t span = threadIdx.x; span < spans_of(scores.columns); span += row_threads) {
    const Drawn of_span = scores.drawn[span];
    drawn.winner = Winner::merge(drawn.winner, of_span.winner);
    drawn.mass += of_span.mass;
  }
  const int64_t count = *scores.length;
  for (int64_t i = threadIdx.x; i < count; i += row_threads) {
    const uint32_t token = scores.listed[i];
    const float score = scores.listed_score[i];
    if (!kept.has(score, token)) continue;
    if (weighs) drawn.mass += weight_of(score);
    if (!draws) continue;
    const float noise = gumbel_of<float>(draw_of(seed, offset, noise_stream, token));
    drawn.winner = Winner::merge(drawn.winner, {static_cast<double>(score) + static_cast<double>(noise), static_cast<int32_t>(token)});
  }
  if (weighs) drawn.mass = sum_over_block<row_threads>(drawn.mass);
  if (draws) drawn.winner = reduce_block<row_threads>(drawn.winner, Winner::merge);
  return drawn;
}

}  // namespace
}  // namespace memdec::cuda
