// token_log_prob: log softmax(z)[target] = (z_target − max) − log Σ exp(z − max), for every row.
//
// Traffic: each logit is read from memory once, one number a row is written. Where rows are few, 8 bytes a thread and span
// (an eighth of a bf16 row) go through the workspace, which stays in the second-level cache.
#include "cuda/softmax.cuh"

namespace memdec::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(block_threads) log_prob_of_rows(TokenLogProb op, const Softmax<float>* states) {
  const int64_t r = blockIdx.x;
  const Softmax<float> state = softmax_of_row<T>(op.logits, r, states);
  if (threadIdx.x != 0) return;
  const int64_t target = op.targets[r];
  const bool known = target >= 0 && target < op.logits.columns;
  static_cast<float*>(op.log_prob)[r] = known ? state.log_prob(widened(row_of<const T>(op.logits, r)[target])) : NAN;
  if (op.max) static_cast<float*>(op.max)[r] = state.max;
  if (op.sum) static_cast<float*>(op.sum)[r] = state.sum;
}

}  // namespace

int64_t workspace_bytes(const TokenLogProb& op) { return split_states(op.logits) * static_cast<int64_t>(sizeof(Softmax<float>)); }

Status token_log_prob(const TokenLogProb& op, const Launch& where) {
  return on_device(where, op.logits.dtype, "logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.logits.count == 0) return;
    auto* const states = is_split(op.logits) ? static_cast<Softmax<float>*>(where.workspace) : nullptr;
    launch_split_softmax<T>(op.logits, states, stream);
    launch(log_prob_of_rows<T>, op.logits.count, block_threads, 0, stream, op, states);
  });
}

}  // namespace memdec::cuda
