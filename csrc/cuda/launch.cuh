// How an op reaches the device: the caller's device and stream, kernel launches, shared memory, element types.
//
// The same sources are compiled by a host compiler for the tests (tests/cuda/host): __CUDACC__ tells the two apart, here and
// in vectors.cuh only. Everything has internal linkage, as in csrc/core.
#pragma once

#include <cuda_runtime.h>

#include "core/number.h"
#include "memdec.h"

namespace memdec::cuda {
namespace {

// Queues a kernel. `grid` of more blocks than CUDA can count is a launch error, as one of no blocks is.
template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  const dim3 blocks(grid <= INT32_MAX ? static_cast<unsigned>(grid) : 0u);
#if defined(__CUDACC__)
  kernel<<<blocks, static_cast<unsigned>(block), shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
#else
  host::launch(reinterpret_cast<const void*>(kernel), blocks, dim3(static_cast<unsigned>(block)), shared_bytes, stream,
               [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// Queues a kernel that begins with wait_for_kernel_before: from Hopper on its blocks may be started while the kernel that was queued
// before it still runs, once every block of that has called let_next_kernel_start or is done. Where the driver has compiled the kernel
// from what an older device's code was made of, there is no waiting in it, and it is started like any other.
template <class... Parameters, class... Arguments>
inline void launch_early(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
#if defined(__CUDACC__)
  int device = 0, generation = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  cudaFuncAttributes code{};
  cudaFuncGetAttributes(&code, kernel);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid <= INT32_MAX ? static_cast<unsigned>(grid) : 0u);
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = generation >= 9 && code.ptxVersion >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#else
  launch(kernel, grid, block, shared_bytes, stream, arguments...);
#endif
}

// What that kernel wrote can be read afterwards. Every thread must call it.
__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Makes the launch's device the current one for as long as this lives, and collects the error of what is done meanwhile.
class OnDevice {
 public:
  explicit OnDevice(const Launch& launch) : stream(static_cast<cudaStream_t>(launch.stream)), error_(cudaGetDevice(&before_)) {
    if (error_ != cudaSuccess || before_ == launch.device) return;
    error_ = cudaSetDevice(launch.device);
    changed_ = error_ == cudaSuccess;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  bool ok() const { return error_ == cudaSuccess; }
  Status status() {
    if (ok()) error_ = cudaGetLastError();
    if (ok()) return {};
    return {.code = Status::cuda_error, .argument = cudaGetErrorString(error_), .got = static_cast<int64_t>(error_)};
  }

  cudaStream_t const stream;

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Runs f(T{}, stream) on the launch's device, T the element type that dtype stands for; f queues kernels and returns nothing.
template <class F>
inline Status on_device(const Launch& launch, DType dtype, const char* argument, const F& f) {
  OnDevice device(launch);
  if (!device.ok()) return device.status();
  switch (dtype) {
    case DType::float32: f(float{}, device.stream); break;
    case DType::bfloat16: f(bfloat16{}, device.stream); break;
    case DType::float16: f(float16{}, device.stream); break;
    default: return {.code = Status::bad_dtype, .argument = argument, .got = static_cast<int64_t>(dtype)};
  }
  return device.status();
}

// Deals out a workspace, each part aligned; without memory (null) it only counts.
class Parts {
 public:
  explicit Parts(void* workspace) : begin_(reinterpret_cast<uintptr_t>(workspace)) {}
  template <class T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(begin_ + static_cast<uintptr_t>(used_));
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t bytes() const { return used_; }

 private:
  uintptr_t begin_;
  int64_t used_ = 0;
};

// Memory that the threads of a block share, uninitialised: one place for each type T in a kernel, so two uses of one type in a
// kernel meet in the same place, and want a barrier between them.
template <class T>
__device__ inline T& shared() {
#if defined(__CUDACC__)
  __shared__ alignas(T) unsigned char storage[sizeof(T)];
  return reinterpret_cast<T&>(storage);
#else
  static host::Shared storage{sizeof(T)};
  return *static_cast<T*>(storage.of_this_block());
#endif
}

// The memory of a block whose size the launch sets, 16-byte aligned.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memdec_dynamic_shared[];
  return reinterpret_cast<T*>(memdec_dynamic_shared);
#else
  return static_cast<T*>(host::dynamic_shared());
#endif
}

// The same address, of which the compiler then knows that it is in global memory, wherever it was read from.
template <class T>
__device__ inline T* in_global_memory(T* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace memdec::cuda
