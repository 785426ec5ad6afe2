// interpolate_log_prob: log p_mix(target) = logaddexp(log α + log p_memory(target), log(1−α) + log p_base(target)).
//
// Traffic: each logit is read from memory once; one number a row is written.
#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

// A warp a row, in float64 from the states on.
template <class T>
__global__ void __launch_bounds__(warp_size) log_prob_of_rows(InterpolateLogProb op, const Softmax<float>* states) {
  wait_for_kernel_before();
  const int64_t r = blockIdx.x;
  const MixtureRow row = mixture_of_row(op.mixture, r, [&](int64_t i) { return states[i]; });
  if (threadIdx.x != 0) return;
  const int64_t y = op.targets[r];
  double value = NAN;
  if (y >= 0 && y < op.mixture.base.columns && !row.broken()) {
    value = -INFINITY;
#pragma unroll
    for (int c = 0; c < components; ++c) {
      if (!row.uses(c)) continue;
      const double z = static_cast<double>(widened(row_of<const T>(rows_of(op.mixture, c), r)[y]));
      const double log_weight = c == base ? log1p(-row.alpha) : log(row.alpha);
      value = logaddexp(value, (z - static_cast<double>(row.of[c].max)) - log(static_cast<double>(row.of[c].sum)) + log_weight);
    }
  }
  static_cast<float*>(op.log_prob)[r] = static_cast<float>(value);
}

}  // namespace

int64_t workspace_bytes(const InterpolateLogProb& op) { return span_states(op.mixture) * static_cast<int64_t>(sizeof(Softmax<float>)); }

Status interpolate_log_prob(const InterpolateLogProb& op, const Launch& where) {
  return on_device(where, op.mixture.base.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.mixture.base.count == 0) return;
    auto* const states = static_cast<Softmax<float>*>(where.workspace);
    launch(reduce_spans<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, states);
    launch_early(log_prob_of_rows<T>, op.mixture.base.count, warp_size, 0, stream, op, states);
  });
}

}  // namespace memdec::cuda
