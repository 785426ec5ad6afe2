// alignment_loss: β·KL(q‖p) + (1−β)·CE of p = softmax(z) against a sparse teacher q and a label y, and its gradient.
//
// With m = Σ q, log p(v) = (z_v − max) − log s, s = Σ exp(z − max):
//
//     kl      = Σ q·(log q − log p)              over the |q| entries of the row; q = 0 adds 0, q > 0 on a masked token +inf
//     ce      = −log p(y)
//     dL/dz   = (β·m + 1 − β)·p − β·q − (1−β)·onehot(y)
//
// So the teacher is |q| gathers in the loss and |q| + 1 corrections in the gradient; nothing of width V is made for it.
//
// Traffic: the loss reads a row once; written over the logits, the gradient reads it again while it is in the cache and writes
// it, so memory sees one read and one write. The separate backward pass reads once and writes once.
#include "cpu/pages.h"
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {
namespace {

// One row's part of the target. `ids` and `probs` are its |q| entries.
struct Target {
  const int32_t* ids;
  const float* probs;
  int64_t size;
  int64_t label;
};

Target target_of_row(const SparseRows& teacher, const int64_t* labels, int64_t r) {
  if (!teacher.indptr) return {nullptr, nullptr, 0, labels[r]};
  const int64_t begin = teacher.indptr[r];
  return {teacher.ids + begin, teacher.probs + begin, teacher.indptr[r + 1] - begin, labels[r]};
}

// The most entries a row has: the size of a kernel's scratch.
int64_t longest_row(const SparseRows& teacher, int64_t rows) {
  int64_t longest = 0;
  if (teacher.indptr)
    for (int64_t r = 0; r < rows; ++r) longest = larger(longest, teacher.indptr[r + 1] - teacher.indptr[r]);
  return longest;
}

// n ≤ width probabilities as a vector of accumulators; the rest 0.
template <class V>
V load_probs(const float* q, int64_t n) {
  typename V::scalar lane[V::width];
  for (int64_t i = 0; i < V::width; ++i) lane[i] = i < n ? q[i] : 0.0f;
  return load(lane);
}

template <class T>
void gather(const T* z, const Target& target, accumulator_t<T>* gathered) {
  for (int64_t i = 0; i < target.size; ++i) gathered[i] = static_cast<accumulator_t<T>>(to_float(z[target.ids[i]]));
}

// Σ f(q, z_q) over a target's entries, in chunks that keep a float32 sum short.
template <class A, class V, class F>
double sum_over_entries(const Target& target, const A* gathered, const F& f) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < target.size; chunk += 1024) {
    const int64_t end = smaller(chunk + 1024, target.size);
    V part = broadcast<V>(0);
    for (int64_t i = chunk; i < end; i += V::width) {
      const int64_t n = smaller(V::width, end - i);
      part = part + f(load_probs<V>(target.probs + i, n), load_some(gathered + i, n, A{0}));
    }
    sum += static_cast<double>(reduce_add(part));
  }
  return sum;
}

template <class A>
struct Losses {
  A kl;
  A ce;
};

template <class T, class A>
Losses<A> losses_of_row(const T* z, const Target& target, Softmax<A> state, const A* gathered) {
  using V = vec_t<T>;
  const V max = broadcast<V>(state.max), log_sum = broadcast<V>(logarithm(state.sum)), zero = broadcast<V>(0);
  const double kl = sum_over_entries<A, V>(target, gathered, [&](V q, V zq) {
    return select(equal(q, zero), zero, q * (log(q) - ((zq - max) - log_sum)));
  });
  return {static_cast<A>(kl), -state.log_prob(static_cast<A>(to_float(z[target.label])))};
}

// c·x, where a coefficient of exactly 0 drops an infinite term (β of 0 or 1 leaves one loss only), but not a NaN.
template <class A>
A weighted(A c, A x) {
  return c == 0 && x == x ? 0 : c * x;
}

// What the gradient of a row is, but for the corrections: scale·exp(z − max).
template <class A>
struct Slope {
  A max;
  A scale;
};

// Turns the gathered logits into the gradient at the target's entries, and returns that at the label. All that is read of z
// is read here, so z may be overwritten afterwards. `weight` is what the row's loss is multiplied with.
template <class T, class A>
A corrections(const T* z, const Target& target, Softmax<A> state, A beta, A weight, A* gathered, Slope<A>& slope) {
  using V = vec_t<T>;
  const double mass = sum_over_entries<A, V>(target, gathered, [](V q, V) { return q; });
  const A softmax_weight = weight * (beta * static_cast<A>(mass) + (1 - beta));
  slope = {state.max, softmax_weight / state.sum};
  const V max = broadcast<V>(slope.max), scale = broadcast<V>(slope.scale), pull = broadcast<V>(-weight * beta);
  const A label_pull = weight * (1 - beta);
  A at_label = exponential(static_cast<A>(to_float(z[target.label])) - slope.max) * slope.scale - label_pull;
  for (int64_t i = 0; i < target.size; i += V::width) {
    const int64_t n = smaller(V::width, target.size - i);
    const V p = exp(load_some(gathered + i, n, A{0}) - max) * scale;
    store_some(gathered + i, fma(load_probs<V>(target.probs + i, n), pull, p), n);
  }
  for (int64_t i = 0; i < target.size; ++i)
    if (target.ids[i] == target.label) at_label = gathered[i] = at_label - weight * beta * target.probs[i];
  return at_label;  // at β = 0 the same bits with any teacher
}

template <class T, class A>
void write_slope(const T* z, T* grad, int64_t n, Slope<A> slope) {
  using V = vec_t<T>;
  constexpr int64_t w = V::width;
  const V max = broadcast<V>(slope.max), scale = broadcast<V>(slope.scale);
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    V g[4];
    for (int u = 0; u < 4; ++u) g[u] = exp(load(z + i + u * w) - max) * scale;
    for (int u = 0; u < 4; ++u) store(grad + i + u * w, g[u]);
  }
  for (; i < n; i += w) {
    const int64_t rest = smaller(w, n - i);
    store_some(grad + i, exp(load_some(z + i, rest, static_cast<A>(0)) - max) * scale, rest);
  }
}

// Rounded to T once, from float32; the entries are overwritten, never read back.
template <class T, class A>
void write_corrections(T* grad, const Target& target, const A* corrected, A at_label) {
  for (int64_t i = 0; i < target.size; ++i) grad[target.ids[i]] = narrow<T>(corrected[i]);
  grad[target.label] = narrow<T>(at_label);
}

template <class T>
void write_zeros(T* grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = T{};
}

// A run of the kernel over rows: the row's own part is `state_of(r)`, `on_losses(r, losses)`; the gradient is optional.
template <class T>
struct Run {
  using A = accumulator_t<T>;
  const Rows& logits;
  const Rows& grad;
  const int64_t* labels;
  int64_t ignore_index;
  const SparseRows& teacher;
  A beta;

  bool ignored(int64_t r) const { return labels[r] == ignore_index; }
  const T* z(int64_t r) const { return row_of<const T>(logits, r); }
  T* g(int64_t r) const { return row_of<T>(grad, r); }

  // Many rows: each is done from end to end by one thread, while it is in that thread's cache.
  template <class StateOf, class OnLosses, class WeightOf>
  void row_by_row(int threads, const StateOf& state_of, const OnLosses& on_losses, const WeightOf& weight_of) const {
    const int64_t longest = longest_row(teacher, logits.count);
    for_each_range(logits, threads, [&](int64_t begin, int64_t end) {
      const Scratch<A> gathered(longest);
      for (int64_t r = begin; r < end; ++r) {
        if (ignored(r)) {
          on_losses(r, Losses<A>{0, 0}, Softmax<A>{0, 0});
          if (grad.data) write_zeros(g(r), logits.columns);
          continue;
        }
        const Target target = target_of_row(teacher, labels, r);
        const Softmax<A> state = state_of(r);
        gather(z(r), target, gathered.data);
        on_losses(r, losses_of_row(z(r), target, state, gathered.data), state);
        if (!grad.data) continue;
        Slope<A> slope;
        const A at_label = corrections(z(r), target, state, beta, weight_of(r), gathered.data, slope);
        write_slope(z(r), g(r), logits.columns, slope);
        write_corrections(g(r), target, gathered.data, at_label);
      }
    });
  }

  // Few rows: every row is split over the threads, in the same blocks, so that the bits are the same.
  template <class StateOf, class OnLosses, class WeightOf>
  void block_by_block(int threads, const StateOf& state_of, const OnLosses& on_losses, const WeightOf& weight_of) const {
    const Scratch<A> gathered(teacher.indptr ? teacher.nnz : 0);
    const Scratch<A> at_label(logits.count);
    const Scratch<Slope<A>> slopes(logits.count);
    const auto entries = [&](int64_t r) { return gathered.data + (teacher.indptr ? teacher.indptr[r] : 0); };
    for (int64_t r = 0; r < logits.count; ++r) {
      if (ignored(r)) {
        on_losses(r, Losses<A>{0, 0}, Softmax<A>{0, 0});
        continue;
      }
      const Target target = target_of_row(teacher, labels, r);
      const Softmax<A> state = state_of(r);
      gather(z(r), target, entries(r));
      on_losses(r, losses_of_row(z(r), target, state, entries(r)), state);
      if (grad.data) at_label[r] = corrections(z(r), target, state, beta, weight_of(r), entries(r), slopes[r]);
    }
    if (!grad.data) return;
    for_each_block(logits, threads, [&](int64_t r, int64_t begin, int64_t end) {
      if (ignored(r)) return write_zeros(g(r) + begin, end - begin);
      write_slope(z(r) + begin, g(r) + begin, end - begin, slopes[r]);
    });
    for (int64_t r = 0; r < logits.count; ++r)
      if (!ignored(r)) write_corrections(g(r), target_of_row(teacher, labels, r), entries(r), at_label[r]);
  }
};

int64_t rows_kept(const int64_t* labels, int64_t count, int64_t ignore_index) {
  int64_t kept = 0;
  for (int64_t r = 0; r < count; ++r) kept += labels[r] != ignore_index;
  return kept;
}

Status check_labels(const int64_t* labels, int64_t count, int64_t ignore_index, int64_t columns) {
  for (int64_t r = 0; r < count; ++r)
    if (labels[r] != ignore_index && (labels[r] < 0 || labels[r] >= columns))
      return {.code = Status::bad_index, .argument = "labels", .at = r, .got = labels[r], .wanted = columns};
  return {};
}

}  // namespace

Status alignment_loss(const AlignmentLoss& op, const Launch& launch) {
  const Rows& logits = op.logits;
  if (const Status s = check_labels(op.labels, logits.count, op.ignore_index, logits.columns); s.code != Status::ok) return s;
  if (const Status s = check_sparse(op.teacher, logits.count, logits.columns); s.code != Status::ok) return s;
  const int64_t kept = rows_kept(op.labels, logits.count, op.ignore_index);
  const double share = op.reduction == Reduction::mean ? 1.0 / static_cast<double>(larger(kept, 1)) : 1.0;

  return with_dtype(logits.dtype, "logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    const bool reduced = op.reduction != Reduction::none;
    const Scratch<Losses<A>> losses(reduced ? logits.count : 0);
    const A beta = static_cast<A>(op.beta);
    A* const max = static_cast<A*>(op.max);
    A* const sum = static_cast<A*>(op.sum);
    const auto total_of = [&](Losses<A> l) { return weighted(beta, l.kl) + weighted(1 - beta, l.ce); };
    const auto write_losses = [&](int64_t at, Losses<A> l) {
      static_cast<A*>(op.total)[at] = total_of(l);
      static_cast<A*>(op.kl)[at] = l.kl;
      static_cast<A*>(op.ce)[at] = l.ce;
    };
    const auto on_losses = [&](int64_t r, Losses<A> l, Softmax<A> state) {
      if (reduced) {
        losses[r] = l;
      } else {
        write_losses(r, l);
      }
      if (max) max[r] = state.max;
      if (sum) sum[r] = state.sum;
    };
    const double grad_weight = op.grad_weight ? static_cast<double>(*static_cast<const A*>(op.grad_weight)) : 1.0;
    const auto weight_of = [&](int64_t) { return static_cast<A>(grad_weight * share); };

    const Run<T> run{logits, op.grad, op.labels, op.ignore_index, op.teacher, beta};
    if (rows_are_few(logits, launch.threads)) {
      const Scratch<Softmax<A>> states(logits.count);
      with_softmax_of_rows<T>(logits, launch.threads, [&](int64_t r, Softmax<A> state) { states[r] = state; });
      run.block_by_block(launch.threads, [&](int64_t r) { return states[r]; }, on_losses, weight_of);
    } else {
      run.row_by_row(launch.threads, [&](int64_t r) { return softmax_of_row(run.z(r), logits.columns); }, on_losses, weight_of);
    }

    if (!reduced) return;
    double kl = 0, ce = 0;
    for (int64_t r = 0; r < logits.count; ++r) {
      kl += static_cast<double>(losses[r].kl);
      ce += static_cast<double>(losses[r].ce);
    }
    write_losses(0, {static_cast<A>(kl * share), static_cast<A>(ce * share)});
  });
}

Status alignment_gradient(const AlignmentGradient& op, const Launch& launch) {
  const Rows& logits = op.logits;
  if (const Status s = check_labels(op.labels, logits.count, op.ignore_index, logits.columns); s.code != Status::ok) return s;
  if (op.teacher.indptr)
    if (const Status s = check_sparse(op.teacher, logits.count, logits.columns); s.code != Status::ok) return s;
  const int64_t kept = rows_kept(op.labels, logits.count, op.ignore_index);
  const double share = op.reduction == Reduction::mean ? 1.0 / static_cast<double>(larger(kept, 1)) : 1.0;

  if (op.grad.data != logits.data) prefer_large_pages(op.grad);
  return with_dtype(logits.dtype, "logits", [&]<class T>(T) {
    using A = accumulator_t<T>;
    const A* const grad_total = static_cast<const A*>(op.grad_total);
    const auto state_of = [&](int64_t r) { return Softmax<A>{static_cast<const A*>(op.max)[r], static_cast<const A*>(op.sum)[r]}; };
    const auto on_losses = [](int64_t, Losses<A>, Softmax<A>) {};
    const auto weight_of = [&](int64_t r) {
      return static_cast<A>(static_cast<double>(grad_total[op.reduction == Reduction::none ? r : 0]) * share);
    };
    const Run<T> run{logits, op.grad, op.labels, op.ignore_index, op.teacher, static_cast<A>(op.beta)};
    if (rows_are_few(logits, launch.threads)) {
      run.block_by_block(launch.threads, state_of, on_losses, weight_of);
    } else {
      run.row_by_row(launch.threads, state_of, on_losses, weight_of);
    }
  });
}

}  // namespace memdec::MEMDEC_LEVEL
