// Rows of any number, cut into spans that are a block's work each: the way of the ops that mix.
//
// A first kernel has a block for every span of every row (and of both components of a mixture), which leaves one state of an
// online softmax in the workspace, 8 bytes for 16 KB of bf16. Whoever needs a row's state has a warp merge those of its spans,
// in a fixed order. One row of a decoding step is so spread over the device, and a thousand rows take the same way: the bits of
// a row do not depend on how many rows there are.
#pragma once

#include "core/softmax.h"
#include "cuda/reductions.cuh"
#include "cuda/rows.cuh"

namespace memdec::cuda {
namespace {

// exp(x) of an x that is not above 0, to some units in the last place; 0 where float32 would have lost digits.
__device__ inline float decay(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
#else
  return exponential(x);
#endif
}
// log2(x), between ½ and 2 to 2⁻²².
__device__ inline float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// The softmax state of all that the threads of a block hold. Every thread must call it.
__device__ inline Softmax<float> softmax_of_block(const float (&value)[share_size]) {
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < share_size; ++i) high = fmaxf(high, value[i]);
  Softmax<float> state;
  state.max = reduce_block<block_threads>(high, [](float a, float b) { return fmaxf(a, b); });
  // A NaN was skipped above; it comes back here, through exp. A span of −inf is measured from 0, for a sum of 0.
  const float shift = state.max == -INFINITY ? 0 : state.max;
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < share_size; ++i) sum[i % 4] += decay(value[i] - shift);
  state.sum = sum_over_block<block_threads>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return state;
}

// A first pass over rows, a block a span, which leaves its state.
template <class T>
__global__ void __launch_bounds__(block_threads) reduce_spans_of_rows(Rows rows, Softmax<float>* states) {
  let_next_kernel_start();
  const int64_t spans = spans_of(rows.columns), i = blockIdx.x;
  float value[share_size];
  load_share(row_of<const T>(rows, i / spans), rows.columns, i % spans, value);
  const Softmax<float> state = softmax_of_block(value);
  if (threadIdx.x == 0) states[i] = state;
}

// The merged states state(0) … state(count − 1), known to every lane. Every lane of the warp must call it.
template <class F>
__device__ inline Softmax<float> merged_by_warp(int64_t count, const F& state) {
  Softmax<float> merged;
  for (int64_t i = lane_of_thread(); i < count; i += warp_size) merged = merge(merged, state(i));
  return reduce_warp(merged, [](Softmax<float> a, Softmax<float> b) { return merge(a, b); });
}

// Float32 results of a row, written with aligned stores from shares of T: the shares are moved down by lead_of(out), so that
// rows have spans_written of them.
template <class T>
__device__ inline void store_floats(float* out, int64_t columns, int64_t span, const float (&value)[share_size], int64_t lead) {
  constexpr int w = width_of<T>, step = width_of<float>;
  for_each_vector<T>(span, lead, [&](int v, int64_t first) {
#pragma unroll
    for (int part = 0; part < w; part += step) {
      const int64_t c = first + part;
      const float* const from = value + v * w + part;
      if (c >= 0 && c + step <= columns) {
        store_aligned(out + c, pack(float{}, from));
      } else {
#pragma unroll
        for (int i = 0; i < step; ++i)
          if (c + i >= 0 && c + i < columns) out[c + i] = from[i];
      }
    }
  });
}

inline __host__ __device__ int64_t spans_written(int64_t columns) { return spans_of(columns + width_of<float> - 1); }

}  // namespace
}  // namespace memdec::cuda
