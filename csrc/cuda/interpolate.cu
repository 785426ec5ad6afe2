// interpolate: log p_mix(v) = logaddexp(log α + log p_memory(v), log(1−α) + log p_base(v)), for every token.
//
// Traffic: each logit is read twice, each log-prob written once. Rows taken in groups that the second-level cache holds, which would be
// read from memory once, were slower: a group is too little work for the device.
#include "cuda/merged_rows.cuh"

namespace memdec::cuda {
namespace {

// A block a span.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) write_log_probs(Interpolate op, const LogProb* log_probs) {
  wait_for_kernel_before();
  const int64_t columns = op.mixture.base.columns, spans = spans_written(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  float* const out = static_cast<float*>(op.log_probs) + r * columns;
  const int64_t lead = lead_of(out);
  float value[share_size];
  log_probs_of_share<T>(op.mixture, r, span, log_probs[r], lead, value);
  store_floats<T>(out, columns, span, value, lead);
}

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states;
  LogProb* log_probs;
};

Scratch scratch_of(const Interpolate& op, Parts& parts) {
  auto* const states = parts.take<Softmax<float>>(span_states(op.mixture));
  return {states, parts.take<LogProb>(op.mixture.base.count)};
}

}  // namespace

int64_t workspace_bytes(const Interpolate& op) {
  Parts parts(nullptr);
  scratch_of(op, parts);
  return parts.bytes();
}

Status interpolate(const Interpolate& op, const Launch& where) {
  const Rows& rows = op.mixture.base;
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (rows.count == 0) return;
    Parts parts(where.workspace);
    const Scratch scratch = scratch_of(op, parts);
    launch(reduce_spans<T>, span_states(op.mixture), block_threads, 0, stream, op.mixture, scratch.states);
    launch_early(merge_states, rows.count, warp_size, 0, stream, op.mixture, scratch.states, scratch.log_probs);
    launch_early(write_log_probs<T>, rows.count * spans_written(rows.columns), block_threads, 0, stream, op, scratch.log_probs);
  });
}

}  // namespace memdec::cuda
