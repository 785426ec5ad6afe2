// Sorting networks: bitonic merges, in the form in which every comparison puts the lower key first; within a thread Batcher's.
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

// Sorts what lies in one thread's registers, by Batcher's odd-even merges: 191 comparisons of 32 keys, where bitonic ones take 240.
// This step compares keys `stride` apart, while runs of `run` are in order.
template <int run = 1, int stride = run, int each, class K>
__device__ inline void sort_in_thread(K (&key)[each]) {
  constexpr int first = stride % run;
#pragma unroll
  for (int e = first; e + stride < each; ++e)
    if ((e - first) / stride % 2 == 0 && e / (2 * run) == (e + stride) / (2 * run)) put_in_order(key[e], key[e + stride]);
  if constexpr (stride > 1) {
    sort_in_thread<run, stride / 2>(key);
  } else if constexpr (2 * run < each) {
    sort_in_thread<2 * run>(key);
  }
}

// Sorts the 32 · each keys of a warp. Afterwards lane l has those of ranks [each · l, each · (l + 1)).
template <int each, class K>
__device__ inline void sort_in_warp(K (&key)[each]) {
  static_assert(each >= 2 && (each & (each - 1)) == 0);
  sort_in_thread(key);
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

// The same for 32 keys a lane, which are a square: a row a lane. Keys of different rows are compared where the square, in shared memory,
// is read by columns, so that both lie in one thread: 2 instructions for two keys, where shuffles take 6.
constexpr int square_pitch = warp_size + 4;  // words from row to row: vectors of 8 rows lie in different banks

// A column's share in making one of two runs of `lanes` rows; the upper run's rows are in reverse order, what is in them is not yet.
template <int lanes>
__device__ inline void merge_column(uint32_t* square) {
  const int lane = lane_of_thread();
  uint32_t key[warp_size];
#pragma unroll
  for (int e = 0; e < warp_size; ++e) key[e] = square[square_pitch * e + (e & lanes ? warp_size - 1 - lane : lane)];
  merge_in_thread(key, lanes);
  __syncwarp();  // every column has been read
#pragma unroll
  for (int e = 0; e < warp_size; ++e) square[square_pitch * e + lane] = key[e];
}

// `square`: 32 · square_pitch words, 16-byte aligned, for this warp alone.
__device__ inline void sort_in_warp(uint32_t (&key)[warp_size], uint32_t* square) {
  const int lane = lane_of_thread();
  sort_in_thread(key);
#pragma unroll 1
  for (int lanes = 1; lanes < warp_size; lanes *= 2) {  // two runs of so many lanes become one
    // A key is compared with its mirror image, hence the upper run in reverse: its rows here, what is in them by merge_column.
    uint4* const reversed = reinterpret_cast<uint4*>(square + square_pitch * (lane & lanes ? lane ^ (lanes - 1) : lane));
#pragma unroll
    for (int v = 0; v < warp_size / 4; ++v) reversed[v] = {key[4 * v], key[4 * v + 1], key[4 * v + 2], key[4 * v + 3]};
    __syncwarp();
    switch (lanes) {  // code of its own for each: no test for each key
      case 1: merge_column<1>(square); break;
      case 2: merge_column<2>(square); break;
      case 4: merge_column<4>(square); break;
      case 8: merge_column<8>(square); break;
      default: merge_column<16>(square);
    }
    __syncwarp();
    const uint4* const row = reinterpret_cast<const uint4*>(square + square_pitch * lane);
#pragma unroll
    for (int v = 0; v < warp_size / 4; ++v) {
      const uint4 four = row[v];
      key[4 * v] = four.x, key[4 * v + 1] = four.y, key[4 * v + 2] = four.z, key[4 * v + 3] = four.w;
    }
    merge_in_thread(key, warp_size / 2);
    __syncwarp();  // every row has been read
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
