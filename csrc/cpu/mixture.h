// What the interpolate family shares: a row's two softmax states, found in one pass over each of its two rows of logits.
#pragma once

#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

// One row of α·softmax(memory) + (1−α)·softmax(base).
template <class A>
struct MixtureRow {
  Softmax<A> base, memory;
  double alpha;

  bool uses_base() const { return alpha < 1; }
  bool uses_memory() const { return alpha > 0; }
  // A used row with a NaN or +inf in it has a sum of NaN, one without an unmasked token a sum of 0: every p_mix is NaN.
  bool broken() const { return (uses_base() && !(base.sum > 0)) || (uses_memory() && !(memory.sum > 0)); }

  // log of a component's weight in the mixture over its sum: log(weight · p(v)) = (z_v − max) + this.
  A log_scale_base() const { return static_cast<A>(::log1p(-alpha) - ::log(static_cast<double>(base.sum))); }
  A log_scale_memory() const { return static_cast<A>(::log(alpha) - ::log(static_cast<double>(memory.sum))); }
};

inline double alpha_of(const Mixture& mixture, int64_t r) { return mixture.alphas ? mixture.alphas[r] : mixture.alpha; }

inline Status check_alpha(double alpha, const double* alphas, int64_t count) {
  for (int64_t r = 0; r < (alphas ? count : 1); ++r) {
    const double value = alphas ? alphas[r] : alpha;
    if (!(value >= 0 && value <= 1)) return {.code = Status::bad_fraction, .argument = "alpha", .at = r, .number = value};
  }
  return {};
}

inline int64_t blocks_of(int64_t columns) { return (columns + block_columns - 1) / block_columns; }

template <class A>
inline Softmax<A> merge_blocks(const Softmax<A>* states, int64_t blocks) {
  Softmax<A> state;
  for (int64_t b = 0; b < blocks; ++b) state = merge(state, states[b]);
  return state;
}

// Calls f(r, row, base_blocks, memory_blocks) once for every row; the last two are the states of the row's blocks (those of
// a component that has no weight are not filled in). Few long rows are split over the threads, f excepted.
template <class T, class F>
inline void with_mixture_of_rows(const Mixture& mixture, int threads, const F& f) {
  using A = accumulator_t<T>;
  const Rows& rows = mixture.base;
  const int64_t blocks = blocks_of(rows.columns);
  const auto read_block = [&](int64_t r, int64_t begin, int64_t n, Softmax<A>& base, Softmax<A>& memory) {
    const double alpha = alpha_of(mixture, r);
    if (alpha < 1) base = softmax_of_block(row_of<const T>(mixture.base, r) + begin, n);
    if (alpha > 0) memory = softmax_of_block(row_of<const T>(mixture.memory, r) + begin, n);
  };
  const auto finish = [&](int64_t r, const Softmax<A>* base, const Softmax<A>* memory) {
    MixtureRow<A> row{.base = {}, .memory = {}, .alpha = alpha_of(mixture, r)};
    if (row.uses_base()) row.base = merge_blocks(base, blocks);
    if (row.uses_memory()) row.memory = merge_blocks(memory, blocks);
    f(r, row, base, memory);
  };
  if (rows_are_few(rows, threads)) {
    const Scratch<Softmax<A>> states(2 * rows.count * blocks);
    Softmax<A>* const base = states.data;
    Softmax<A>* const memory = states.data + rows.count * blocks;
    for_each_block(rows, threads, [&](int64_t r, int64_t begin, int64_t end) {
      const int64_t i = r * blocks + begin / block_columns;
      read_block(r, begin, end - begin, base[i], memory[i]);
    });
    for (int64_t r = 0; r < rows.count; ++r) finish(r, base + r * blocks, memory + r * blocks);
    return;
  }
  const int used = threads_for(rows.count * rows.columns, threads);
  parallel(rows.count, larger(1, rows.count / (used * int64_t{32})), used, [&](int64_t first, int64_t last) {
    const Scratch<Softmax<A>> states(2 * blocks);
    for (int64_t r = first; r < last; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * block_columns;
        read_block(r, begin, smaller(block_columns, rows.columns - begin), states[b], states[blocks + b]);
      }
      finish(r, states.data, states.data + blocks);
    }
  });
}

// Calls f(i, n, vector of the accumulator for each pointer's elements i … i+n−1) over n ≤ width elements at a time; what is
// missing at the end reads as −inf.
template <class T, class F>
inline void for_each_vector(const T* a, const T* b, int64_t count, const F& f) {
  using V = vec_t<T>;
  constexpr int64_t w = V::width;
  const auto lowest = static_cast<typename V::scalar>(-INFINITY);
  int64_t i = 0;
  for (; i + w <= count; i += w) f(i, w, load(a + i), load(b + i));
  if (i < count) f(i, count - i, load_some(a + i, count - i, lowest), load_some(b + i, count - i, lowest));
}

// log(exp(a) + exp(b)) lane by lane, with an absolute error of an ulp of 1; −inf where both are −inf. No NaN comes in.
template <class V>
inline V logaddexp(V a, V b) {
  const V high = max(a, b);
  const V ratio = exp(min(a, b) - high);  // NaN where both are −inf
  const V lowest = broadcast<V>(static_cast<typename V::scalar>(-INFINITY));
  return select(equal(high, lowest), high, high + log(broadcast<V>(1) + ratio));
}

// out[i] = log p_mix of n tokens, divided by `temperature`.
template <class T>
inline void log_probs_of_block(const T* base, const T* memory, int64_t n, const MixtureRow<accumulator_t<T>>& row,
                               accumulator_t<T>* out, double temperature = 1) {
  using V = vec_t<T>;
  using A = accumulator_t<T>;
  const V base_max = broadcast<V>(row.base.max), memory_max = broadcast<V>(row.memory.max);
  const V base_scale = broadcast<V>(row.log_scale_base()), memory_scale = broadcast<V>(row.log_scale_memory());
  // As on CUDA: float32 holds neither a larger nor a smaller one well enough to divide by.
  if (sizeof(A) == 4) temperature = temperature < 1e-30 ? 1e-30 : temperature > 1e30 ? 1e30 : temperature;
  const V divisor = broadcast<V>(static_cast<A>(temperature));
  const bool divided = temperature != 1;
  const auto write = [&](int64_t i, int64_t count, V value) {
    if (divided) value = value / divisor;
    if (count == V::width) store(out + i, value);
    else store_some(out + i, value, count);
  };
  if (row.broken()) {
    const V nan = broadcast<V>(static_cast<A>(NAN));
    for (int64_t i = 0; i < n; i += V::width) write(i, smaller(V::width, n - i), nan);
  } else if (!row.uses_memory()) {
    for_each_vector(base, base, n, [&](int64_t i, int64_t count, V z, V) { write(i, count, (z - base_max) + base_scale); });
  } else if (!row.uses_base()) {
    for_each_vector(memory, memory, n, [&](int64_t i, int64_t count, V z, V) { write(i, count, (z - memory_max) + memory_scale); });
  } else {
    for_each_vector(base, memory, n, [&](int64_t i, int64_t count, V zb, V zm) {
      write(i, count, logaddexp((zb - base_max) + base_scale, (zm - memory_max) + memory_scale));
    });
  }
}

}  // namespace memdec::MEMDEC_LEVEL
