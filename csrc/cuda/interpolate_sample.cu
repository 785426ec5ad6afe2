// interpolate_sample: a token drawn from p_mix by Gumbel-max, argmax over v of log p_mix(v) / T + g(v), g(v) the Gumbel noise
// of (seed, offset, v): core/noise.h, as on the CPU, so that one seed draws one token on both.
//
//   nothing warped    a coin of probability α picks one of the two components, and the draw is from that one: argmax of
//                     z(v) + g(v). Half the bytes, no exponentials of logits, no sums.
//   temperature only  argmax of log p_mix(v) / T + g(v).
//   cuts              scores log p_mix / T are written, and what the warpers keep of them is found as transformers defines it
//                     (cuda/cuts.cuh); of that, argmax of the scores + g(v).
//
// Traffic: coin: each logit of one tensor once. Temperature: each logit of both twice. Cuts: each logit of both twice, V scores
// written once and read twice (with min_p alone, once), in the second-level cache; rows that are at work at a
// time, at most 256 and 2560 spans of them, have 12 bytes a token in the workspace.
#include "cuda/cuts.cuh"

namespace memdec::cuda {
namespace {

// Nothing warped: a block a span of the row that the coin picks.
template <class T>
__global__ void __launch_bounds__(block_threads) draw_from_spans(InterpolateSample op, Winner* winners) {
  let_next_kernel_start();
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const uint64_t seed = seed_of(op, r), offset = offset_of(op, r);
  const double alpha = alpha_of(op.mixture, r);
  Winner winner = Winner::broken();
  if (alpha >= 0 && alpha <= 1) {
    const bool heads = uniform(draw_of(seed, offset, coin_stream, 0)) < alpha;
    const T* const z = row_of<const T>(heads ? op.mixture.memory : op.mixture.base, r);
    float value[share_size];
    load_share(z, columns, span, value);
    winner = winner_of_span<T>(value, columns, span, seed, offset, noise_stream,
                               [&](int64_t column) { return widened(z[column]); });
  }
  if (threadIdx.x == 0) winners[blockIdx.x] = winner;
}

// Temperature only: a block a span of the mixture.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) draw_from_mixed_spans(InterpolateSample op, const Softmax<float>* states, Winner* winners) {
  let_next_kernel_start();
  const int64_t spans = spans_of(op.mixture.base.columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const float sharpness = sharpness_of(op);
  const MixtureRow row = mixture_of_row(op.mixture, r, [&](int64_t i) { return states[i]; });
  float value[share_size];
  scores_of_share<T>(op.mixture, r, span, row, sharpness, value);
  const Winner winner = winner_of_scores<T>(op.mixture, r, span, row, sharpness, value, seed_of(op, r), offset_of(op, r));
  if (threadIdx.x == 0) winners[blockIdx.x] = winner;
}

// A warp a row: the best of its spans.
__global__ void __launch_bounds__(warp_size) pick_winners(InterpolateSample op, const Winner* winners) {
  wait_for_kernel_before();
  const int64_t r = blockIdx.x, spans = spans_of(op.mixture.base.columns);
  Winner best;
  for (int64_t i = threadIdx.x; i < spans; i += warp_size) best = Winner::merge(best, winners[r * spans + i]);
  best = reduce_warp(best, Winner::merge);
  if (threadIdx.x == 0) op.tokens[r] = best.token;
}

// Cuts: a block a span of a row's scores.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) score_spans(InterpolateSample op, const Softmax<float>* states, int64_t first,
                                                               Scores scores) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(scores.columns), i = blockIdx.x / spans, r = first + i;
  const MixtureRow row = mixture_of_row(op.mixture, r, [&](int64_t state) { return states[state]; });
  write_scores<T>(op.mixture, r, blockIdx.x % spans, row, sharpness_of(op), scores.row(i));
}

// A block a span of a row's scores.
__global__ void __launch_bounds__(block_threads) draw_from_scores(InterpolateSample op, int64_t first, Scores scores, Cuts cuts) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(scores.columns), i = blockIdx.x / spans, r = first + i;
  const Drawn drawn = draw_from_span(scores.row(i), blockIdx.x % spans, cuts, false, true, seed_of(op, r), offset_of(op, r));
  if (threadIdx.x == 0) scores.drawn[blockIdx.x] = drawn;
}

// A block a row. (Bounds without the 1 give fewer registers, and spills: here and above.)
__global__ void __launch_bounds__(row_threads, 1) cut_rows(InterpolateSample op, int64_t first, Scores all, Cuts cuts) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t r = first + blockIdx.x;
  const Scores scores = all.row(blockIdx.x);
  const float top = top_of(scores);
  Drawn drawn;
  if (top > -INFINITY) drawn = draw_from_row(scores, top, cuts, cut_row(scores, top, cuts), false, true, seed_of(op, r), offset_of(op, r));
  if (threadIdx.x == 0) op.tokens[r] = drawn.winner.token;
}

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states = nullptr;
  Winner* winners = nullptr;
  Scores scores{};
};

Scratch scratch_of(const InterpolateSample& op, Parts& parts) {
  const Rows& rows = op.mixture.base;
  Scratch scratch;
  if (!is_plain(op)) scratch.states = parts.take<Softmax<float>>(span_states(op.mixture));
  if (has_cuts(op)) scratch.scores = take_scores(parts, rows.count, rows.columns);
  else scratch.winners = parts.take<Winner>(rows.count * spans_of(rows.columns));
  return scratch;
}

template <class T>
void draw_with_cuts(const InterpolateSample& op, const Scratch& scratch, cudaStream_t stream) {
  const int64_t rows = op.mixture.base.count, columns = op.mixture.base.columns;
  const Cuts cuts = cuts_of(op);
  for (int64_t first = 0; first < rows; first += rows_at_once(columns)) {
    const int64_t count = smaller(rows_at_once(columns), rows - first), blocks = count * spans_of(columns);
    launch_early(score_spans<T>, blocks, block_threads, stream, op, scratch.states, first, scratch.scores);
    if (cuts.have_borders()) launch_early(bin_scores, blocks, block_threads, stream, scratch.scores, cuts);
    launch_early(draw_from_scores, blocks, block_threads, stream, op, first, scratch.scores, cuts);
    launch_early(cut_rows, count, row_threads, stream, op, first, scratch.scores, cuts);
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
      draw_with_cuts<T>(op, scratch, stream);
      return;
    }
    if (scratch.states) launch(draw_from_mixed_spans<T>, blocks, block_threads, 0, stream, op, scratch.states, scratch.winners);
    else launch(draw_from_spans<T>, blocks, block_threads, 0, stream, op, scratch.winners);
    launch_early(pick_winners, rows.count, warp_size, stream, op, scratch.winners);
  });
}

}  // namespace memdec::cuda
