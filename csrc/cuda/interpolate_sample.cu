// interpolate_sample: a token drawn from p_mix by Gumbel-max, g(v) being the Gumbel noise of (seed, offset, v): core/noise.h, as on
// the CPU, so that one seed draws one token on both.
//
//   nothing warped    a coin of probability α picks one of the two components, and the draw is from that one, in two steps: the
//                     span s of largest log Σ exp(z) + g(s), then of its tokens the v of largest z(v) + g(v). An exponential a
//                     token, which leaves the kernel waiting for memory; a random number and two logarithms for each would not.
//   temperature only  the same two steps, of the scores log p_mix / T.
//   cuts              scores log p_mix / T are written, and what the warpers keep of them is found as transformers defines it
//                     (cuda/cuts.cuh); of that, argmax of the scores + g(v), in one step.
//
//   reduce   a block a span: its softmax state, of the row that the coin picks, or of both components
//   merge    warped: a warp a row: the states of its spans as one
//   scale    temperature only: a block a span: the state of its scores
//   draw     a block a row: a span by the states of all, and a token of that span
//
// Traffic: coin: each logit of one tensor once. Temperature: each logit of both twice. Both: and those of the span drawn, 16 or 8 KB a
// row. Cuts: each logit of both twice, V scores written once and read twice (with min_p alone, once), in the second-level cache; rows
// that are at work at a time, at most 256 and 2560 spans of them, have 12 bytes a token in the workspace.
#include "cuda/cuts.cuh"
#include "cuda/merged_rows.cuh"

namespace memdec::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------------ nothing warped

// The row that the coin picks; null where α is outside [0, 1].
template <class T>
__device__ inline const T* picked_row(const InterpolateSample& op, int64_t r, uint64_t seed, uint64_t offset) {
  const double alpha = alpha_of(op.mixture, r);
  if (!(alpha >= 0 && alpha <= 1)) return nullptr;
  const bool heads = uniform(draw_of(seed, offset, coin_stream, 0)) < alpha;
  return row_of<const T>(heads ? op.mixture.memory : op.mixture.base, r);
}

// A block a span.
template <class T>
__global__ void __launch_bounds__(block_threads) reduce_picked_spans(InterpolateSample op, Softmax<float>* states) {
  let_next_kernel_start();
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const T* const z = picked_row<T>(op, r, seed_of(op, r), offset_of(op, r));
  if (!z) return;
  float value[share_size];
  load_share(z, columns, span, value);
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// A block a row, each warp of which draws the span. What does not depend on the states is done before they are there.
template <class T>
__global__ void __launch_bounds__(block_threads) draw_from_picked(InterpolateSample op, const Softmax<float>* states) {
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns), r = blockIdx.x;
  const uint64_t seed = seed_of(op, r), offset = offset_of(op, r);
  const T* const z = picked_row<T>(op, r, seed, offset);
  const SpanNoise noise(seed, offset);
  wait_for_kernel_before();
  Winner winner;
  if (z) {
    const int64_t span = noise.drawn(spans, [&](int64_t i) { return states[r * spans + i]; });
    if (span >= 0) {
      float value[share_size];
      load_share(z, columns, span, value);
      winner = winner_of_span<T>(value, columns, span, seed, offset, noise_stream, [&](int64_t column) { return widened(z[column]); });
    }
  }
  if (threadIdx.x == 0) op.tokens[r] = winner.token;
}

// ------------------------------------------------------------------------------------------------------------------------- warped

// `count` vectors of this thread's share of a span of a row, from the share's number `first` on, as they lie in memory; −inf beyond
// the row's end. As load_share loads them, but in half the registers where they are of half precision.
template <int count, class T>
__device__ inline void load_vectors(const T* row, int64_t columns, int64_t span, int first, uint4 (&vector)[count]) {
  constexpr int w = width_of<T>;
  const auto load_all = [&](auto load, int64_t margin) {
    if (span * span_columns >= margin && (span + 1) * span_columns + margin <= columns) {
#pragma unroll
      for (int v = 0; v < count; ++v) vector[v] = load(row + column_of<T>(span, (first + v) * w));
      return;
    }
#pragma unroll
    for (int v = 0; v < count; ++v) {
      const int64_t c = column_of<T>(span, (first + v) * w);
      if (c >= margin && c + w + margin <= columns) {
        vector[v] = load(row + c);
      } else {
        float value[w];
#pragma unroll
        for (int i = 0; i < w; ++i) value[i] = c + i < columns ? widened(row[c + i]) : -INFINITY;
        vector[v] = pack(T{}, value);
      }
    }
  };
  if (is_aligned(row)) load_all([](const T* address) { return load_aligned(address); }, 0);
  else load_all([](const T* address) { return load_across(address); }, w);
}

// Temperature only: a block a span. Eight blocks fit on a multiprocessor: logits stay packed, 64 bytes of each component at a time,
// until they become scores.
template <class T>
__global__ void __launch_bounds__(block_threads, 8) scale_spans(InterpolateSample op, const LogProb* rows, Softmax<float>* states) {
  let_next_kernel_start();
  constexpr int w = width_of<T>, at_once = 4, parts = share_size / w / at_once;
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const double alpha = alpha_of(op.mixture, r);
  uint4 z[components][at_once];
  const auto load = [&](int part) {
#pragma unroll
    for (int c = 0; c < components; ++c) {
      if (weight_of(alpha, c) > 0) {
        load_vectors(row_of<const T>(rows_of(op.mixture, c), r), columns, span, part * at_once, z[c]);
      } else {
        constexpr float lowest[] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
        for (int v = 0; v < at_once; ++v) z[c][v] = pack(T{}, lowest);
      }
    }
  };
  load(0);
  wait_for_kernel_before();  // rows
  const LogProb log_prob = rows[r];
  const float sharpness = sharpness_of(op);
  float value[share_size];
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    if (part > 0) load(part);
#pragma unroll
    for (int v = 0; v < at_once; ++v) {
      float z_base[w], z_memory[w];
      unpack(T{}, z[base][v], z_base);
      unpack(T{}, z[memory][v], z_memory);
#pragma unroll
      for (int i = 0; i < w; ++i) value[(part * at_once + v) * w + i] = scored(log_prob(z_base[i], z_memory[i]), sharpness);
    }
  }
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// Temperature only: a block a row, each warp of which draws the span.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) draw_from_mixed(InterpolateSample op, const LogProb* rows, const Softmax<float>* states) {
  const int64_t spans = spans_of(op.mixture.base.columns), r = blockIdx.x;
  const uint64_t seed = seed_of(op, r), offset = offset_of(op, r);
  const SpanNoise noise(seed, offset);
  const float sharpness = sharpness_of(op);
  wait_for_kernel_before();
  const LogProb row = rows[r];
  Winner winner;
  const int64_t span = noise.drawn(spans, [&](int64_t i) { return states[r * spans + i]; });
  if (span >= 0) {
    float value[share_size];
    scores_of_share<T>(op.mixture, r, span, row, sharpness, value);
    winner = winner_of_scores<T>(op.mixture, r, span, row, sharpness, value, seed, offset);
  }
  if (threadIdx.x == 0) op.tokens[r] = winner.token;
}

// Cuts: a block a span of a row's scores.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) score_spans(InterpolateSample op, const LogProb* rows, int64_t first, Scores scores) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(scores.columns), i = blockIdx.x / spans, r = first + i;
  write_scores<T>(op.mixture, r, blockIdx.x % spans, rows[r], sharpness_of(op), scores.row(i));
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
  Softmax<float>* states = nullptr;  // (rows, spans), of what the coin picked; warped: (rows, spans, components)
  LogProb* rows = nullptr;           // (rows,) warped
  Softmax<float>* scaled = nullptr;  // (rows, spans) temperature only
  Scores scores{};                   // cuts
};

Scratch scratch_of(const InterpolateSample& op, Parts& parts) {
  const Rows& rows = op.mixture.base;
  Scratch scratch;
  scratch.states = parts.take<Softmax<float>>(is_plain(op) ? rows.count * spans_of(rows.columns) : span_states(op.mixture));
  if (is_plain(op)) return scratch;
  scratch.rows = parts.take<LogProb>(rows.count);
  if (has_cuts(op)) scratch.scores = take_scores(parts, rows.count, rows.columns);
  else scratch.scaled = parts.take<Softmax<float>>(rows.count * spans_of(rows.columns));
  return scratch;
}

template <class T>
void draw_with_cuts(const InterpolateSample& op, const Scratch& scratch, cudaStream_t stream) {
  const int64_t rows = op.mixture.base.count, columns = op.mixture.base.columns;
  const Cuts cuts = cuts_of(op);
  for (int64_t first = 0; first < rows; first += rows_at_once(columns)) {
    const int64_t count = smaller(rows_at_once(columns), rows - first), blocks = count * spans_of(columns);
    launch_early(score_spans<T>, blocks, block_threads, 0, stream, op, scratch.rows, first, scratch.scores);
    if (cuts.have_borders()) launch_early(bin_scores, blocks, block_threads, 0, stream, scratch.scores, cuts);
    launch_early(draw_from_scores, blocks, block_threads, 0, stream, op, first, scratch.scores, cuts);
    launch_early(cut_rows, count, row_threads, 0, stream, op, first, scratch.scores, cuts);
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
    if (is_plain(op)) {
      launch(reduce_picked_spans<T>, blocks, block_threads, 0, stream, op, scratch.states);
      launch_early(draw_from_picked<T>, rows.count, block_threads, 0, stream, op, scratch.states);
      return;
    }
    launch(reduce_spans<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, scratch.states);
    launch_early(merge_states, rows.count, warp_size, 0, stream, op.mixture, scratch.states, scratch.rows);
    if (has_cuts(op)) {
      draw_with_cuts<T>(op, scratch, stream);
      return;
    }
    launch_early(scale_spans<T>, blocks, block_threads, 0, stream, op, scratch.rows, scratch.scaled);
    launch_early(draw_from_mixed<T>, rows.count, block_threads, 0, stream, op, scratch.rows, scratch.scaled);
  });
}

}  // namespace memdec::cuda
