// What the interpolate family shares: the two softmax states of each row of α·softmax(memory) + (1−α)·softmax(base).
#pragma once

#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

enum Component : int { base = 0, memory = 1 };
constexpr int components = 2;

__device__ inline double alpha_of(const Mixture& mixture, int64_t r) { return mixture.alphas ? mixture.alphas[r] : mixture.alpha; }
__device__ inline const Rows& rows_of(const Mixture& mixture, int component) {
  return component == base ? mixture.base : mixture.memory;
}
__device__ inline double weight_of(double alpha, int component) { return component == base ? 1 - alpha : alpha; }

// One row of the mixture, as in csrc/cpu/mixture.h. An α outside [0, 1], which only the host could refuse, breaks its row.
struct MixtureRow {
  Softmax<float> of[components];
  double alpha;

  __device__ bool uses(int component) const { return weight_of(alpha, component) > 0; }
  // A used row with a NaN or +inf in it has a sum of NaN, one without an unmasked token a sum of 0: every p_mix is NaN.
  __device__ bool broken() const {
    return !(alpha >= 0 && alpha <= 1) || (uses(base) && !(of[base].sum > 0)) || (uses(memory) && !(of[memory].sum > 0));
  }
};

// How many states the spans of all rows have, and where that of one span is.
inline int64_t span_states(const Mixture& mixture) { return mixture.base.count * spans_of(mixture.base.columns) * components; }
__device__ inline int64_t state_at(int64_t spans, int64_t r, int64_t span, int component) {
  return (r * spans + span) * components + component;
}

// The block's part of the first pass: one span of one component, number i of all. False, and nothing is read, where the
// component has no weight in the row.
template <class T>
__device__ inline bool load_span(const Mixture& mixture, int64_t i, float (&value)[share_size]) {
  const int component = static_cast<int>(i % components);
  const int64_t spans = spans_of(mixture.base.columns), span = i / components % spans, r = i / components / spans;
  if (!(weight_of(alpha_of(mixture, r), component) > 0)) return false;
  load_share(row_of<const T>(rows_of(mixture, component), r), mixture.base.columns, span, value);
  return true;
}

template <class T>
__global__ void __launch_bounds__(block_threads) reduce_spans(Mixture mixture, Softmax<float>* states) {
  let_next_kernel_start();
  float value[share_size];
  if (!load_span<T>(mixture, blockIdx.x, value)) return;
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// Row r from what reduce_spans left (state(i) is that of span and component number i), known to every thread of a block.
template <class F>
__device__ inline MixtureRow mixture_of_row(const Mixture& mixture, int64_t r, const F& state) {
  const int64_t spans = spans_of(mixture.base.columns);
  MixtureRow row{.of = {}, .alpha = alpha_of(mixture, r)};
#pragma unroll  // here and below: what is indexed at run time is no register
  for (int c = 0; c < components; ++c)
    if (row.uses(c)) row.of[c] = merged_by_warp(spans, [&](int64_t span) { return state(state_at(spans, r, span, c)); });
  return row;
}

// In float32, but for weights that it cannot hold.
__device__ inline float log_of_weight(double weight) {
  return weight > 1e-37 ? logarithm(static_cast<float>(weight)) : static_cast<float>(logarithm(weight));
}

// log p_mix(v) = logaddexp over the components of (z(v) − max) + log(weight / sum). What the larger of the two lacks is at most
// log 2, and known to 3·10⁻⁷.
struct LogProb {
  float max[components];
  float scale[components];
  bool used[components];
  bool broken;

  explicit __device__ LogProb(const MixtureRow& row) : broken(row.broken()) {
#pragma unroll
    for (int c = 0; c < components; ++c) {
      used[c] = row.uses(c);
      max[c] = row.uses(c) ? row.of[c].max : 0;
      scale[c] = row.uses(c) ? log_of_weight(weight_of(row.alpha, c)) - logarithm(row.of[c].sum) : 0;
    }
  }
  __device__ bool uses(int component) const { return used[component]; }
  // The logit of a component without weight is given as −inf.
  __device__ float operator()(float z_base, float z_memory) const {
    const float a = (z_base - max[base]) + scale[base], b = (z_memory - max[memory]) + scale[memory];
    const float high = fmaxf(a, b);
    const float value = high == -INFINITY ? high : fmaf(fast_log2(1 + decay(fminf(a, b) - high)), 0.693147180559945309f, high);
    return broken ? NAN : value;
  }
};

// A logit of row r as LogProb takes it: −inf where the component has no weight, whose row is not read. Here and below a row is a
// MixtureRow or its LogProb.
template <class T, class Row>
__device__ inline float logit_of(const Mixture& mixture, int64_t r, const Row& row, int component, int64_t column) {
  return row.uses(component) ? widened(row_of<const T>(rows_of(mixture, component), r)[column]) : -INFINITY;
}

// The same of this thread's share of a span, −inf beyond the end of the row.
template <class T, class Row>
__device__ inline void logits_of_share(const Mixture& mixture, int64_t r, int64_t span, const Row& row, int component, int64_t lead,
                                       float (&value)[share_size]) {
  if (row.uses(component)) {
    load_share(row_of<const T>(rows_of(mixture, component), r), mixture.base.columns, span, value, lead);
    return;
  }
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = -INFINITY;
}

// log p_mix of this thread's share of a span of row r, −inf beyond the end of the row.
template <class T, class Row>
__device__ inline void log_probs_of_share(const Mixture& mixture, int64_t r, int64_t span, const Row& row, int64_t lead,
                                          float (&value)[share_size]) {
  float other[share_size];
  logits_of_share<T>(mixture, r, span, row, base, lead, value);
  logits_of_share<T>(mixture, r, span, row, memory, lead, other);
  const LogProb log_prob(row);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = log_prob(value[i], other[i]);
}

}  // namespace
}  // namespace memdec::cuda
