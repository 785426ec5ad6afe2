// Sorting networks: bitonic merges, in the form in which every comparison puts the lower key first.
//
// Two sorted runs of n/2 keys become one of n: key i of the lower run is compared with its mirror image, key n − 1 − i; then keys
// n/4, n/8, … 1 apart are. What is compared with what never depends on the keys, so a row takes the same time whatever it holds.
#pragma once

#include "cuda/reductions.cuh"

namespace memdec::cuda {
namespace {

template <class K>
__device__ inline void put_in_order(K& a, K& b) {
  const K low = a < b ? a : b;
  b = a < b ? b : a;
  a = low;
}

// What lies in one thread's registers: the comparisons of keys `stride` apart, and of all smaller powers of two.
template <int each, class K>
__device__ inline void merge_in_thread(K (&key)[each], int stride) {
#pragma unroll
  for (int s = each / 2; s > 0; s /= 2) {
    if (s > stride) continue;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if ((e & s) == 0) put_in_order(key[e], key[e + s]);
  }
}

// Sorts the 32 · each keys of a warp. Afterwards lane l has those of ranks [each · l, each · (l + 1)).
template <int each, class K>
__device__ inline void sort_in_warp(K (&key)[each]) {
  static_assert(each >= 2 && (each & (each - 1)) == 0);
#pragma unroll
  for (int size = 2; size <= each; size *= 2) {
#pragma unroll
    for (int e = 0; e < each; ++e)
      if ((e & (size / 2)) == 0) put_in_order(key[e], key[e ^ (size - 1)]);
    merge_in_thread(key, size / 4);
  }
#pragma unroll 1
  for (int lanes = 2; lanes <= warp_size; lanes *= 2) {  // runs of so many lanes
    bool upper = lane_of_thread() & (lanes / 2);
#pragma unroll
    for (int e = 0; e < each / 2; ++e) {
      K& a = key[e];
      K& b = key[each - 1 - e];
      const K across_a = __shfl_xor_sync(whole_warp, b, lanes - 1), across_b = __shfl_xor_sync(whole_warp, a, lanes - 1);
      a = (a < across_a) != upper ? a : across_a;
      b = (b < across_b) != upper ? b : across_b;
    }
#pragma unroll 1
    for (int bits = lanes / 4; bits > 0; bits /= 2) {
      upper = lane_of_thread() & bits;
#pragma unroll
      for (int e = 0; e < each; ++e) {
        const K across = __shfl_xor_sync(whole_warp, key[e], bits);
        key[e] = (key[e] < across) != upper ? key[e] : across;
      }
    }
    merge_in_thread(key, each / 2);
  }
}

// Sorts n keys, a power of two, in the memory that a block's threads share or in the device's; they are in place before and after
// for the whole block.
template <int threads, class K>
__device__ inline void sort_in_memory(K* keys, uint32_t n) {
  for (uint32_t size = 2; size <= n && size != 0; size *= 2)
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (uint32_t p = threadIdx.x; p < n / 2; p += threads) {
        const uint32_t within = p & (stride - 1), low = 2 * p - within;
        put_in_order(keys[low], keys[stride == size / 2 ? low - within + size - 1 - within : low + stride]);
      }
    }
  __syncthreads();
}

}  // namespace
}  // namespace memdec::cuda
