// The likeliest token of a row of the mixture: the token v of the largest p_mix(v) = w_m·exp(z_m(v) − max_m) + w_b·exp(z_b(v) −
// max_b), where w_m = α/sum_m and w_b = (1−α)/sum_b.
//
// A second pass that computed p_mix of every token would cost as much as the first, which found the sums. But the winner's
// p_mix is at least max(w_m, w_b), what the likeliest token of either component has from that component alone; and where
// p_mix(v) exceeds some best, one of its two terms exceeds best/2. So the second pass compares logits with two thresholds,
// skips whole blocks whose maxima lie below both, and exponentiates only what passes.
#pragma once

#include "cpu/mixture.h"

namespace memdec::MEMDEC_LEVEL {

// The first position of `value` in a row in which it is the maximum of some block.
template <class T>
inline int64_t find(const T* z, int64_t columns, accumulator_t<T> value, const Softmax<accumulator_t<T>>* blocks) {
  for (int64_t begin = 0; begin < columns; begin += block_columns) {
    if (blocks[begin / block_columns].max != value) continue;
    for (int64_t i = begin; i < smaller(columns, begin + block_columns); ++i)
      if (static_cast<accumulator_t<T>>(to_float(z[i])) == value) return i;
  }
  return -1;
}

// A step under x, so that a logit at the threshold itself passes.
template <class A>
inline A logit_below(double x) {
  if constexpr (sizeof(A) == sizeof(float)) return ::nextafterf(static_cast<float>(x), -INFINITY);
  else return ::nextafter(x, -INFINITY);
}

template <class T>
inline int64_t argmax_of_row(const T* base, const T* memory, int64_t columns, const MixtureRow<accumulator_t<T>>& row,
                             const Softmax<accumulator_t<T>>* base_blocks, const Softmax<accumulator_t<T>>* memory_blocks) {
  using V = vec_t<T>;
  using A = accumulator_t<T>;
  if (row.broken()) return -1;
  if (!row.uses_memory()) return find(base, columns, row.base.max, base_blocks);
  if (!row.uses_base()) return find(memory, columns, row.memory.max, memory_blocks);

  const A base_weight = static_cast<A>((1 - row.alpha) / static_cast<double>(row.base.sum));
  const A memory_weight = static_cast<A>(row.alpha / static_cast<double>(row.memory.sum));
  A base_threshold, memory_threshold;
  // The logits from which a component alone reaches half of p, less a margin for the rounding of exp.
  const auto set_thresholds = [&](A p) {
    const auto logit = [&](const Softmax<A>& state, A weight) {
      const double z = static_cast<double>(state.max) + ::log(0.4999 * static_cast<double>(p) / static_cast<double>(weight));
      return logit_below<A>(z);
    };
    base_threshold = logit(row.base, base_weight);
    memory_threshold = logit(row.memory, memory_weight);
  };
  set_thresholds(base_weight > memory_weight ? base_weight : memory_weight);

  const V base_max = broadcast<V>(row.base.max), memory_max = broadcast<V>(row.memory.max);
  const V base_scale = broadcast<V>(base_weight), memory_scale = broadcast<V>(memory_weight);
  A best = 0;
  int64_t winner = -1;
  for (int64_t begin = 0; begin < columns; begin += block_columns) {
    const int64_t b = begin / block_columns;
    if (!(base_blocks[b].max > base_threshold) && !(memory_blocks[b].max > memory_threshold)) continue;
    for_each_vector(base + begin, memory + begin, smaller(block_columns, columns - begin), [&](int64_t i, int64_t, V zb, V zm) {
      if (!any(less(broadcast<V>(base_threshold), zb)) && !any(less(broadcast<V>(memory_threshold), zm))) return;
      const V p = fma(memory_scale, exp(zm - memory_max), base_scale * exp(zb - base_max));
      if (!any(less(broadcast<V>(best), p))) return;
      best = reduce_max(p);
      winner = begin + i + first(equal(p, broadcast<V>(best)));
      set_thresholds(best);
    });
  }
  return winner;
}

}  // namespace memdec::MEMDEC_LEVEL
