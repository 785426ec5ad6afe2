// interpolate_sparse: the kNN-LM, log(α·(q + (1−m)·p) + (1−α)·p) with p = softmax(base), q a sparse row and m = Σq its mass:
//   log p(v) + log(1 − α·m)                                     where q has no v
//   logaddexp(log p(v) + log(1 − α·m), log(α·q(v)))             where it has
//
// Traffic: each logit is read from memory once (the second pass finds the row in the cache), each log-prob written once.
#include "cpu/mixture.h"

namespace memdec::MEMDEC_LEVEL {

// A row that lacks less than this of the whole has lost it to rounding: at α = 1 the base has no part in it.
constexpr double whole_mass = 1 - 1e-6;

Status interpolate_sparse(const InterpolateSparse& op, const Launch& launch) {
  const Rows& rows = op.base;
  if (const Status s = check_sparse(op.teacher, rows.count, rows.columns); s.code != Status::ok) return s;
  if (const Status s = check_alpha(op.alpha, op.alphas, rows.count); s.code != Status::ok) return s;
  const auto alpha_of_row = [&](int64_t r) { return op.alphas ? op.alphas[r] : op.alpha; };
  const auto kept_share = [&](int64_t r) {  // 1 − α·m
    double mass = 0;
    for (int64_t i = op.teacher.indptr[r]; i < op.teacher.indptr[r + 1]; ++i) mass += static_cast<double>(op.teacher.probs[i]);
    return 1 - alpha_of_row(r) * (mass >= whole_mass ? 1 : mass);
  };
  return with_dtype(rows.dtype, "base_logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    using V = vec_t<T>;
    A* const out = static_cast<A*>(op.log_probs);
    const auto write_base = [&](int64_t r, const Softmax<A>& state, double share, int64_t begin, int64_t end) {
      const V max = broadcast<V>(state.max);
      V scale = broadcast<V>(static_cast<A>(::log(share) - ::log(static_cast<double>(state.sum))));
      const bool used = share > 0;
      if (!(state.sum > 0)) scale = broadcast<V>(static_cast<A>(NAN));
      const T* const z = row_of<const T>(rows, r) + begin;
      for_each_vector(z, z, end - begin, [&](int64_t i, int64_t n, V logit, V) {
        const V value = used ? (logit - max) + scale : broadcast<V>(static_cast<A>(-INFINITY));
        A* const to = out + r * rows.columns + begin + i;
        if (n == V::width) store(to, value);
        else store_some(to, value, n);
      });
    };
    const auto add_teacher = [&](int64_t r) {
      const double alpha = alpha_of_row(r);
      if (!(alpha > 0)) return;
      for (int64_t i = op.teacher.indptr[r]; i < op.teacher.indptr[r + 1]; ++i) {
        A& value = out[r * rows.columns + op.teacher.ids[i]];
        value = static_cast<A>(memdec::logaddexp(static_cast<double>(value), ::log(alpha * static_cast<double>(op.teacher.probs[i]))));
      }
    };
    if (!rows_are_few(rows, launch.threads)) {
      with_softmax_of_rows<T>(rows, launch.threads, [&](int64_t r, Softmax<A> state) {
        write_base(r, state, kept_share(r), 0, rows.columns);
        add_teacher(r);
      });
      return;
    }
    const Scratch<Softmax<A>> states(rows.count);
    const Scratch<double> shares(rows.count);
    with_softmax_of_rows<T>(rows, launch.threads, [&](int64_t r, Softmax<A> state) {
      states[r] = state;
      shares[r] = kept_share(r);
    });
    for_each_block(rows, launch.threads, [&](int64_t r, int64_t begin, int64_t end) { write_base(r, states[r], shares[r], begin, end); });
    for (int64_t r = 0; r < rows.count; ++r) add_teacher(r);
  });
}

}  // namespace memdec::MEMDEC_LEVEL
