// Selecting and sorting unsigned 64-bit keys. A candidate is one number, its rank in the upper half and its id in the lower, so
// that equal ranks are ordered by id and no two keys are equal: a selection has one right answer, whatever the order of the input.
#pragma once

#include "cpu/simd.h"

namespace memdec::MEMDEC_LEVEL {

// The bits of a float as an unsigned number of the same order: −inf lowest, +inf highest (NaN must not come here).
inline uint32_t rank_of(float x) {
  const uint32_t bits = bits_of_float(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float float_of_rank(uint32_t rank) { return float_of_bits(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu)); }

inline uint64_t key_of(uint32_t rank, uint32_t id) { return static_cast<uint64_t>(rank) << 32 | id; }
inline int64_t id_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

// What `partition` and `select_smallest` may write beyond the last element of `keys` and of `scratch`.
constexpr int64_t select_slack = 8;

// Moves the keys below `pivot` to the front, the others behind them; returns how many are below.
inline int64_t partition(uint64_t* keys, int64_t n, uint64_t pivot, uint64_t* scratch) {
  int64_t low = 0, high = 0, i = 0;
#if defined(MEMDEC_LEVEL_IS_avx512)
  // Compressing in a register and storing all lanes: a compressing store to memory is microcode on some processors. The store at
  // keys + low never reaches a key that is still to be read, because low ≤ i.
  const __m512i bound = _mm512_set1_epi64(static_cast<long long>(pivot));
  for (; i + 8 <= n; i += 8) {
    const __m512i some = _mm512_loadu_si512(keys + i);
    const __mmask8 below = _mm512_cmplt_epu64_mask(some, bound);
    _mm512_storeu_si512(keys + low, _mm512_maskz_compress_epi64(below, some));
    _mm512_storeu_si512(scratch + high, _mm512_maskz_compress_epi64(static_cast<__mmask8>(~below), some));
    const int count = __builtin_popcount(below);
    low += count;
    high += 8 - count;
  }
#endif
  for (; i < n; ++i) {  // without branches: half of them would be mispredicted
    const uint64_t key = keys[i];
    keys[low] = key;
    scratch[high] = key;
    low += key < pivot;
    high += key >= pivot;
  }
  for (i = 0; i < high; ++i) keys[low + i] = scratch[i];
  return low;
}

inline void insertion_sort(uint64_t* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Reorders n different keys so that the k smallest, 1 ≤ k ≤ n, stand first, in no order; returns the largest of them.
inline uint64_t select_smallest(uint64_t* keys, int64_t n, int64_t k, uint64_t* scratch) {
  uint64_t* first = keys;
  while (n > 32) {
    uint64_t sample[9];
    for (int64_t s = 0; s < 9; ++s) sample[s] = first[s * (n - 1) / 8];
    insertion_sort(sample, 9);
    // The pivot leans to where the k-th key should be.
    const int64_t wanted = k * 9 / n;
    const uint64_t pivot = sample[wanted < 1 ? 1 : wanted > 7 ? 7 : wanted];
    const int64_t below = partition(first, n, pivot, scratch);  // at least 1: sample[0] is
    if (k <= below) {
      n = below;
    } else {
      first += below;
      n -= below;
      k -= below;
    }
  }
  insertion_sort(first, n);
  return first[k - 1];
}

// Sorts n keys by their lowest `bits`, ascending: a radix sort, a byte a pass, that skips the bytes in which all keys agree.
inline void radix_sort(uint64_t* keys, int64_t n, uint64_t* scratch, int bits = 64) {
  uint64_t* from = keys;
  uint64_t* to = scratch;
  for (int shift = 0; shift < bits; shift += 8) {
    uint32_t place[256] = {};
    for (int64_t i = 0; i < n; ++i) ++place[from[i] >> shift & 0xff];
    if (n == 0 || place[from[0] >> shift & 0xff] == n) continue;
    uint32_t begin = 0;
    for (uint32_t& count : place) {
      const uint32_t next = begin + count;
      count = begin;
      begin = next;
    }
    for (int64_t i = 0; i < n; ++i) to[place[from[i] >> shift & 0xff]++] = from[i];
    uint64_t* const swap = from;
    from = to;
    to = swap;
  }
  if (from != keys)
    for (int64_t i = 0; i < n; ++i) keys[i] = from[i];
}

}  // namespace memdec::MEMDEC_LEVEL
