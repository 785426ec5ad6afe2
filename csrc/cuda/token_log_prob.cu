// token_log_prob: log softmax(z)[target] = (z_target − max) − log Σ exp(z − max), for every row.
//
// Traffic: each logit is read from memory once, one number a row is written; beside that 8 bytes a span.
#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

// A warp a row.
template <class T>
__global__ void __launch_bounds__(warp_size) log_prob_of_rows(TokenLogProb op, const Softmax<float>* states) {
  wait_for_kernel_before();
  const int64_t r = blockIdx.x, spans = spans_of(op.logits.columns);
  const Softmax<float> state = merged_by_warp(spans, [&](int64_t i) { return states[r * spans + i]; });
  if (threadIdx.x != 0) return;
  const int64_t target = op.targets[r];
  const bool known = target >= 0 && target < op.logits.columns;
  static_cast<float*>(op.log_prob)[r] = known ? state.log_prob(widened(row_of<const T>(op.logits, r)[target])) : NAN;
  if (op.max) static_cast<float*>(op.max)[r] = state.max;
  if (op.sum) static_cast<float*>(op.sum)[r] = state.sum;
}

}  // namespace

int64_t workspace_bytes(const TokenLogProb& op) {
  return op.logits.count * spans_of(op.logits.columns) * static_cast<int64_t>(sizeof(Softmax<float>));
}

Status token_log_prob(const TokenLogProb& op, const Launch& where) {
  return on_device(where, op.logits.dtype, "logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.logits.count == 0) return;
    auto* const states = static_cast<Softmax<float>*>(where.workspace);
    launch(reduce_spans_of_rows<T>, op.logits.count * spans_of(op.logits.columns), block_threads, 0, stream, op.logits, states);
    launch_early(log_prob_of_rows<T>, op.logits.count, warp_size, 0, stream, op, states);
  });
}

}  // namespace memdec::cuda
