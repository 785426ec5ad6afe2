// Clusters: blocks that run at the same time, wait for each other, and read each other's shared memory. From Hopper on; before that
// every block is a cluster of its own.
#pragma once

#include "cuda/launch.cuh"

namespace memdec::cuda {
namespace {

__device__ inline unsigned cluster_rank() {
#if !defined(__CUDACC__)
  return host::cluster_rank();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#if !defined(__CUDACC__)
  return host::cluster_size();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// __syncthreads for all blocks of the cluster.
#if defined(__CUDACC__)
__device__ inline void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
#else
inline void sync_cluster(MEMDEC_WHERE) { host::wait_for_cluster(where); }
#endif

// The value that the block of that rank has in its shared<T>(), which no block may leave before it was read.
template <class T>
__device__ inline T shared_of(unsigned rank) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "read by words of 4 bytes");
#if !defined(__CUDACC__)
  return shared<T>(rank);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t mine = static_cast<uint32_t>(__cvta_generic_to_shared(&shared<T>()));
  uint32_t theirs, word[sizeof(T) / sizeof(uint32_t)];
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
#pragma unroll
  for (uint32_t i = 0; i < sizeof(T) / sizeof(uint32_t); ++i)
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word[i]) : "r"(theirs + 4 * i) : "memory");
  T value;
  memcpy(&value, word, sizeof(T));
  return value;
#else
  return shared<T>();
#endif
}

}  // namespace
}  // namespace memdec::cuda
