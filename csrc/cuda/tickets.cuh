// Work that blocks take in order, and what blocks of one kernel tell each other.
//
// Tickets are handed out in ascending order, and a block works on those it has in that order. So all tickets below one that is
// worked on are with blocks that run, and it may wait for what their work leaves: the lowest of all waits for nobody.
//
// What another block has written must be read past this one's first-level cache (fresh).
#pragma once

#include "cuda/reductions.cuh"

namespace memdec::cuda {
namespace {

using Word = unsigned long long;  // the 64 bits that atomic operations take

// A block's tickets, from a counter that was 0. The next one is asked for while this one is worked on. Every thread must make each
// call.
class Tickets {
 public:
  explicit __device__ Tickets(Word* counter) : counter_(counter) { ask(); }

  __device__ int64_t take() {
    struct Ticket {
      int64_t number;
    };
    __syncthreads();  // the ticket before may still be read
    if (threadIdx.x == 0) shared<Ticket>().number = static_cast<int64_t>(asked_);
    ask();
    __syncthreads();
    return shared<Ticket>().number;
  }

 private:
  __device__ void ask() {
    if (threadIdx.x == 0) asked_ = atomicAdd(counter_, Word{1});
  }

  Word* counter_;
  Word asked_ = 0;  // of thread 0
};

// What another block wrote before it told this one so.
template <class T>
__device__ inline T fresh(const T* from) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "read by words of 4 bytes");
  constexpr int words = sizeof(T) / sizeof(uint32_t);
  const volatile uint32_t* const source = reinterpret_cast<const volatile uint32_t*>(from);
  uint32_t word[words];
#pragma unroll
  for (int i = 0; i < words; ++i) word[i] = source[i];
  T value;
  memcpy(&value, word, sizeof(T));
  return value;
}

// Counts this block. True if it is the last of `wanted` to be counted: what thread 0 of the others wrote before can be read. Every
// thread must call it.
__device__ inline bool is_last_of(uint32_t wanted, uint32_t* count) {
  struct Last {
    uint32_t is_it;
  };
  __syncthreads();  // an answer before this one may still be read
  if (threadIdx.x == 0) {
    __threadfence();
    shared<Last>().is_it = atomicAdd(count, 1u) + 1 == wanted;
    __threadfence();
  }
  __syncthreads();
  return shared<Last>().is_it != 0;
}

// Tells those who wait_for it that what this block has written can be read. Every thread must call it.
__device__ inline void raise(uint32_t* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *static_cast<volatile uint32_t*>(flag) = 1;
}

// Every thread must call it.
__device__ inline void wait_for(const uint32_t* flag) {
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile uint32_t*>(flag) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

}  // namespace
}  // namespace memdec::cuda
