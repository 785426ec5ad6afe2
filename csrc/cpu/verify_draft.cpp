// verify_draft: speculative sampling (Leviathan et al., ICML 2023) of p_mix, the memory being the drafter.
//
// At each drafted position of a text, in order, until the first rejection, with q what the draft was drawn from, p the target:
//   accept x with probability min(1, p(x) / q(x));   on rejection draw from (p − q)₊, normalised;
//   where all were accepted draw one more token from p.
// What is accepted plus the token drawn has the law of p. (p − q)₊ without mass, to rounding, means p = q there: draw from p.
//
// The token after the last draft is drawn from p as if it were drafted and verified: x from q, as interpolate_sample draws a draft
// of this position; x if it stands, else from (p − q)₊. So every token is a function of what stands before it, seed and
// offset: a text does not depend on how many tokens were drafted at a time.
//
// Without warpers q = p_mem and p = α·p_mem + (1−α)·p_base, which has structure:
//   p(x) / q(x) = α + (1−α)·p_base(x) / p_mem(x)     a coin u < α accepts before any logit is looked at
//   (p − q)₊ ∝ (p_base − p_mem)₊                     α has no part in it
// With warpers (temperature, top_k, top_p, min_p) p is the warped mixture and q the warped memory: the law of
// interpolate_sample with α and with α = 1. Greedy: x stands while it is the mixture's likeliest token, which comes next.
//
// Position i of a text draws with its seed and offset + i: its coin is draw 0 of the acceptance stream, what replaces a draft is
// drawn with the residual stream.
//
// Traffic: both rows of a position that is looked at, once; the positions behind a rejection, never.
#include "cpu/argmax.h"
#include "cpu/sampling.h"

namespace memdec::MEMDEC_LEVEL {

// A residual of less mass is rounding.
template <class A>
constexpr double no_mass = sizeof(A) == sizeof(float) ? 1e-6 : 1e-13;

struct Verdict {
  int64_t accepted, next;
};

// One row, for helpers that take several.
inline Rows single_row(const void* data, const Rows& like) {
  return {.data = const_cast<void*>(data), .dtype = like.dtype, .count = 1, .inner = 1, .outer_stride = 0, .inner_stride = 0,
          .columns = like.columns};
}

// The position at which a text is looked at.
template <class T>
struct Position {
  using A = accumulator_t<T>;
  const T *base, *memory;  // its two rows of logits
  double alpha;
  Rows row;  // one row of their width
  int threads;
  uint64_t seed, offset;

  Softmax<A> state_of(const T* z) const {
    Softmax<A> state;
    with_softmax_of_rows<T>(single_row(z, row), threads, [&](int64_t, const Softmax<A>& found) { state = found; });
    return state;
  }
  // log-probs of a mixture of the two rows, divided by the temperature.
  void write(const MixtureRow<A>& mixed, double temperature, A* out) const {
    for_each_block(row, threads, [&](int64_t, int64_t begin, int64_t end) {
      log_probs_of_block(base + begin, memory + begin, end - begin, mixed, out + begin, temperature);
    });
  }
  // What interpolate_sample draws from these scores.
  template <class Z>
  int64_t draft(const Z* scores) const {
    int64_t token = -1;
    const auto blocks = [=](int64_t begin, int64_t, Z*) { return scores + begin; };
    draw_rows_in_two<Z>(row, threads, &token, [&](int64_t) { return blocks; }, [&](int64_t) { return seed; },
                        [&](int64_t) { return offset; });
    return token;
  }
  // What a fallen draft is replaced with.
  int64_t replacement(const A* scores) const {
    int64_t token = -1;
    draw_rows<A>(row, threads, &token, [&](int64_t) { return scores; }, [&](int64_t) { return seed; }, [&](int64_t) { return offset; },
                 residual_stream);
    return token;
  }

  // target ← log of (exp(target) − exp(draft))₊; returns Σ of these.
  double subtract(A* target, const A* draft) const {
    using V = vec_t<A>;
    const V zero = broadcast<V>(0);
    double mass = 0;
    for (int64_t begin = 0; begin < row.columns; begin += block_columns) {
      const int64_t n = smaller(block_columns, row.columns - begin);
      A* const out = target + begin;
      V sum = zero;
      for_each_vector(target + begin, draft + begin, n, [&](int64_t i, int64_t count, V p, V q) {
        const V rest = max(exp(p) - exp(q), zero);
        sum = sum + rest;
        if (count == V::width) store(out + i, log(rest));
        else store_some(out + i, log(rest), count);
      });
      mass += static_cast<double>(reduce_add(sum));
    }
    return mass;
  }
};

// Scores become log-probs of what the warpers keep, −inf for the rest. False where nothing can be drawn from them.
template <class A>
inline bool normalise_kept(A* scores, int64_t columns, const Warpers& warpers) {
  const A top = largest(scores, columns);
  if (!is_finite(top)) return false;
  if (!warpers.cut()) {
    const Softmax<A> state = softmax_of_row(scores, columns);
    const A log_sum = static_cast<A>(::log(static_cast<double>(state.sum)));
    for (int64_t v = 0; v < columns; ++v) scores[v] = (scores[v] - state.max) - log_sum;
    return true;
  }
  Candidates<A> kept(columns);
  const int64_t least = keep(scores, columns, top, warpers, kept);
  const A floor = floor_of(top, warpers);
  double total = 0;
  for (int64_t i = least; i < kept.count; ++i)
    if (kept.score(i) >= floor) total += kept.weight(i, top);
  const A log_total = static_cast<A>(::log(total));
  for (int64_t v = 0; v < columns; ++v) scores[v] = static_cast<A>(-INFINITY);
  for (int64_t i = least; i < kept.count; ++i)
    if (kept.score(i) >= floor) scores[kept.tokens[i]] = (kept.score(i) - top) - log_total;
  return true;
}

// Whether a draft stands that has these log-probs under the target and under what it was drawn from: u < p / q. NaN never
// does, nor does a token without probability under both.
inline bool stands(double u, double log_target, double log_draft) { return u < ::exp(log_target - log_draft); }

template <class T>
inline Verdict verify_plain(const VerifyDraft& op, int64_t text, int64_t length, const auto& position_of) {
  using A = accumulator_t<T>;
  for (int64_t i = 0;; ++i) {
    const Position<T> at = position_of(i);
    const bool is_last = i == length;
    const double u = uniform(draw_of(at.seed, at.offset, acceptance_stream, 0));
    if (u < at.alpha) {
      if (is_last) return {i, at.draft(at.memory)};
      continue;
    }
    // From here on α < 1. At α = 0 the memory's row may be anything; it has drafted nothing then.
    const MixtureRow<A> mixed{.base = at.state_of(at.base), .memory = at.state_of(at.memory), .alpha = at.alpha};
    if (mixed.broken()) return {i, -1};
    const bool has_draft = mixed.memory.sum > 0;
    if (has_draft) {
      const int64_t x = is_last ? at.draft(at.memory) : op.draft_ids[text * op.drafted + i];
      const double ratio = ::exp(static_cast<double>(mixed.base.log_prob(to_float(at.base[x]))) -
                                 static_cast<double>(mixed.memory.log_prob(to_float(at.memory[x]))));
      if (u < at.alpha + (1 - at.alpha) * ratio) {
        if (is_last) return {i, x};
        continue;
      }
    }
    const Scratch<A> scores(2 * at.row.columns);
    A* const target = scores.data;
    if (has_draft) {
      at.write({.base = mixed.base, .memory = {}, .alpha = 0}, 1, target);
      at.write({.base = {}, .memory = mixed.memory, .alpha = 1}, 1, target + at.row.columns);
      if (at.subtract(target, target + at.row.columns) > no_mass<A>) return {i, at.replacement(target)};
    }
    at.write(mixed, 1, target);
    return {i, at.replacement(target)};
  }
}

template <class T>
inline Verdict verify_warped(const VerifyDraft& op, const Warpers& warpers, int64_t text, int64_t length, const auto& position_of) {
  using A = accumulator_t<T>;
  const int64_t columns = op.mixture.base.columns;
  const Scratch<A> scores(2 * columns);
  A* const target = scores.data;
  A* const draft = scores.data + columns;
  for (int64_t i = 0;; ++i) {
    const Position<T> at = position_of(i);
    const bool is_last = i == length;
    const double u = uniform(draw_of(at.seed, at.offset, acceptance_stream, 0));
    const MixtureRow<A> own{.base = {}, .memory = at.state_of(at.memory), .alpha = 1};
    const MixtureRow<A> mixed{.base = at.alpha < 1 ? at.state_of(at.base) : Softmax<A>{}, .memory = own.memory, .alpha = at.alpha};
    at.write(mixed, warpers.temperature, target);
    at.write(own, warpers.temperature, draft);
    int64_t x = is_last ? -1 : op.draft_ids[text * op.drafted + i];
    if (is_last) x = warpers.cut() ? draw_warped(draft, columns, at.seed, at.offset, warpers) : at.draft(draft);
    bool drawable[2] = {};
    parallel(2, 1, at.threads, [&](int64_t first, int64_t last) {
      for (int64_t side = first; side < last; ++side)
        drawable[side] = normalise_kept(side == 0 ? target : draft, columns, warpers);
    });
    if (!drawable[0]) return {i, -1};
    if (drawable[1]) {
      if (stands(u, static_cast<double>(target[x]), static_cast<double>(draft[x]))) {
        if (is_last) return {i, x};
        continue;
      }
      const Scratch<A> rest(columns);
      __builtin_memcpy(rest.data, target, sizeof(A) * static_cast<size_t>(columns));
      if (at.subtract(rest.data, draft) > no_mass<A>) return {i, at.replacement(rest.data)};
    }
    return {i, at.replacement(target)};
  }
}

template <class T>
inline Verdict verify_greedy(const VerifyDraft& op, int64_t text, int64_t length, const auto& position_of) {
  using A = accumulator_t<T>;
  for (int64_t i = 0;; ++i) {
    const Position<T> at = position_of(i);
    const Mixture one{.base = single_row(at.base, at.row), .memory = single_row(at.memory, at.row), .alpha = at.alpha, .alphas = nullptr};
    int64_t likeliest = -1;
    with_mixture_of_rows<T>(one, at.threads, [&](int64_t, const MixtureRow<A>& row, const Softmax<A>* base, const Softmax<A>* memory) {
      likeliest = argmax_of_row(at.base, at.memory, at.row.columns, row, base, memory);
    });
    if (i == length || likeliest != op.draft_ids[text * op.drafted + i]) return {i, likeliest};
  }
}

Status verify_draft(const VerifyDraft& op, const Launch& launch) {
  const Mixture& mixture = op.mixture;
  const Rows& rows = mixture.base;
  if (const Status s = check_alpha(mixture.alpha, mixture.alphas, rows.count); s.code != Status::ok) return s;
  const auto length_of = [&](int64_t text) { return op.lengths ? op.lengths[text] : op.drafted; };
  for (int64_t text = 0; text < op.texts; ++text) {
    const int64_t length = length_of(text);
    if (length < 0 || length > op.drafted)
      return {.code = Status::bad_index, .argument = "draft_lengths", .at = text, .got = length, .wanted = op.drafted + 1};
    for (int64_t at = text * op.drafted; at < text * op.drafted + length; ++at)
      if (op.draft_ids[at] < 0 || op.draft_ids[at] >= rows.columns)
        return {.code = Status::bad_index, .argument = "draft_ids", .at = at, .got = op.draft_ids[at], .wanted = rows.columns};
  }
  const Warpers warpers{.temperature = op.temperature, .top_k = op.top_k, .top_p = op.top_p, .min_p = op.min_p};
  // Many texts are shared out over the threads; of few, each position's rows are.
  const bool few = op.texts < 2 * launch.threads;
  const int within = few ? launch.threads : 1;
  const int across = few ? 1 : threads_for(rows.count * rows.columns, launch.threads);
  return with_dtype(rows.dtype, "base_logits", [&]<class T>(T) {
    parallel(op.texts, 1, across, [&](int64_t first, int64_t last) {
      for (int64_t text = first; text < last; ++text) {
        const auto position_of = [&](int64_t i) {
          const int64_t r = text * (op.drafted + 1) + i;
          return Position<T>{.base = row_of<const T>(mixture.base, r),
                             .memory = row_of<const T>(mixture.memory, r),
                             .alpha = alpha_of(mixture, r),
                             .row = single_row(nullptr, rows),
                             .threads = within,
                             .seed = seed_of(op, text),
                             .offset = offset_of(op, text) + static_cast<uint64_t>(i)};
        };
        const int64_t length = length_of(text);
        const Verdict verdict = op.greedy        ? verify_greedy<T>(op, text, length, position_of)
                                : warpers.none() ? verify_plain<T>(op, text, length, position_of)
                                                 : verify_warped<T>(op, warpers, text, length, position_of);
        op.accepted[text] = verdict.accepted;
        op.next[text] = verdict.next;
      }
    });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
