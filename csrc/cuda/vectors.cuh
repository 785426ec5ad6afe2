// Sixteen bytes of a row at a time: loads, stores, and what is in them as floats.
#pragma once

#include "cuda/launch.cuh"

namespace memdec::cuda {
namespace {

template <class T>
constexpr int width_of = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// The instruction and its twin in core/number.h round alike.
__device__ inline float float_of_half(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
#else
  return to_float(float16{static_cast<uint16_t>(bits)});
#endif
}

template <class T>
__device__ inline T narrowed(float value);
template <>
__device__ inline float narrowed<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 narrowed<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  return from_float<bfloat16>(value);
#endif
}
template <>
__device__ inline float16 narrowed<float16>(float value) {
#if defined(__CUDA_ARCH__)
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  return from_float<float16>(value);
#endif
}

__device__ inline float widened(float value) { return value; }
__device__ inline float widened(bfloat16 value) { return to_float(value); }
__device__ inline float widened(float16 value) { return float_of_half(value.bits); }

// What sixteen bytes hold, as floats.
__device__ inline void unpack(float, uint4 v, float* value) {
  value[0] = float_of_bits(v.x), value[1] = float_of_bits(v.y), value[2] = float_of_bits(v.z), value[3] = float_of_bits(v.w);
}
__device__ inline void unpack(bfloat16, uint4 v, float* value) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = float_of_bits(word[i] << 16);
    value[2 * i + 1] = float_of_bits(word[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(float16, uint4 v, float* value) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = float_of_half(word[i] & 0xffffu);
    value[2 * i + 1] = float_of_half(word[i] >> 16);
  }
}

__device__ inline uint4 pack(float, const float* value) {
  return {bits_of_float(value[0]), bits_of_float(value[1]), bits_of_float(value[2]), bits_of_float(value[3])};
}
template <class T>
__device__ inline uint4 pack(T, const float* value) {
  uint32_t word[4];
  for (int i = 0; i < 4; ++i)
    word[i] = narrowed<T>(value[2 * i]).bits | static_cast<uint32_t>(narrowed<T>(value[2 * i + 1]).bits) << 16;
  return {word[0], word[1], word[2], word[3]};
}

// Bytes [skip, skip + 16) of the 32 that low and high make, 0 ≤ skip < 16.
__device__ inline uint4 cut_out(uint4 low, uint4 high, uint32_t skip) {
  // Two bits of skip choose words (a move by two, then by one), so that no register is indexed at run time.
  uint32_t w0 = low.x, w1 = low.y, w2 = low.z, w3 = low.w, w4 = high.x, w5 = high.y, w6 = high.z;
  const uint32_t w7 = high.w;
  if (skip & 8) w0 = w2, w1 = w3, w2 = w4, w3 = w5, w4 = w6, w5 = w7;
  if (skip & 4) w0 = w1, w1 = w2, w2 = w3, w3 = w4, w4 = w5;
  const auto across = [bits = skip % 4 * 8](uint32_t first, uint32_t second) {
    return static_cast<uint32_t>((static_cast<uint64_t>(second) << 32 | first) >> bits);
  };
  return {across(w0, w1), across(w1, w2), across(w2, w3), across(w3, w4)};
}

// The same where 4·word + bits / 8 bytes are skipped.
template <int word>
__device__ inline uint4 cut_out(uint4 low, uint4 high, uint32_t bits) {
  const uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const auto across = [&](int i) { return static_cast<uint32_t>((static_cast<uint64_t>(w[i + 1]) << 32 | w[i]) >> bits); };
  return {across(word), across(word + 1), across(word + 2), across(word + 3)};
}

// Sixteen bytes at an aligned address.
template <class T>
__device__ inline uint4 load_aligned(const T* address) {
  return *reinterpret_cast<const uint4*>(address);
}

// Sixteen bytes at any address, from the two aligned vectors that hold them: neighbours share them, so memory is read once.
template <class T>
__device__ inline uint4 load_across(const T* address) {
  const uint32_t skip = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) % 16);
  const uint4* const floor = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(address) - skip);
  return cut_out(floor[0], floor[1], skip);
}

template <class T>
__device__ inline void store_aligned(T* address, uint4 vector) {
  *reinterpret_cast<uint4*>(address) = vector;
}

// What the second-level cache should do with a line: keep it as long as any, or give it up first, since nobody comes back for it.
__device__ inline uint64_t cache_policy([[maybe_unused]] bool passes) {
  uint64_t policy = 0;
#if defined(__CUDA_ARCH__)
  if (passes) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

template <class T>
__device__ inline void store_aligned(T* address, uint4 vector, [[maybe_unused]] uint64_t policy) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "r"(vector.x), "r"(vector.y), "r"(vector.z),
               "r"(vector.w), "l"(policy)
               : "memory");
#else
  store_aligned(address, vector);
#endif
}

// Asks for the 32 bytes around an address to be brought into the second-level cache.
template <class T>
__device__ inline void fetch_to_cache([[maybe_unused]] const T* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Copies sixteen bytes to shared memory, both aligned, while the thread goes on. end_group closes a group of a thread's copies.
// The tests' executor copies at the wait, and has poison there until then.
template <class T>
__device__ inline void copy_behind(T* to_shared, const T* from, [[maybe_unused]] uint64_t policy) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "l"(policy) : "memory");
#elif !defined(__CUDACC__)
  store_aligned(to_shared, load_aligned(from));  // both are looked at by the sanitizers
  host::copy_behind(to_shared, from, 16);
#endif
}

// The same for a number of four bytes.
template <class T>
__device__ inline void copy_number_behind(T* to_shared, const T* from) {
  static_assert(sizeof(T) == 4);
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
#elif !defined(__CUDACC__)
  *to_shared = *from;
  host::copy_behind(to_shared, from, sizeof(T));
#endif
}

__device__ inline void end_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  host::end_group();
#endif
}

// Waits until at most so many of the thread's last groups are on the way.
template <int on_the_way>
__device__ inline void wait_for_groups() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(on_the_way) : "memory");
#elif !defined(__CUDACC__)
  host::wait_for_groups(on_the_way);
#endif
}

// The same where it is not known beforehand; more than 7 count as 7.
__device__ inline void wait_for_groups(int64_t on_the_way) {
#if defined(__CUDA_ARCH__)
  switch (on_the_way) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory");
  }
#elif !defined(__CUDACC__)
  host::wait_for_groups(on_the_way < 7 ? static_cast<int>(on_the_way) : 7);
#endif
}

}  // namespace
}  // namespace memdec::cuda
