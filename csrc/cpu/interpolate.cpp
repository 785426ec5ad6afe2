// interpolate: log p_mix(v) = logaddexp(log α + log p_memory(v), log(1−α) + log p_base(v)), for every token.
//
// Traffic: each logit is read from memory once (the second pass over a row finds it in the cache), each log-prob written once.
#include "cpu/mixture.h"

namespace memdec::MEMDEC_LEVEL {

Status interpolate(const Interpolate& op, const Launch& launch) {
  const Mixture& mixture = op.mixture;
  const Rows& rows = mixture.base;
  if (const Status s = check_alpha(mixture.alpha, mixture.alphas, rows.count); s.code != Status::ok) return s;
  return with_dtype(rows.dtype, "base_logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    A* const out = static_cast<A*>(op.log_probs);
    const auto write = [&](int64_t r, const MixtureRow<A>& row, int64_t begin, int64_t end) {
      log_probs_of_block(row_of<const T>(mixture.base, r) + begin, row_of<const T>(mixture.memory, r) + begin, end - begin, row,
                         out + r * rows.columns + begin);
    };
    if (!rows_are_few(rows, launch.threads)) {
      with_mixture_of_rows<T>(mixture, launch.threads, [&](int64_t r, const MixtureRow<A>& row, const auto*, const auto*) {
        write(r, row, 0, rows.columns);
      });
      return;
    }
    const Scratch<MixtureRow<A>> states(rows.count);
    with_mixture_of_rows<T>(mixture, launch.threads,
                            [&](int64_t r, const MixtureRow<A>& row, const auto*, const auto*) { states[r] = row; });
    for_each_block(rows, launch.threads, [&](int64_t r, int64_t begin, int64_t end) { write(r, states[r], begin, end); });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
