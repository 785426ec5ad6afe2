// Reductions over a warp and a block, in a fixed order: every thread gets the same bits, run after run.
#pragma once

#include "cuda/launch.cuh"

namespace memdec::cuda {
namespace {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;

__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / warp_size; }
__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }

// shuffle(word) of each 4 bytes of a value: a shuffle moves no more.
template <class T, class Shuffle>
__device__ inline T shuffled(T value, const Shuffle& shuffle) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "a shuffle moves 4 bytes");
  uint32_t word[sizeof(T) / sizeof(uint32_t)];
  memcpy(word, &value, sizeof(T));
  for (uint32_t& w : word) w = shuffle(w);
  memcpy(&value, word, sizeof(T));
  return value;
}

// The value of the lane whose number differs in the bits of `bits`.
template <class T>
__device__ inline T from_lane_across(T value, int bits) {
  return shuffled(value, [=](uint32_t word) { return __shfl_xor_sync(whole_warp, word, bits); });
}

// merge(a, b) of all lanes' values, lower lanes always on the left.
template <class T, class Merge>
__device__ inline T reduce_warp(T value, const Merge& merge) {
  for (int bits = 1; bits < warp_size; bits *= 2) {
    const T other = from_lane_across(value, bits);
    value = lane_of_thread() & bits ? merge(other, value) : merge(value, other);
  }
  return value;
}

// merge(a, b) of all threads' values. Every thread of the block must call it.
template <int threads, class T, class Merge>
__device__ inline T reduce_block(T value, const Merge& merge) {
  static_assert(threads % warp_size == 0 && threads <= 1024);
  struct Scratch {
    T of_warp[threads / warp_size];
  };
  Scratch& scratch = shared<Scratch>();
  value = reduce_warp(value, merge);
  __syncthreads();  // a reduction before this one may still be read
  if (lane_of_thread() == 0) scratch.of_warp[warp_of_thread()] = value;
  __syncthreads();
  value = scratch.of_warp[0];
#pragma unroll 4
  for (int w = 1; w < threads / warp_size; ++w) value = merge(value, scratch.of_warp[w]);
  return value;
}

template <int threads, class T>
__device__ inline T sum_over_block(T value) {
  return reduce_block<threads>(value, [](T a, T b) { return a + b; });
}

}  // namespace
}  // namespace memdec::cuda
