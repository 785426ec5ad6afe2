// The online softmax of rows that one block reads from end to end: (max, Σ exp(z − max)), for many rows and for few.
//
// Many rows: a block a row. Few rows would leave most of the device idle, so a first kernel gives a block to every span of every
// row and leaves each thread's state of its share in the workspace; the op's own kernel then has a block a row that takes these
// states instead of reading the row. Both merge the same states in the same order: the bits of a row do not depend on how many rows
// there are.
#pragma once

#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

constexpr int wide_threads = 256;  // of these blocks
constexpr int64_t wide_columns = wide_threads * share_size;

// Up to this many rows are split: about two blocks a multiprocessor of the largest devices.
constexpr int64_t few_rows = 256;

inline bool is_split(const Rows& rows) { return rows.count <= few_rows && rows.columns > wide_columns; }
inline int64_t split_states(const Rows& rows) { return rows.count * spans_of<wide_threads>(rows.columns) * wide_threads; }

__device__ inline Softmax<float> softmax_of_share(const float (&value)[share_size]) {
  Softmax<float> state;
#pragma unroll
  for (int i = 0; i < share_size; ++i) state.max = fmaxf(state.max, value[i]);
  // A NaN was skipped above; it comes back here, through exp. A share of −inf is measured from 0, for a sum of 0.
  const float shift = state.max == -INFINITY ? 0 : state.max;
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < share_size; ++i) sum[i % 4] += decay(value[i] - shift);
  state.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return state;
}

template <class T>
__device__ inline Softmax<float> softmax_of_span(const T* row, int64_t columns, int64_t span) {
  float value[share_size];
  load_share<wide_threads>(row, columns, span, value);
  return softmax_of_share(value);
}

// A block for every span of every row.
template <class T>
__global__ void __launch_bounds__(wide_threads) split_softmax(Rows rows, Softmax<float>* states) {
  const int64_t spans = spans_of<wide_threads>(rows.columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  states[int64_t{blockIdx.x} * wide_threads + threadIdx.x] = softmax_of_span(row_of<const T>(rows, r), rows.columns, span);
}

// Fills `states` for the kernel that follows.
template <class T>
inline void launch_split_softmax(const Rows& rows, Softmax<float>* states, cudaStream_t stream) {
  launch(split_softmax<T>, rows.count * spans_of<wide_threads>(rows.columns), wide_threads, 0, stream, rows, states);
}

// The first spans of a row, as the block keeps them in shared memory from its first reading to the last: column c is at [c]. The
// vectors of 16 bytes that hold them are copied whole, so the copy's addresses are as aligned as the row's.
template <class T>
struct Copy {
  T* column;
  int64_t spans;

  // Room for so many spans, and what comes with them.
  static constexpr int64_t bytes(int64_t spans) { return spans == 0 ? 0 : spans * wide_columns * static_cast<int64_t>(sizeof(T)) + 32; }

  __device__ Copy(const T* row, int64_t count) : column(dynamic_shared<T>() + lead_of(row)), spans(count) {}

  // Begins to copy, a group a span.
  __device__ void begin(const T* row, int64_t columns) const {
    constexpr int w = width_of<T>;
    const int64_t lead = lead_of(row);
    const auto vector = [&](int64_t c) {
      if (c >= 0 && c + w <= columns) {
        copy_behind(column + c, row + c);
      } else {
        for (int i = 0; i < w; ++i)
          if (c + i >= 0 && c + i < columns) column[c + i] = row[c + i];
      }
    };
    for (int64_t span = 0; span < spans; ++span) {
      for_each_vector<T, wide_threads>(span, lead, [&](int, int64_t c) { vector(c); });
      if (span + 1 == spans && lead > 0 && threadIdx.x == 0) vector(spans * wide_columns - lead);
      end_group();
    }
  }

  // The span is there. Every thread must call it.
  __device__ void wait_for(int64_t span) const {
    wait_for_groups(larger(0, spans - span - 2));  // a span's last columns come with the next one
    __syncthreads();
  }
};

// The state of row r, known to every thread of its block. `states`: what split_softmax left, or null: the row is read, what of it is
// copied from the copy.
template <class T>
__device__ inline Softmax<float> softmax_of_row(const Rows& rows, int64_t r, const Softmax<float>* states, const Copy<T>& copy) {
  const int64_t spans = spans_of<wide_threads>(rows.columns);
  const T* const row = row_of<const T>(rows, r);
  Softmax<float> state;
  for (int64_t span = 0; span < spans; ++span) {
    const bool is_copied = span < copy.spans;
    if (is_copied) copy.wait_for(span);
    state = merge(state, states ? states[(r * spans + span) * wide_threads + threadIdx.x]
                                : softmax_of_span(is_copied ? copy.column : row, rows.columns, span));
  }
  return reduce_block<wide_threads>(state, [](Softmax<float> a, Softmax<float> b) { return merge(a, b); });
}

}  // namespace
}  // namespace memdec::cuda
