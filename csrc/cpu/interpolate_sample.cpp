// interpolate_sample: a token drawn from p_mix by Gumbel-max, g being noise of seed, offset and a number (core/noise.h).
//
//   nothing warped    a coin of probability α picks one of the two components, and the draw is from that one, in two steps: of
//                     the blocks the s of largest log Σ exp(z) + g(s), and of its tokens the v of largest z(v) + g(v).
//   temperature only  the same two steps, of the scores log p_mix / T: made block by block, and once more of the block drawn.
//   cuts              a row of scores is made, and of what the warpers keep of it the v of largest score + g(v) is drawn.
//
// What the warpers keep is found as transformers defines it:
//   top_k   scores at least the k-th largest (all ties)
//   top_p   from the least likely up (equals: lower ids first), tokens go while the running probability of what top_k left is
//           at most 1 − top_p; the last stays
//   min_p   scores at least the largest + log(min_p)
// Only tokens above a bound that no kept token can be below are sorted (see `bound_of_kept`).
//
// Traffic: coin: each logit of one tensor once. Warped: each logit of both once, and again from the cache; cuts: V scores there.
#include "cpu/sampling.h"

namespace memdec::MEMDEC_LEVEL {

Status interpolate_sample(const InterpolateSample& op, const Launch& launch) {
  const Mixture& mixture = op.mixture;
  const Rows& rows = mixture.base;
  if (const Status s = check_alpha(mixture.alpha, mixture.alphas, rows.count); s.code != Status::ok) return s;
  const auto seed = [&](int64_t r) { return seed_of(op, r); };
  const auto offset = [&](int64_t r) { return offset_of(op, r); };
  const Warpers warpers{.temperature = op.temperature, .top_k = op.top_k, .top_p = op.top_p, .min_p = op.min_p};
  return with_dtype(rows.dtype, "base_logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    if (warpers.none()) {
      const auto picked = [&](int64_t r) {
        const bool memory = uniform(draw_of(seed(r), offset(r), coin_stream, 0)) < alpha_of(mixture, r);
        const T* const z = row_of<const T>(memory ? mixture.memory : mixture.base, r);
        return [z](int64_t begin, int64_t, T*) { return z + begin; };
      };
      draw_rows_in_two<T>(rows, launch.threads, op.tokens, picked, seed, offset);
      return;
    }
    const auto score = [&](int64_t r, const MixtureRow<A>& row, int64_t begin, int64_t end, A* out) {
      log_probs_of_block(row_of<const T>(mixture.base, r) + begin, row_of<const T>(mixture.memory, r) + begin, end - begin, row, out,
                         op.temperature);
    };
    const auto scores_of = [&](int64_t r, const MixtureRow<A>& row) {
      return [&score, &row, r](int64_t begin, int64_t end, A* buffer) -> const A* {
        score(r, row, begin, end, buffer);
        return buffer;
      };
    };
    if (!rows_are_few(rows, launch.threads)) {
      with_mixture_of_rows<T>(mixture, launch.threads, [&](int64_t r, const MixtureRow<A>& row, const auto*, const auto*) {
        if (!warpers.cut()) {
          op.tokens[r] = draw_in_two<A>(scores_of(r, row), rows.columns, seed(r), offset(r));
          return;
        }
        const Scratch<A> scores(rows.columns);
        score(r, row, 0, rows.columns, scores.data);
        op.tokens[r] = draw_warped(scores.data, rows.columns, seed(r), offset(r), warpers);
      });
      return;
    }
    const Scratch<MixtureRow<A>> states(rows.count);
    with_mixture_of_rows<T>(mixture, launch.threads,
                            [&](int64_t r, const MixtureRow<A>& row, const auto*, const auto*) { states[r] = row; });
    if (!warpers.cut()) {
      draw_rows_in_two<A>(rows, launch.threads, op.tokens, [&](int64_t r) { return scores_of(r, states[r]); }, seed, offset);
      return;
    }
    const Scratch<A> scores(rows.count * rows.columns);
    for_each_block(rows, launch.threads, [&](int64_t r, int64_t begin, int64_t end) {
      score(r, states[r], begin, end, scores.data + r * rows.columns + begin);
    });
    for_each_row(rows, launch.threads, [&](int64_t r) {
      op.tokens[r] = draw_warped(scores.data + r * rows.columns, rows.columns, seed(r), offset(r), warpers);
    });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
