// Scans and sums over a team of threads, which is a warp or a whole block, in a fixed order: the same bits run after run.
#pragma once

#include "cuda/reductions.cuh"

namespace memdec::cuda {
namespace {

// The value of the lane `distance` below; for the lowest lanes their own.
template <class T>
__device__ inline T from_lane_below(T value, int distance) {
  return shuffled(value, [=](uint32_t word) { return __shfl_up_sync(whole_warp, word, distance); });
}

// merge(a, b) of the values of this lane and all below it, lower lanes on the left.
template <class T, class Merge>
__device__ inline T scan_warp(T value, const Merge& merge) {
  for (int distance = 1; distance < warp_size; distance *= 2) {
    const T below = from_lane_below(value, distance);
    if (lane_of_thread() >= distance) value = merge(below, value);
  }
  return value;
}

// The threads that work on one row. Every one of them must make each call.
template <int threads>
struct Team {
  static_assert(threads % warp_size == 0 && threads <= 1024);
  static constexpr bool is_warp = threads == warp_size;

  __device__ static int rank() { return is_warp ? lane_of_thread() : static_cast<int>(threadIdx.x); }

  template <class T>
  __device__ static T sum(T value) {
    const auto add = [](T a, T b) { return a + b; };
    if constexpr (is_warp) {
      return reduce_warp(value, add);
    } else {
      return reduce_block<threads>(value, add);
    }
  }

  // merge(a, b) of the values of all threads before this one; `nothing` for the first.
  template <class T, class Merge>
  __device__ static T before(T value, const T& nothing, const Merge& merge) {
    const T inclusive = scan_warp(value, merge);
    T lower = from_lane_below(inclusive, 1);
    if (lane_of_thread() == 0) lower = nothing;
    if constexpr (is_warp) {
      return lower;
    } else {
      struct Scratch {
        T of_warp[threads / warp_size];
      };
      Scratch& scratch = shared<Scratch>();
      __syncthreads();  // a scan before this one may still be read
      if (lane_of_thread() == warp_size - 1) scratch.of_warp[warp_of_thread()] = inclusive;
      __syncthreads();
      T warps_before = nothing;
      for (int w = 0; w < warp_of_thread(); ++w) warps_before = merge(warps_before, scratch.of_warp[w]);
      return merge(warps_before, lower);
    }
  }

  template <class T>
  __device__ static T sum_before(T value) {
    return before(value, T{}, [](T a, T b) { return a + b; });
  }
};

}  // namespace
}  // namespace memdec::cuda
