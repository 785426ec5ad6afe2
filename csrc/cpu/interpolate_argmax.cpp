// interpolate_argmax: the token of the largest p_mix; how it is found stands in cpu/argmax.h.
//
// Traffic: each logit is read from memory once (the second pass finds the row in the cache); one number a row is written.
#include "cpu/argmax.h"

namespace memdec::MEMDEC_LEVEL {

Status interpolate_argmax(const InterpolateArgmax& op, const Launch& launch) {
  const Mixture& mixture = op.mixture;
  const Rows& rows = mixture.base;
  if (const Status s = check_alpha(mixture.alpha, mixture.alphas, rows.count); s.code != Status::ok) return s;
  return with_dtype(rows.dtype, "base_logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    with_mixture_of_rows<T>(
        mixture, launch.threads, [&](int64_t r, const MixtureRow<A>& row, const Softmax<A>* base_blocks, const Softmax<A>* memory_blocks) {
          op.tokens[r] = argmax_of_row(row_of<const T>(mixture.base, r), row_of<const T>(mixture.memory, r), rows.columns, row,
                                       base_blocks, memory_blocks);
        });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
