// interpolate_argmax: the token v of the largest p_mix(v) = w_m·exp(z_m(v) − max_m) + w_b·exp(z_b(v) − max_b), where
// w_m = α/sum_m and w_b = (1−α)/sum_b.
//
// The sums are known when every logit has been read, and then the logits are gone. But the winner's p_mix is at least
// max(w_m, w_b), what the likeliest token of either component has from that component alone, so one of its two terms is at
// least half of that: its logit in that component lies within log 2 of the component's largest. So the one pass over the logits
// notes the tokens that lie so near the largest of their span (some ten in a span of 4096), and of those the winner is found.
// A span with more of them than there is room for (flat rows) is read a second time.
//
// Traffic: each logit is read from memory once, but for such spans; 76 bytes a span are written and read.
#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

static_assert(share_size <= 32, "a bit each value of a share");

constexpr float near_the_top = 0.7f;  // log 2 and a margin for the rounding of p_mix
constexpr uint32_t most_noted = 32;   // a lane of a warp each

struct Noted {
  Softmax<float> state;
  uint32_t count;  // may be more than there is room for
  uint16_t column[most_noted];  // in the span, in no order
};
static_assert(span_columns <= 1 << 16);

template <class T>
__global__ void __launch_bounds__(block_threads) note_candidates(Mixture mixture, Noted* noted) {
  let_next_kernel_start();
  float value[share_size];
  if (!load_span<T>(mixture, blockIdx.x, value)) return;
  uint32_t& count = shared<uint32_t>();
  if (threadIdx.x == 0) count = 0;
  const Softmax<float> state = softmax_of_block(value);  // its barriers also let everyone see the count of 0
  Noted& mine = noted[blockIdx.x];
  uint32_t near = 0;  // a bit each value; a branch each would be more code than the instruction cache likes
#pragma unroll
  for (int i = 0; i < share_size; ++i) near |= static_cast<uint32_t>(value[i] - state.max > -near_the_top) << i;
  for (; near != 0; near &= near - 1) {
    const uint32_t place = atomicAdd(&count, 1u);
    if (place < most_noted) mine.column[place] = static_cast<uint16_t>(column_of<T>(0, __ffs(near) - 1));
  }
  __syncthreads();  // the count is whole
  if (threadIdx.x == 0) mine.state = state, mine.count = count;
}

struct Best {
  float score = -INFINITY;
  int32_t token = -1;      // of equal scores the lowest
  uint32_t is_missing = 0;  // a list that may hold the winner did not suffice

  static __device__ Best merge(Best a, Best b) {
    const bool second = b.score > a.score || (b.score == a.score && b.token >= 0 && (b.token < a.token || a.token < 0));
    Best best = second ? b : a;
    best.is_missing = a.is_missing | b.is_missing;
    return best;
  }
};

// Warps of a block that has a row: one for each list that is in play where few rows leave the device idle, fewer where blocks abound.
constexpr int few_rows = 64, many_warps = 16, few_warps = 4;

// A block a row.
template <class T, int row_threads>
__global__ void __launch_bounds__(row_threads, 1) argmax_of_rows(InterpolateArgmax op, const Noted* noted) {
  wait_for_kernel_before();
  const Mixture& mixture = op.mixture;
  const int64_t r = blockIdx.x, columns = mixture.base.columns, spans = spans_of(columns);
  const MixtureRow row = mixture_of_row(mixture, r, [&](int64_t i) { return noted[i].state; });
  if (row.broken()) {
    if (threadIdx.x == 0) op.tokens[r] = -1;
    return;
  }
  const auto logit = [&](int c, int64_t token) {
    return row.uses(c) ? widened(row_of<const T>(rows_of(mixture, c), r)[token]) : 0.0f;
  };
  const bool mixed = row.uses(base) && row.uses(memory);
  float weight[components];
#pragma unroll  // here and below: what is indexed at run time is no register
  for (int c = 0; c < components; ++c)
    weight[c] = row.uses(c) ? static_cast<float>(weight_of(row.alpha, c) / static_cast<double>(row.of[c].sum)) : 0;

  // p_mix; of one component alone the logit itself, which exp could make equal to its neighbours.
  const auto score = [&](float z_base, float z_memory) {
    if (!mixed) return row.uses(base) ? z_base : z_memory;
    return fmaf(weight[memory], exponential(z_memory - row.of[memory].max), weight[base] * exponential(z_base - row.of[base].max));
  };
  const auto in_play = [&](int c, float z) {
    return row.uses(c) && z - (c == base ? row.of[base].max : row.of[memory].max) > -near_the_top;
  };
  Best best;
  // Of the lists, one a span and component, few reach so near the row's largest logit: each warp looks at all of them, a lane a
  // list, and takes its turn at those, a lane a token.
  const int64_t lists = spans * components;
  int turn = 0;
  for (int64_t first = 0; first < lists; first += warp_size) {
    const int64_t mine = first + lane_of_thread();
    const int c = static_cast<int>(mine % components);
    const bool plays = mine < lists && row.uses(c) && in_play(c, noted[state_at(spans, r, mine / components, c)].state.max);
    for (unsigned playing = __ballot_sync(whole_warp, plays); playing != 0; playing &= playing - 1, ++turn) {
      if (turn % (row_threads / warp_size) != warp_of_thread()) continue;
      const int64_t at = first + __ffs(playing) - 1;
      const Noted& list = noted[r * lists + at];
      const uint32_t count = list.count;
      const int64_t token = at / components * span_columns + list.column[lane_of_thread()];  // of which there may be fewer
      best.is_missing |= count > most_noted;
      if (lane_of_thread() >= static_cast<int>(smaller(count, most_noted))) continue;
      const float z_base = logit(base, token), z_memory = logit(memory, token);
      if (in_play(base, z_base) || in_play(memory, z_memory)) best = Best::merge(best, {score(z_base, z_memory), static_cast<int32_t>(token)});
    }
  }
  best = reduce_block<row_threads>(best, Best::merge);
  if (best.is_missing) {  // for every thread: the spans whose lists did not suffice are read again
    for (int64_t span = 0; span < spans; ++span) {
      bool again = false;
#pragma unroll
      for (int c = 0; c < components; ++c) {
        if (!row.uses(c)) continue;
        const Noted& list = noted[state_at(spans, r, span, c)];
        again |= list.count > most_noted && in_play(c, list.state.max);
      }
      if (!again) continue;
      for (int64_t token = span * span_columns + threadIdx.x; token < smaller(columns, (span + 1) * span_columns); token += row_threads) {
        const float z_base = logit(base, token), z_memory = logit(memory, token);
        if (in_play(base, z_base) || in_play(memory, z_memory))
          best = Best::merge(best, {score(z_base, z_memory), static_cast<int32_t>(token)});
      }
    }
    best = reduce_block<row_threads>(best, Best::merge);
  }
  if (threadIdx.x == 0) op.tokens[r] = best.token;
}

}  // namespace

int64_t workspace_bytes(const InterpolateArgmax& op) { return span_states(op.mixture) * static_cast<int64_t>(sizeof(Noted)); }

Status interpolate_argmax(const InterpolateArgmax& op, const Launch& where) {
  return on_device(where, op.mixture.base.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.mixture.base.count == 0) return;
    auto* const noted = static_cast<Noted*>(where.workspace);
    launch(note_candidates<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, noted);
    const int64_t rows = op.mixture.base.count;
    if (rows <= few_rows) launch_early(argmax_of_rows<T, many_warps * warp_size>, rows, many_warps * warp_size, 0, stream, op, noted);
    else launch_early(argmax_of_rows<T, few_warps * warp_size>, rows, few_warps * warp_size, 0, stream, op, noted);
  });
}

}  // namespace memdec::cuda
