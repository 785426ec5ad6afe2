// The state of an online softmax: what one needs of the values seen so far, and how two such states are merged.
#pragma once

#include "core/number.h"

namespace memdec {
namespace {

// Σ exp(z) = sum · exp(max). The pair is never folded into one float32 logsumexp: near 1e4 that has lost the digits.
//   nothing seen, or only −inf    max = −inf, sum = 0
//   NaN or +inf seen              sum = NaN, whatever max
// log p(v) = (z_v − max) − log(sum): NaN for both of the cases above, −inf for a masked v in a row with anything unmasked.
template <class A>
struct Softmax {
  A max = static_cast<A>(-INFINITY);
  A sum = 0;

  MEMDEC_HD A log_prob(A z) const { return (z - max) - logarithm(sum); }
  MEMDEC_HD A prob(A z) const { return exponential(z - max) / sum; }
  MEMDEC_HD double logsumexp() const { return static_cast<double>(max) + logarithm(static_cast<double>(sum)); }
};

// Merging in a fixed order gives the same bits whoever computed the parts.
template <class A>
MEMDEC_HD inline Softmax<A> merge(Softmax<A> a, Softmax<A> b) {
  Softmax<A> merged;
  merged.max = a.max > b.max ? a.max : b.max;
  const A shift = merged.max == static_cast<A>(-INFINITY) ? 0 : merged.max;  // −inf − (−inf) would be NaN
  merged.sum = a.sum * exponential(a.max - shift) + b.sum * exponential(b.max - shift);
  return merged;
}

}  // namespace
}  // namespace memdec
