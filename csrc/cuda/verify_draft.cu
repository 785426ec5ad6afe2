// verify_draft: speculative sampling (Leviathan et al., ICML 2023) of p_mix, the memory being the drafter. What is computed is
// what csrc/cpu/verify_draft.cpp says, and one seed gives one text on both. With q what the drafts were drawn from, p the target:
//
//   accept x with probability min(1, p(x) / q(x));   where it falls draw from (p − q)₊, normalised;
//   the token after the last draft is drawn from q and verified like one.
//
//   nothing warped   q = p_mem, p = α·p_mem + (1−α)·p_base: p(x) / q(x) = α + (1−α)·p_base(x) / p_mem(x), so a coin u < α accepts
//                    before any logit is looked at, and (p − q)₊ ∝ (p_base − p_mem)₊
//   warped           p is the warped mixture, q the warped memory (cuda/cuts.cuh)
//   greedy           x stands while it is the mixture's likeliest token, which comes next: interpolate_argmax, and a comparison
//
// A text is verified position by position, but waiting for each would leave the device idle between small launches. So all
// positions are measured at once, spread over spans of V; then a warp a position says whether its draft stands, the first that
// does not (or the last) ends the round, and only what replaces a fallen draft is computed after that, over the spans of that
// position alone. Rows, for B texts: (B, γ+1, V) of each model; position i of text b is row b·(γ+1) + i.
//
//   measure    a block a span of a row that counts: its softmax state; of the token after the last draft, which the memory drafts as
//              interpolate_sample draws, what it is if it is drawn from this span
//   scale      temperature only: the states of both sides' scores log p / T
//   score, bin, weigh, cut   with cuts: scores of both sides are written, and what the warpers keep of each is found
//   settle     a block a text: where its round ends, with what
//   replace    a block a span: the mass of (p − q)₊, and the best of its log + Gumbel noise
//   finish     a block a text: the token; where (p − q)₊ has no mass but rounding, one is drawn from p, by this one block
//
// Traffic: nothing warped: both rows of a position that its coin does not settle, once, and of the last one the memory's if it
// does; positions behind the end of the round are read too, what lies behind a text's length is not. Warped: both rows of each
// position, the memory's three times, the base's twice (all but the first time from the second-level cache, where few texts fit),
// and with cuts what interpolate_sample moves of two rows' scores. Then both rows of the end of the round once more, if a draft fell.
// Greedy: as interpolate_argmax, of all positions.
#include "cuda/cuts.cuh"

namespace memdec::cuda {
namespace {

constexpr double no_mass = 1e-6;  // a residual of less is rounding

enum Side : int { target = 0, draft = 1 };
constexpr int sides = 2;

// ---------------------------------------------------------------------------------------------------------------- positions

// Position i of a text.
struct Position {
  int64_t text, i, length;
  int64_t drafted;  // the token, where i < length
  double alpha, u;  // u: the coin that accepts
  uint64_t seed, offset;
  bool refused;  // its draft, its text's length or α is out of range, which the host could not look at: the round has no token

  __device__ bool is_last() const { return i == length; }
  __device__ bool counts() const { return i <= length && !refused; }
};

__device__ inline Position position_of(const VerifyDraft& op, int64_t text, int64_t i) {
  const int64_t given = op.lengths ? op.lengths[text] : op.drafted;
  const bool is_length = given >= 0 && given <= op.drafted;
  const int64_t length = is_length ? given : 0;
  const double alpha = alpha_of(op.mixture, text * (op.drafted + 1) + i);
  const uint64_t seed = seed_of(op, text), offset = offset_of(op, text) + static_cast<uint64_t>(i);
  const int64_t drafted = i < length ? op.draft_ids[text * op.drafted + i] : 0;
  return {.text = text,
          .i = i,
          .length = length,
          .drafted = drafted,
          .alpha = alpha,
          .u = uniform(draw_of(seed, offset, acceptance_stream, 0)),
          .seed = seed,
          .offset = offset,
          .refused = !is_length || !(alpha >= 0 && alpha <= 1) || drafted < 0 || drafted >= op.mixture.base.columns};
}
__device__ inline Position position_of(const VerifyDraft& op, int64_t r) {
  return position_of(op, r / (op.drafted + 1), r % (op.drafted + 1));
}

// Where and with what a text's round ends.
enum class Rest : int32_t { none, residual, mixture };  // what its token is still to be drawn from
struct Ending {
  int64_t position = INT64_MAX;  // none yet: the draft stands
  int32_t token = -1;            // where nothing is left to draw
  Rest rest = Rest::none;

  static __device__ Ending earlier(Ending a, Ending b) { return b.position < a.position ? b : a; }
};

// What is known of a side's scores when they have been measured: log p(v) = (score − top) − log_sum where v is kept.
struct Measured {
  float top = 0;
  float log_sum = 0;
  uint32_t drawable = 1;
  uint32_t padding = 0;
  Kept kept{};
};

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states = nullptr;  // (B·(γ+1), spans, components)
  Softmax<float>* scaled = nullptr;  // (B·(γ+1), spans, sides) temperature only
  Measured* measured = nullptr;      // (B·(γ+1), sides) cuts
  Scores scores{};                   // cuts
  Winner* following = nullptr;       // (B, spans) the token after the last draft, as the memory drafts it: of each span
  Ending* endings = nullptr;         // (B,)
  Winner* winners = nullptr;         // (B, spans) of what replaces a fallen draft
  double* masses = nullptr;          // (B, spans) of the residual
};

// The two states of a position's row: the memory's always, the base's where it has weight.
__device__ inline MixtureRow states_of(const VerifyDraft& op, const Scratch& scratch, int64_t r, double alpha) {
  const int64_t spans = spans_of(op.mixture.base.columns);
  MixtureRow row{.of = {}, .alpha = alpha};
#pragma unroll  // what is indexed at run time is no register
  for (int c = 0; c < components; ++c)
    if (c == memory || row.uses(c))
      row.of[c] = merged_by_warp(spans, [&](int64_t span) { return scratch.states[state_at(spans, r, span, c)]; });
  return row;
}

// A side's mixture: the target's is the row's own, the draft's the memory alone.
__device__ inline MixtureRow row_of_side(MixtureRow row, int side) {
  if (side == draft) row.alpha = 1;
  return row;
}

// log p(v) of a side of a position, from its two logits.
struct Law {
  MixtureRow row;
  LogProb log_prob;
  float sharpness;
  Measured measured;

  __device__ Law(const MixtureRow& of, float over, const Measured& found) : row(of), log_prob(of), sharpness(over), measured(found) {}
  __device__ float operator()(float z_base, float z_memory, int64_t token) const {
    const float score = scored(log_prob(row.uses(base) ? z_base : -INFINITY, row.uses(memory) ? z_memory : -INFINITY), sharpness);
    return measured.kept.has(score, token) ? (score - measured.top) - measured.log_sum : -INFINITY;
  }
};

// The law of a side of row r. Every lane of the warp must call it.
__device__ inline Law law_of(const VerifyDraft& op, const Scratch& scratch, int64_t r, const MixtureRow& row, int side) {
  Measured measured;
  if (has_cuts(op)) {
    measured = scratch.measured[r * sides + side];
  } else if (!is_plain(op)) {
    const int64_t spans = spans_of(op.mixture.base.columns);
    const Softmax<float> state = merged_by_warp(spans, [&](int64_t span) { return scratch.scaled[(r * spans + span) * sides + side]; });
    measured.top = state.max, measured.log_sum = logarithm(state.sum), measured.drawable = state.sum > 0;
  }
  return {row_of_side(row, side), sharpness_of(op), measured};
}

// ---------------------------------------------------------------------------------------------------------------- measuring

// A block a span of a component of a row.
template <class T>
__global__ void __launch_bounds__(block_threads) measure(VerifyDraft op, Scratch scratch) {
  const int64_t columns = op.mixture.base.columns, spans = spans_of(columns);
  const int64_t c = blockIdx.x % components, span = blockIdx.x / components % spans, r = blockIdx.x / components / spans;
  const Position at = position_of(op, r);
  if (!at.counts()) return;
  const bool plain = is_plain(op);
  const bool follows = plain && c == memory && at.is_last();
  const bool is_measured = plain ? !(at.u < at.alpha) : c == memory || at.alpha < 1;
  if (!follows && !is_measured) return;
  const T* const z = row_of<const T>(rows_of(op.mixture, static_cast<int>(c)), r);
  float value[share_size];
  load_share(z, columns, span, value);
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) scratch.states[blockIdx.x] = state;
  if (follows) {
    const Winner winner = winner_of_span<T>(value, columns, span, at.seed, at.offset, noise_stream,
                                            [&](int64_t column) { return widened(z[column]); });
    if (threadIdx.x == 0) scratch.following[at.text * spans + span] = winner;
  }
}

// Temperature only: a block a span of a side of a row. (Here and below: bounds without the 1 give fewer registers, and spills.)
template <class T>
__global__ void __launch_bounds__(block_threads, 1) scale(VerifyDraft op, Scratch scratch) {
  const int64_t spans = spans_of(op.mixture.base.columns);
  const int64_t span = blockIdx.x / sides % spans, r = blockIdx.x / sides / spans;
  const int side = static_cast<int>(blockIdx.x % sides);
  const Position at = position_of(op, r);
  if (!at.counts()) return;
  const MixtureRow row = row_of_side(states_of(op, scratch, r, at.alpha), side);
  const float sharpness = sharpness_of(op);
  float value[share_size];
  scores_of_share<T>(op.mixture, r, span, row, sharpness, value);
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) scratch.scaled[blockIdx.x] = state;
  if (side != draft || !at.is_last()) return;
  const Winner winner = winner_of_scores<T>(op.mixture, r, span, row, sharpness, value, at.seed, at.offset);
  if (threadIdx.x == 0) scratch.following[at.text * spans + span] = winner;
}

// Cuts: a block a span of a side of a row, side `first` being the first of those that have scores at once.
template <class T>
__global__ void __launch_bounds__(block_threads) score(VerifyDraft op, Scratch scratch, int64_t first) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(op.mixture.base.columns), i = blockIdx.x / spans, span = blockIdx.x % spans, r = (first + i) / sides;
  const Position at = position_of(op, r);
  const Scores scores = scratch.scores.row(i);
  if (!at.counts()) {
    if (threadIdx.x == 0) scores.top[span] = -INFINITY;
    return;
  }
  const MixtureRow row = row_of_side(states_of(op, scratch, r, at.alpha), static_cast<int>((first + i) % sides));
  write_scores<T>(op.mixture, r, span, row, sharpness_of(op), scores);
}

// Only the token after the last draft is drawn here, as the memory drafts it.
__device__ inline bool draws_here(int64_t i, const Position& at) { return i % sides == draft && at.is_last(); }

// A block a span of a side of a row.
__global__ void __launch_bounds__(block_threads) weigh(VerifyDraft op, Scratch scratch, int64_t first, Cuts cuts) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t spans = spans_of(op.mixture.base.columns), i = blockIdx.x / spans;
  const Position at = position_of(op, (first + i) / sides);
  const Drawn drawn =
      draw_from_span(scratch.scores.row(i), blockIdx.x % spans, cuts, true, draws_here(first + i, at), at.seed, at.offset);
  if (threadIdx.x == 0) scratch.scores.drawn[blockIdx.x] = drawn;
}

// A block a side of a row.
__global__ void __launch_bounds__(row_threads) cut(VerifyDraft op, Scratch scratch, int64_t first, Cuts cuts) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t i = first + blockIdx.x, spans = spans_of(op.mixture.base.columns);
  const Position at = position_of(op, i / sides);
  const Scores scores = scratch.scores.row(blockIdx.x);
  Measured measured{.top = top_of(scores)};
  measured.drawable = measured.top > -INFINITY;
  if (measured.drawable) {
    measured.kept = cut_row(scores, measured.top, cuts);
    const bool draws = draws_here(i, at);
    const Drawn drawn = draw_from_row(scores, measured.top, cuts, measured.kept, true, draws, at.seed, at.offset);
    measured.log_sum = static_cast<float>(log(static_cast<double>(drawn.mass) / static_cast<double>(cuts.one)));
    if (draws)
      for (int64_t span = threadIdx.x; span < spans; span += row_threads)
        scratch.following[at.text * spans + span] = span == 0 ? drawn.winner : Winner{};
  }
  if (threadIdx.x == 0) scratch.measured[i] = measured;
}

// ---------------------------------------------------------------------------------------------------------------- verifying

// Whether a text's round ends at a position. A warp's work.
template <class T>
__device__ inline Ending verdict(const VerifyDraft& op, const Scratch& scratch, const Position& at) {
  const int64_t r = at.text * (op.drafted + 1) + at.i, spans = spans_of(op.mixture.base.columns);
  const Ending stands{}, none{.position = at.i};
  if (at.refused) return none;
  const bool plain = is_plain(op), tossed = plain && at.u < at.alpha;
  if (tossed && !at.is_last()) return stands;
  const auto token = [&] {
    if (!at.is_last()) return static_cast<int32_t>(at.drafted);
    if (has_cuts(op)) {
      Winner best;
      for (int64_t span = lane_of_thread(); span < spans; span += warp_size)
        best = Winner::merge(best, scratch.following[at.text * spans + span]);
      return reduce_warp(best, Winner::merge).token;
    }
    const int64_t span = SpanNoise(at.seed, at.offset).drawn(spans, [&](int64_t i) {
      return plain ? scratch.states[state_at(spans, r, i, memory)] : scratch.scaled[(r * spans + i) * sides + draft];
    });
    return span < 0 ? -1 : scratch.following[at.text * spans + span].token;
  };
  const auto accepted = [&](int32_t x) { return at.is_last() ? Ending{.position = at.i, .token = x} : stands; };
  if (tossed) return accepted(token());

  const MixtureRow row = states_of(op, scratch, r, at.alpha);
  const auto logit = [&](int c, int32_t x) { return widened(row_of<const T>(rows_of(op.mixture, c), r)[x]); };
  if (plain) {
    // Here α < 1. At α = 0 the memory's row may be anything; it has drafted nothing then.
    if (row.broken()) return none;
    if (!(row.of[memory].sum > 0)) return {.position = at.i, .rest = Rest::mixture};
    const int32_t x = token();
    const double ratio = exp(static_cast<double>(row.of[base].log_prob(logit(base, x))) -
                             static_cast<double>(row.of[memory].log_prob(logit(memory, x))));
    if (at.u < at.alpha + (1 - at.alpha) * ratio) return accepted(x);  // a ratio of NaN: neither can give the token, it falls
    return {.position = at.i, .rest = Rest::residual};
  }
  const Law p = law_of(op, scratch, r, row, target), q = law_of(op, scratch, r, row, draft);
  if (!p.measured.drawable) return none;
  if (!q.measured.drawable) return {.position = at.i, .rest = Rest::mixture};
  const int32_t x = token();
  const float z_base = row.uses(base) ? logit(base, x) : -INFINITY, z_memory = logit(memory, x);
  const double ratio = exp(static_cast<double>(p(z_base, z_memory, x)) - static_cast<double>(q(z_base, z_memory, x)));
  return at.u < ratio ? accepted(x) : Ending{.position = at.i, .rest = Rest::residual};
}

// A block a text.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) settle(VerifyDraft op, Scratch scratch) {
  const int64_t text = blockIdx.x;
  Ending ending;
  for (int64_t i = warp_of_thread(); i <= op.drafted && ending.position == INT64_MAX; i += block_threads / warp_size) {
    const Position at = position_of(op, text, i);
    if (i > at.length) break;
    ending = verdict<T>(op, scratch, at);
  }
  ending = reduce_block<block_threads>(ending, Ending::earlier);
  if (threadIdx.x != 0) return;
  scratch.endings[text] = ending;
  op.accepted[text] = ending.position;
  if (ending.rest == Rest::none) op.next[text] = ending.token;
}

// A warp a text: the same where the mixture's likeliest tokens decide.
__global__ void __launch_bounds__(warp_size) settle_greedy(VerifyDraft op, const int64_t* likeliest) {
  const int64_t text = blockIdx.x;
  Ending ending;
  for (int64_t i = threadIdx.x; i <= op.drafted && ending.position == INT64_MAX; i += warp_size) {
    const Position at = position_of(op, text, i);
    if (i > at.length) break;
    const int64_t token = at.refused ? -1 : likeliest[text * (op.drafted + 1) + i];
    if (at.refused || at.is_last() || token != at.drafted) ending = {.position = i, .token = static_cast<int32_t>(token)};
  }
  ending = reduce_warp(ending, Ending::earlier);
  if (threadIdx.x != 0) return;
  op.accepted[text] = ending.position;
  op.next[text] = ending.token;
}

// ---------------------------------------------------------------------------------------------------------------- replacing

// The best of the block's span of what a fallen draft is replaced from, and the mass of the span if that is the residual.
template <class T>
__device__ inline Winner winner_of_rest(const VerifyDraft& op, const Scratch& scratch, const Position& at, Rest rest, int64_t span,
                                        double& mass) {
  const int64_t columns = op.mixture.base.columns, r = at.text * (op.drafted + 1) + at.i;
  const bool is_residual = rest == Rest::residual;
  const MixtureRow row = states_of(op, scratch, r, at.alpha);
  MixtureRow aimed = row, read = row;
  if (is_residual && is_plain(op)) aimed.alpha = 0;      // (p_base − p_mem)₊: of the mixture only the base
  if (is_residual && row.alpha == 0) read.alpha = 0.5;  // the draft's law wants the memory's logits, whatever its weight
  const Law p = law_of(op, scratch, r, aimed, target), q = law_of(op, scratch, r, row, draft);
  const auto log_of = [&](float z_base, float z_memory, int64_t token) {
    const float log_p = p(z_base, z_memory, token);
    if (!is_residual) return log_p;
    return logarithm(fmaxf(exponential(log_p) - exponential(q(z_base, z_memory, token)), 0.0f));
  };
  float value[share_size], other[share_size], sum = 0;
  logits_of_share<T>(op.mixture, r, span, read, base, 0, value);
  logits_of_share<T>(op.mixture, r, span, read, memory, 0, other);
#pragma unroll
  for (int i = 0; i < share_size; ++i) {
    value[i] = log_of(value[i], other[i], column_of<T>(span, i));
    sum += exponential(value[i]);
  }
  mass = static_cast<double>(sum_over_block<block_threads>(sum));
  return winner_of_span<T>(value, columns, span, at.seed, at.offset, residual_stream, [&](int64_t column) {
    return log_of(logit_of<T>(op.mixture, r, read, base, column), logit_of<T>(op.mixture, r, read, memory, column), column);
  });
}

// A block a span of a text.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) replace(VerifyDraft op, Scratch scratch) {
  const int64_t spans = spans_of(op.mixture.base.columns), text = blockIdx.x / spans;
  const Ending ending = scratch.endings[text];
  if (ending.rest == Rest::none) return;
  double mass;
  const Winner winner = winner_of_rest<T>(op, scratch, position_of(op, text, ending.position), ending.rest, blockIdx.x % spans, mass);
  if (threadIdx.x == 0) scratch.winners[blockIdx.x] = winner, scratch.masses[blockIdx.x] = mass;
}

// A block a text.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) finish(VerifyDraft op, Scratch scratch) {
  const int64_t spans = spans_of(op.mixture.base.columns), text = blockIdx.x;
  const Ending ending = scratch.endings[text];
  if (ending.rest == Rest::none) return;
  Winner best;
  double mass = 0;
  for (int64_t span = threadIdx.x; span < spans; span += block_threads) {
    best = Winner::merge(best, scratch.winners[text * spans + span]);
    mass += scratch.masses[text * spans + span];
  }
  best = reduce_block<block_threads>(best, Winner::merge);
  mass = sum_over_block<block_threads>(mass);
  if (ending.rest == Rest::residual && !(mass > no_mass)) {
    best = {};
    for (int64_t span = 0; span < spans; ++span)
      best = Winner::merge(best, winner_of_rest<T>(op, scratch, position_of(op, text, ending.position), Rest::mixture, span, mass));
  }
  if (threadIdx.x == 0) op.next[text] = best.token;
}

// ---------------------------------------------------------------------------------------------------------------- launchers

InterpolateArgmax argmax_of(const VerifyDraft& op, int64_t* tokens) { return {.mixture = op.mixture, .tokens = tokens}; }

Scratch scratch_of(const VerifyDraft& op, Parts& parts) {
  const Rows& rows = op.mixture.base;
  const int64_t spans = spans_of(rows.columns);
  Scratch scratch;
  scratch.states = parts.take<Softmax<float>>(span_states(op.mixture));
  if (has_cuts(op)) {
    scratch.measured = parts.take<Measured>(rows.count * sides);
    scratch.scores = take_scores(parts, rows.count * sides, rows.columns);
  } else if (!is_plain(op)) {
    scratch.scaled = parts.take<Softmax<float>>(rows.count * spans * sides);
  }
  scratch.following = parts.take<Winner>(op.texts * spans);
  scratch.endings = parts.take<Ending>(op.texts);
  scratch.winners = parts.take<Winner>(op.texts * spans);
  scratch.masses = parts.take<double>(op.texts * spans);
  return scratch;
}

}  // namespace

int64_t workspace_bytes(const VerifyDraft& op) {
  Parts parts(nullptr);
  if (!op.greedy) {
    scratch_of(op, parts);
    return parts.bytes();
  }
  parts.take<int64_t>(op.mixture.base.count);
  return parts.bytes() + workspace_bytes(argmax_of(op, nullptr));
}

Status verify_draft(const VerifyDraft& op, const Launch& where) {
  const Rows& rows = op.mixture.base;
  Parts parts(where.workspace);
  if (op.greedy && op.texts > 0) {
    int64_t* const likeliest = parts.take<int64_t>(rows.count);
    Launch argmax = where;
    argmax.workspace = static_cast<char*>(where.workspace) + parts.bytes();
    argmax.workspace_bytes -= parts.bytes();
    if (const Status s = cuda::interpolate_argmax(argmax_of(op, likeliest), argmax); s.code != Status::ok) return s;
    return on_device(where, rows.dtype, "base_logits",
                     [&](auto, cudaStream_t stream) { launch(settle_greedy, op.texts, warp_size, 0, stream, op, likeliest); });
  }
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (op.texts == 0) return;
    const Scratch scratch = scratch_of(op, parts);
    const int64_t spans = spans_of(rows.columns);
    launch(measure<T>, span_states(op.mixture), block_threads, 0, stream, op, scratch);
    if (has_cuts(op)) {
      const int64_t at_once = rows_at_once(rows.columns);
      const Cuts cuts = cuts_of(op);
      for (int64_t first = 0; first < rows.count * sides; first += at_once) {
        const int64_t count = smaller(at_once, rows.count * sides - first);
        launch_early(score<T>, count * spans, block_threads, 0, stream, op, scratch, first);
        if (cuts.have_borders()) launch_early(bin_scores, count * spans, block_threads, 0, stream, scratch.scores, cuts);
        launch_early(weigh, count * spans, block_threads, 0, stream, op, scratch, first, cuts);
        launch_early(cut, count, row_threads, 0, stream, op, scratch, first, cuts);
      }
    } else if (!is_plain(op)) {
      launch(scale<T>, rows.count * spans * sides, block_threads, 0, stream, op, scratch);
    }
    launch(settle<T>, op.texts, block_threads, 0, stream, op, scratch);
    launch(replace<T>, op.texts * spans, block_threads, 0, stream, op, scratch);
    launch(finish<T>, op.texts, block_threads, 0, stream, op, scratch);
  });
}

}  // namespace memdec::cuda
