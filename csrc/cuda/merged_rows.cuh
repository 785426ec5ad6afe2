// For the ops of the interpolate family that read their rows a second time: what a block needs of its row, merged once.
#pragma once

#include "cuda/mixture.cuh"

namespace memdec::cuda {
namespace {

// A warp a row. Were each block of a row to merge its states, it would wait for them before it asks for a logit.
__global__ void __launch_bounds__(warp_size) merge_states(Mixture mixture, const Softmax<float>* states, LogProb* log_probs) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t r = blockIdx.x;
  const MixtureRow row = mixture_of_row(mixture, r, [&](int64_t i) { return states[i]; });
  if (threadIdx.x == 0) log_probs[r] = LogProb(row);
}

}  // namespace
}  // namespace memdec::cuda
