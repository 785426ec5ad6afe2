// CUDA's names for a host compiler: found in place of the toolkit's <cuda_runtime.h> when the tests build csrc/cuda/*.cu as C++.
//
// executor.cpp runs the kernels: the threads of a block are fibers, and a barrier, a shuffle or a vote is where one fiber
// waits for others. What runs between two of these runs alone, so a race shows as a result that depends on the order of the
// fibers: MEMDEC_EXECUTOR_ORDER is forward, reverse, or a number that seeds a random order; blocks follow the same order.
// MEMDEC_EXECUTOR_SHARED, in KB, is the shared memory that the device says to have.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrL2CacheSize, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* const shared = getenv("MEMDEC_EXECUTOR_SHARED");
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : attribute == cudaDevAttrL2CacheSize ? 1 << 20 : (shared ? atoi(shared) : 227) << 10;
  return cudaSuccess;
}
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace memdec::cuda::host {

using Where = std::source_location;

// Runs a kernel to its end; an error is left for cudaGetLastError, which cudaGetErrorString then tells in words.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const std::function<void()>& thread);

// Waits for all threads of the block.
void wait_for_block(Where where);
// Waits for the lanes in `mask`, and gives the value that lane `source` brought; of all lanes' truth values, for source −1, the bits.
uint64_t exchange(unsigned mask, uint64_t value, int source, Where where);
int lane();
[[noreturn]] void fail(const char* what, Where where);

// A block's memory: fresh and full of 0xff (NaN, −1) in every block, with nothing but poison around it.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes) {}
  void* of_this_block();

 private:
  size_t bytes_;
  uint64_t block_ = 0;
  void* data_ = nullptr;
};
void* dynamic_shared();

// Copies that are made as late as can be, when the thread waits for their group; until then 0xff lies there.
void copy_behind(void* to, const void* from, size_t bytes);
void end_group();
void wait_for_groups(int on_the_way);

template <class T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, where);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace memdec::cuda::host

// Where a default argument stands, source_location::current() is the line of the call.
#define MEMDEC_WHERE memdec::cuda::host::Where where = memdec::cuda::host::Where::current()

inline void __syncthreads(MEMDEC_WHERE) { memdec::cuda::host::wait_for_block(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, MEMDEC_WHERE) { memdec::cuda::host::exchange(mask, 0, -1, where); }
inline unsigned __ballot_sync(unsigned mask, bool vote, MEMDEC_WHERE) {
  return static_cast<unsigned>(memdec::cuda::host::exchange(mask, vote, -1, where));
}
inline bool __any_sync(unsigned mask, bool vote, MEMDEC_WHERE) { return memdec::cuda::host::exchange(mask, vote, -1, where) != 0; }
inline bool __all_sync(unsigned mask, bool vote, MEMDEC_WHERE) { return memdec::cuda::host::exchange(mask, vote, -1, where) == mask; }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, MEMDEC_WHERE) {
  return memdec::cuda::host::shuffle(mask, value, source & 31, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, MEMDEC_WHERE) {
  return memdec::cuda::host::shuffle(mask, value, memdec::cuda::host::lane() ^ bits, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, MEMDEC_WHERE) {
  const int lane = memdec::cuda::host::lane();
  return memdec::cuda::host::shuffle(mask, value, lane < delta ? lane : lane - delta, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, MEMDEC_WHERE) {
  const int lane = memdec::cuda::host::lane();
  return memdec::cuda::host::shuffle(mask, value, lane + delta > 31 ? lane : lane + delta, where);
}

// One fiber runs at a time, so plain reads and writes are atomic.
template <class T, class U, class F>
T memdec_exchanged(T* address, U value, const F& f) {
  const T old = *address;
  *address = f(old, static_cast<T>(value));
  return old;
}
template <class T, class U>
T atomicAdd(T* address, U value) {
  return memdec_exchanged(address, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T, class U>
T atomicMax(T* address, U value) {
  return memdec_exchanged(address, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T, class U>
T atomicMin(T* address, U value) {
  return memdec_exchanged(address, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T, class U>
T atomicOr(T* address, U value) {
  return memdec_exchanged(address, value, [](T a, T b) { return a | b; });
}
template <class T, class U>
T atomicExch(T* address, U value) {
  return memdec_exchanged(address, value, [](T, T b) { return b; });
}
template <class T, class U>
T atomicCAS(T* address, U expected, U value) {
  return memdec_exchanged(address, value, [&](T a, T b) { return a == static_cast<T>(expected) ? b : a; });
}

inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
