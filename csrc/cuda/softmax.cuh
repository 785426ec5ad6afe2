// The online softmax of rows that one block reads from end to end: (max, Σ exp(z − max)), for many rows and for few.
//
// Many rows: a block a row. Few rows would leave most of the device idle, so a first kernel gives a block to every span of every
// row and leaves each thread's state of its share in the workspace; the op's own kernel then has a block a row that takes these
// states instead of reading the row. Both merge the same states in the same order: the bits of a row do not depend on how many rows
// there are. The size of the blocks is part of that order, so it depends on the row's bytes alone.
#pragma once

#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

constexpr int wide_threads = 256, widest_threads = 512;  // of these blocks: for rows of up to so many bytes, and for longer ones
constexpr int64_t wide_row_bytes = 64 << 10;
inline int threads_for(const Rows& rows) {
  const int64_t bytes = rows.columns * (rows.dtype == DType::float32 ? 4 : 2);
  return bytes <= wide_row_bytes ? wide_threads : widest_threads;
}

template <int threads>
constexpr int64_t columns_in_span = threads * share_size;

// Up to this many rows are split: about two blocks a multiprocessor of the largest devices.
constexpr int64_t few_rows = 256;

inline bool is_split(const Rows& rows) { return rows.count <= few_rows && rows.columns > columns_in_span<wide_threads>; }
inline int64_t split_states(const Rows& rows) {
  const bool wide = threads_for(rows) == wide_threads;
  return rows.count * (wide ? spans_of<wide_threads>(rows.columns) * wide_threads : spans_of<widest_threads>(rows.columns) * widest_threads);
}

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

template <int threads, class T>
__device__ inline Softmax<float> softmax_of_span(const T* row, int64_t columns, int64_t span) {
  if (column_of<T, threads>(span, 0) >= columns) return {};
  float value[share_size];
  load_share<threads>(row, columns, span, value);
  return softmax_of_share(value);
}

// A block for every span of every row.
template <class T, int threads>
__global__ void __launch_bounds__(threads) split_softmax(Rows rows, Softmax<float>* states) {
  const int64_t spans = spans_of<threads>(rows.columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  states[int64_t{blockIdx.x} * threads + threadIdx.x] = softmax_of_span<threads>(row_of<const T>(rows, r), rows.columns, span);
}

// Fills `states` for the kernel that follows.
template <class T, int threads>
inline void launch_split_softmax(const Rows& rows, Softmax<float>* states, cudaStream_t stream) {
  launch(split_softmax<T, threads>, rows.count * spans_of<threads>(rows.columns), threads, 0, stream, rows, states);
}

// The first spans of a row, as the block keeps them in shared memory from its first reading to the last: column c is at [c]. The
// vectors of 16 bytes that hold them are copied whole, so the copy's addresses are as aligned as the row's. Which thread copies
// to a place depends on the place alone: it is the one that has the place's column in its share of any row, read with a lead
// of lead_of(row).
template <class T, int threads>
struct Copy {
  T* column;
  int64_t spans;

  static constexpr int w = width_of<T>;

  // Room for so many spans of a row, and what comes with them.
  static constexpr int64_t bytes(int64_t columns, int64_t spans) {
    const int64_t held = smaller(columns, spans * columns_in_span<threads>) * static_cast<int64_t>(sizeof(T));
    return held == 0 ? 0 : (held + 15) / 16 * 16 + 32;
  }

  __device__ Copy(const T* row, int64_t count) : column(dynamic_shared<T>() + lead_of(row)), spans(count) {}

  __device__ int64_t columns() const { return spans * columns_in_span<threads>; }

  // Begins to copy a span, but for the row's edges, as a group of its own.
  __device__ void begin(const T* row, int64_t row_columns, int64_t span, uint64_t policy) const {
    const int64_t lead = lead_of(row), begin = span * columns_in_span<threads> - lead;
    if (begin >= 0 && begin + columns_in_span<threads> <= row_columns) {
      for_each_vector<T, threads>(span, lead, [&](int, int64_t c) { copy_behind(column + c, row + c, policy); });
    } else {
      for_each_vector<T, threads>(span, lead, [&](int, int64_t c) {
        if (c >= 0 && c + w <= row_columns) copy_behind(column + c, row + c, policy);
      });
    }
    if (span + 1 == spans && threadIdx.x == 0) {  // the vector with the last span's last columns
      const int64_t c = columns() - lead;
      if (lead > 0 && c + w <= row_columns) copy_behind(column + c, row + c, policy);
    }
    end_group();
  }

  // The column at the row's edges, in a vector that is not the row's alone, that this thread is to copy by itself, or none: a number below 0.
  // The block's last threads have the least to do otherwise.
  __device__ int64_t edge(const T* row, int64_t row_columns) const {
    const int lead = static_cast<int>(lead_of(row)), i = static_cast<int>(threadIdx.x) - (threads - 2 * w);
    const int64_t tail = row_columns - (row_columns + lead) % w;
    int64_t c = -1;
    if (i < w) c = lead > 0 && i < w - lead ? i : -1;
    else if (tail >= 0) c = tail + i - w;
    return c < smaller(row_columns, columns()) ? c : -1;
  }

  // The span is there, where the last groups of every thread are those of this copy's spans. Every thread must call it.
  __device__ void wait_for(int64_t span) const {
    wait_for_groups(static_cast<int>(larger(0, spans - span - 2)));  // a span's last columns come with the next one
    __syncthreads();
  }

  // This thread's share of a span, as load_share(column, row_columns, span, value) reads it.
  __device__ void load(const T* row, int64_t row_columns, int64_t span, float (&value)[share_size]) const {
    const int64_t first = column_of<T, threads>(span, 0);
    const T* const floor = dynamic_shared<T>() + first;  // of the vector with the share's first column
    const int left = static_cast<int>(smaller(row_columns - first, columns_in_span<threads>));
    const uint32_t skip = static_cast<uint32_t>(lead_of(row) * static_cast<int64_t>(sizeof(T))), bits = skip % 4 * 8;
    uint4 raw[share_size / w];
    const auto load_all = [&](auto load_one) {
#pragma unroll
      for (int v = 0; v < share_size / w; ++v) raw[v] = v * threads * w < left ? load_one(floor + v * threads * w) : uint4{};
    };
    const auto load_across = [&]<int word>() {
      load_all([=](const T* address) { return cut_out<word>(load_aligned(address), load_aligned(address + w), bits); });
    };
    switch (skip / 4) {
      case 0: skip == 0 ? load_all([](const T* address) { return load_aligned(address); }) : load_across.template operator()<0>(); break;
      case 1: load_across.template operator()<1>(); break;
      case 2: load_across.template operator()<2>(); break;
      default: load_across.template operator()<3>();
    }
#pragma unroll
    for (int v = 0; v < share_size / w; ++v) unpack(T{}, raw[v], value + v * w);
    if ((span + 1) * columns_in_span<threads> <= row_columns) return;
#pragma unroll
    for (int i = 0; i < share_size; ++i)
      if (i / w * threads * w + i % w >= left) value[i] = -INFINITY;
  }
};

// The state of row r, known to every thread of its block. `states`: what split_softmax left, or null: the row is read, what of it is
// copied from the copy.
template <class T, int threads>
__device__ inline Softmax<float> softmax_of_row(const Rows& rows, int64_t r, const T* row, const Softmax<float>* states,
                                                const Copy<T, threads>& copy) {
  const int64_t spans = spans_of<threads>(rows.columns);
  Softmax<float> state;
  if (states) {
    for (int64_t span = 0; span < spans; ++span) state = merge(state, states[(r * spans + span) * threads + threadIdx.x]);
  } else {
    for (int64_t span = 0; span < copy.spans; ++span) {
      copy.wait_for(span);
      if (column_of<T, threads>(span, 0) >= rows.columns) continue;
      float value[share_size];
      copy.load(row, rows.columns, span, value);
      state = merge(state, softmax_of_share(value));
    }
    for (int64_t span = copy.spans; span < spans; ++span) state = merge(state, softmax_of_span<threads>(row, rows.columns, span));
  }
  // The sums are merged when all are measured from one maximum: half as many steps, with an addition each, not two exponentials.
  const float max = reduce_block<threads>(state.max, [](float a, float b) { return fmaxf(a, b); });
  return {max, sum_over_block<threads>(state.sum * exponential(state.max - (max == -INFINITY ? 0 : max)))};
}

}  // namespace
}  // namespace memdec::cuda
