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
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    if (!(value[i] - state.max > -near_the_top)) continue;
    const uint32_t place = atomicAdd(&count, 1u);
    if (place < most_noted) mine.column[place] = static_cast<uint16_t>(column_of<T>(0, i));
  }
  __syncthreads();  // the count is whole
  if (threadIdx.x == 0) mine.state = state, mine.count = count;
}

struct Best {
  float score = -INFINITY;
  int32_t token = -1;  // of equal scores the lowest

  static __device__ Best merge(Best a, Best b) {
    const bool second = b.score > a.score || (b.score == a.score && b.token >= 0 && (b.token < a.token || a.token < 0));
    return second ? b : a;
  }
};

constexpr int row_threads = 512;  // a warp for each of 16 lists at a time
constexpr int lists_at_once = 5;  // of a warp: what it waits for is under way for all of them (76 lists are 151936 tokens of two models)

// A block a row.
template <class T>
__global__ void __launch_bounds__(row_threads) argmax_of_rows(InterpolateArgmax op, const Noted* noted) {
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
  // A warp a list, of a span and component; a lane a token of it.
  const int64_t lists = spans * components, warps = row_threads / warp_size;
  uint32_t is_missing = 0;  // a list that may hold the winner and did not suffice
  for (int64_t first = warp_of_thread(); first < lists; first += warps * lists_at_once) {
    int64_t token[lists_at_once];  // −1: none
#pragma unroll
    for (int i = 0; i < lists_at_once; ++i) {
      const int64_t at = first + i * warps;
      const int c = static_cast<int>(at % components);
      token[i] = -1;
      if (at >= lists || !row.uses(c)) continue;
      const Noted& list = noted[state_at(spans, r, at / components, c)];
      const int64_t column = list.column[lane_of_thread()];  // of which there may be fewer
      if (!in_play(c, list.state.max)) continue;
      is_missing |= list.count > most_noted;
      if (lane_of_thread() < static_cast<int>(list.count)) token[i] = at / components * span_columns + column;
    }
    float z[lists_at_once][components];
#pragma unroll
    for (int i = 0; i < lists_at_once; ++i)
#pragma unroll
      for (int c = 0; c < components; ++c) z[i][c] = token[i] >= 0 ? logit(c, token[i]) : 0.0f;
#pragma unroll
    for (int i = 0; i < lists_at_once; ++i)
      if (token[i] >= 0 && (in_play(base, z[i][base]) || in_play(memory, z[i][memory])))
        best = Best::merge(best, {score(z[i][base], z[i][memory]), static_cast<int32_t>(token[i])});
  }
  // A span whose list did not suffice: as many threads as it has shares.
  is_missing = reduce_block<row_threads>(is_missing, [](uint32_t a, uint32_t b) { return a | b; });
  for (int64_t span = 0; is_missing && span < spans && threadIdx.x < block_threads; ++span) {
    bool again = false;
#pragma unroll
    for (int c = 0; c < components; ++c) {
      if (!row.uses(c)) continue;
      const Noted& list = noted[state_at(spans, r, span, c)];
      again |= list.count > most_noted && in_play(c, list.state.max);
    }
    if (!again) continue;
    float value[components][share_size] = {};
#pragma unroll
    for (int c = 0; c < components; ++c)
      if (row.uses(c)) load_share(row_of<const T>(rows_of(mixture, c), r), columns, span, value[c]);
#pragma unroll
    for (int i = 0; i < share_size; ++i)
      if (in_play(base, value[base][i]) || in_play(memory, value[memory][i]))
        best = Best::merge(best, {score(value[base][i], value[memory][i]), static_cast<int32_t>(column_of<T>(span, i))});
  }
  best = reduce_block<row_threads>(best, Best::merge);
  if (threadIdx.x == 0) op.tokens[r] = best.token;
}

}  // namespace

int64_t workspace_bytes(const InterpolateArgmax& op) { return span_states(op.mixture) * static_cast<int64_t>(sizeof(Noted)); }

Status interpolate_argmax(const InterpolateArgmax& op, const Launch& where) {
  return on_device(where, op.mixture.base.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.mixture.base.count == 0) return;
    auto* const noted = static_cast<Noted*>(where.workspace);
    launch(note_candidates<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, noted);
    launch_early(argmax_of_rows<T>, op.mixture.base.count, row_threads, stream, op, noted);
  });
}

}  // namespace memdec::cuda
