// How a block reads and writes a row.
//
// A row is cut into spans of threads · share_size columns, block_threads if nothing else is said. In a span each thread has a share
// of share_size columns, in vectors of 16 bytes that lie `threads` vectors apart:
//
//     column of value i of a share = span · threads · share_size + ((i / width) · threads + thread) · width + i % width
//
// Which thread sees which column depends on the column alone, not on the row's address, so a sum over a row has the same bits
// for every alignment. Rows that are not aligned (an odd vocabulary makes every second row of bf16 so) are read as two aligned
// vectors for one, of which the second is in the first-level cache; only the vectors at a row's ends are read by element.
#pragma once

#include "cuda/vectors.cuh"

namespace memdec::cuda {
namespace {

constexpr int block_threads = 128;
constexpr int share_size = 32;  // values of a thread in a span: 64 or 128 bytes in flight a thread
constexpr int64_t span_columns = block_threads * share_size;

template <int threads = block_threads>
__host__ __device__ inline int64_t spans_of(int64_t columns) {
  return (columns + threads * share_size - 1) / (threads * share_size);
}

template <class T>
__device__ inline T* row_of(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + (r / rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride);
}

template <class T, int threads = block_threads>
__device__ inline int64_t column_of(int64_t span, int i) {
  constexpr int w = width_of<T>;
  return span * (threads * share_size) + (int64_t{i / w} * threads + threadIdx.x) * w + i % w;
}

// Calls f for each vector of this thread's share of a span: f(vector's number in the share, its first column).
template <class T, int threads = block_threads, class F>
__device__ inline void for_each_vector(int64_t span, int64_t lead, const F& f) {
#pragma unroll
  for (int v = 0; v < share_size / width_of<T>; ++v) f(v, column_of<T, threads>(span, v * width_of<T>) - lead);
}

// This thread's share of a span of a row, −inf beyond its end. With a lead, the columns of all shares are moved down by it
// (some below 0, which are no columns): the writer's way to aligned stores, see store_share.
template <int threads = block_threads, class T>
__device__ inline void load_share(const T* row, int64_t columns, int64_t span, float (&value)[share_size], int64_t lead = 0) {
  constexpr int w = width_of<T>;
  const auto load_all = [&](auto load, int64_t below, int64_t above) {
    // Columns from `below` up to `above` short of the end can be read as whole vectors.
    const int64_t begin = span * (threads * share_size) - lead, end = begin + threads * share_size;
    if (begin >= below && end + above <= columns) {
      uint4 raw[share_size / w];  // all loads are under way before the first value is used
      for_each_vector<T, threads>(span, lead, [&](int v, int64_t c) { raw[v] = load(row + c); });
      for_each_vector<T, threads>(span, lead, [&](int v, int64_t) { unpack(T{}, raw[v], value + v * w); });
      return;
    }
    for_each_vector<T, threads>(span, lead, [&](int v, int64_t c) {
      if (c >= below && c + w + above <= columns) {
        unpack(T{}, load(row + c), value + v * w);
      } else {
#pragma unroll
        for (int i = 0; i < w; ++i) value[v * w + i] = c + i >= 0 && c + i < columns ? widened(row[c + i]) : -INFINITY;
      }
    });
  };
  if (is_aligned(row - lead)) {
    load_all([](const T* address) { return load_aligned(address); }, 0, 0);
  } else {
    load_all([](const T* address) { return load_across(address); }, w, w);
  }
}

// The lead that makes whole vectors of a row's shares aligned.
template <class T>
__device__ inline int64_t lead_of(const T* row) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Writes this thread's share of a span of a row whose lead_of is `lead`, whole vectors by store(address, vector).
template <int threads = block_threads, class T, class Store>
__device__ inline void store_share(T* row, int64_t columns, int64_t span, const float (&value)[share_size], int64_t lead, const Store& store) {
  constexpr int w = width_of<T>;
  for_each_vector<T, threads>(span, lead, [&](int v, int64_t c) {
    if (c >= 0 && c + w <= columns) {
      store(row + c, pack(T{}, value + v * w));
    } else {
#pragma unroll
      for (int i = 0; i < w; ++i)
        if (c + i >= 0 && c + i < columns) row[c + i] = narrowed<T>(value[v * w + i]);
    }
  });
}
template <int threads = block_threads, class T>
__device__ inline void store_share(T* row, int64_t columns, int64_t span, const float (&value)[share_size], int64_t lead) {
  store_share<threads>(row, columns, span, value, lead, [](T* address, uint4 vector) { store_aligned(address, vector); });
}

}  // namespace
}  // namespace memdec::cuda
