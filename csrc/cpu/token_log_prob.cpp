// token_log_prob: log softmax(z)[target] = (z_target − max) − log Σ exp(z − max), for every row.
//
// Traffic: each logit is read from memory once.
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

Status token_log_prob(const TokenLogProb& op, const Launch& launch) {
  const Status indices = check_indices(op.targets, op.logits.count, op.logits.columns, "targets");
  if (indices.code != Status::ok) return indices;
  return with_dtype(op.logits.dtype, "logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    A* const log_prob = static_cast<A*>(op.log_prob);
    A* const max = static_cast<A*>(op.max);
    A* const sum = static_cast<A*>(op.sum);
    with_softmax_of_rows<T>(op.logits, launch.threads, [&](int64_t r, Softmax<A> state) {
      log_prob[r] = state.log_prob(static_cast<A>(to_float(row_of<const T>(op.logits, r)[op.targets[r]])));
      if (max) max[r] = state.max;
      if (sum) sum[r] = state.sum;
    });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
