// interpolate: log p_mix(v) = logaddexp(log α + log p_memory(v), log(1−α) + log p_base(v)), for every token.
//
// Traffic: each logit is read from memory once, each log-prob written once. The second pass over a row finds it in the
// second-level cache, because rows are taken in groups that fit there (for_each_step).
#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

// Blocks first for the spans that are written, from the states that the step before left, then for those that are read.
template <class T>
__global__ void __launch_bounds__(block_threads) interpolate_step(Interpolate op, Softmax<float>* states, Group read, Group written) {
  const Mixture& mixture = op.mixture;
  const int64_t columns = mixture.base.columns, spans = spans_written(columns), writers = written.count * spans;
  if (blockIdx.x >= writers) {
    reduce_span<T>(mixture, read.first * spans_of(columns) * components + (blockIdx.x - writers), states);
    return;
  }
  const int64_t r = written.first + blockIdx.x / spans, span = blockIdx.x % spans;
  float* const out = static_cast<float*>(op.log_probs) + r * columns;
  const int64_t lead = lead_of(out);
  const MixtureRow row = mixture_of_row(mixture, r, [&](int64_t i) { return states[i]; });
  float value[share_size];
  log_probs_of_share<T>(mixture, r, span, row, lead, value);
  store_floats<T>(out, columns, span, value, lead);
}

}  // namespace

int64_t workspace_bytes(const Interpolate& op) { return span_states(op.mixture) * static_cast<int64_t>(sizeof(Softmax<float>)); }

Status interpolate(const Interpolate& op, const Launch& where) {
  const Rows& rows = op.mixture.base;
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    auto* const states = static_cast<Softmax<float>*>(where.workspace);
    for_each_step(where.device, rows.count, components * bytes_of_row(rows), [&](Group read, Group written) {
      const int64_t blocks = read.count * spans_of(rows.columns) * components + written.count * spans_written(rows.columns);
      launch(interpolate_step<T>, blocks, block_threads, 0, stream, op, states, read, written);
    });
  });
}

}  // namespace memdec::cuda
