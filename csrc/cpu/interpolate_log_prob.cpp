// interpolate_log_prob: log p_mix(target) = logaddexp(log α + log p_memory(target), log(1−α) + log p_base(target)).
//
// Traffic: each logit is read from memory once; one number a row is written.
#include "cpu/mixture.h"

namespace memdec::MEMDEC_LEVEL {

Status interpolate_log_prob(const InterpolateLogProb& op, const Launch& launch) {
  const Mixture& mixture = op.mixture;
  if (const Status s = check_indices(op.targets, mixture.base.count, mixture.base.columns, "targets"); s.code != Status::ok) return s;
  if (const Status s = check_alpha(mixture.alpha, mixture.alphas, mixture.base.count); s.code != Status::ok) return s;
  return with_dtype(mixture.base.dtype, "base_logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    A* const out = static_cast<A*>(op.log_prob);
    with_mixture_of_rows<T>(mixture, launch.threads, [&](int64_t r, const MixtureRow<A>& row, const auto*, const auto*) {
      const int64_t y = op.targets[r];
      const auto weighted = [&](const Rows& rows, const Softmax<A>& state, double log_weight) {
        const double z = static_cast<double>(to_float(row_of<const T>(rows, r)[y]));
        return (z - static_cast<double>(state.max)) - ::log(static_cast<double>(state.sum)) + log_weight;
      };
      double value = NAN;
      if (!row.broken()) {
        value = -INFINITY;
        if (row.uses_base()) value = weighted(mixture.base, row.base, ::log1p(-row.alpha));
        if (row.uses_memory()) value = memdec::logaddexp(value, weighted(mixture.memory, row.memory, ::log(row.alpha)));
      }
      out[r] = static_cast<A>(value);
    });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
