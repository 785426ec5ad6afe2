// The k nearest of many rows, found as the distances pass by in blocks: exact search. What the functions do for each other, and why
// the order of ids decides between equal distances, is told in csrc/cpu/topk_filter.cpp; here a block of threads has a query.
//
//   topk_filter_prepare  a warp a stored row: float32 of its float16 numbers less the mean, and ‖x‖²
//   topk_filter_update   compares ‖x‖² − 2·q·x of 1024 columns at a time with the query's threshold and pushes what is below into its
//                        buffer. A buffer without room for 1024 more is cut to the `keep` least keys, whose worst is the new threshold.
//                        The threshold changes between such steps only, so columns in ascending order meet it as on the CPU, and what
//                        outlives the last cut is what outlives it there
//   topk_filter_refine   half a warp a candidate: Σ (q − x)² in sixteen partial sums and a tree, the bits that the CPU's vectors give
//   topk_filter_select   sorts a query's candidates by a network, writes the first k
//
// Buffers are some ten kilobytes a query, which the first-level cache holds while a block is at work on them.
//
// Traffic: each product is read once, 4 bytes. For N rows in no particular order a query sees about keep·log₂(N / keep) pushes of 8
// bytes and log₂(N / keep) cuts. Refining reads keep·dim float16 numbers a query.
#include "cuda/scan.cuh"
#include "cuda/sort.cuh"
#include "cuda/vectors.cuh"

namespace memdec::cuda {
namespace {

constexpr int threads = 256;
constexpr int columns_each = 4;  // of a thread at a time
constexpr int64_t step = threads * columns_each;
constexpr uint32_t in_shared = 4096;  // keys that topk_filter_select sorts in shared memory

using Block = Team<threads>;

// A float's bits as an unsigned number of the same order, above the id: equal distances are in the order of their ids. NaN must not
// come here.
__device__ inline uint64_t key_of(float distance, uint32_t id) {
  const uint32_t bits = bits_of_float(distance);
  return static_cast<uint64_t>(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) << 32 | id;
}
__device__ inline float distance_of(uint64_t key) {
  const uint32_t rank = static_cast<uint32_t>(key >> 32);
  return float_of_bits(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ inline int64_t id_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

// Moves the `keep` least of n > keep different keys to the front, in the order they had; returns the distance of the worst of them.
__device__ inline float cut(uint64_t* keys, int64_t n, int64_t keep) {
  __syncthreads();  // what was pushed is there
  const auto count_below = [&](uint64_t bound) {
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < n; i += threads) count += keys[i] < bound;
    return Block::sum(count);
  };
  // Bit by bit, the highest number that fewer than `keep` keys are below, unless exactly `keep` are on the way: then that will do.
  uint64_t bound = 0;
  int64_t below = 0;
#pragma unroll 1
  for (int bit = 63; bit >= 0 && below != keep; --bit) {
    const int64_t count = count_below(bound | uint64_t{1} << bit);
    if (count > keep) continue;
    bound |= uint64_t{1} << bit;
    below = count;
  }
  int64_t kept = 0;
  uint64_t worst = 0;
  for (int64_t first = 0; first < n; first += threads) {
    const int64_t i = first + threadIdx.x;
    const uint64_t key = i < n ? keys[i] : ~uint64_t{0};
    const bool is_kept = key < bound;
    const int64_t to = kept + Block::sum_before(int64_t{is_kept});  // not beyond i, and everyone has read
    if (is_kept) keys[to] = key;
    if (is_kept && key > worst) worst = key;
    kept += Block::sum(int64_t{is_kept});
  }
  worst = reduce_block<threads>(worst, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  return distance_of(worst);
}

__global__ void __launch_bounds__(threads) prepare_rows(TopkFilterPrepare op) {
  const int64_t r = int64_t{blockIdx.x} * (threads / warp_size) + warp_of_thread();
  if (r >= op.rows) return;
  const float16* const stored = static_cast<const float16*>(op.stored) + r * op.stored_stride;
  float norm = 0;
  for (int64_t i = lane_of_thread(); i < op.dim; i += warp_size) {
    const float x = widened(stored[i]) - op.mean[i];
    op.centred[r * op.dim + i] = x;
    norm += x * x;
  }
  norm = Team<warp_size>::sum(norm);
  if (lane_of_thread() == 0) op.norms[r] = norm;
}

__global__ void __launch_bounds__(threads) update_rows(TopkFilterUpdate op) {
  struct Count {
    int of_candidates;
  };
  const TopkBuffers& buffers = op.buffers;
  const int64_t r = blockIdx.x;
  const float* const products = op.products + r * op.products_stride;
  uint64_t* const keys = buffers.keys + r * buffers.capacity;
  float threshold = buffers.thresholds[r];
  int& count = shared<Count>().of_candidates;
  if (threadIdx.x == 0) count = buffers.counts[r];
  // Columns [hidden, shown) are not this query's to find.
  int64_t hidden = op.columns, shown = op.columns;
  if (op.excluded) {
    hidden = larger(0, smaller(op.columns, op.excluded[2 * r] - op.first_id));
    shown = larger(hidden, smaller(op.columns, op.excluded[2 * r + 1] - op.first_id));
  }
  for (int64_t first = 0; first < op.columns; first += step) {
    float distance[columns_each];
#pragma unroll
    for (int i = 0; i < columns_each; ++i) {
      const int64_t c = first + i * threads + threadIdx.x;
      const bool is_there = c < op.columns && (c < hidden || c >= shown);
      distance[i] = is_there ? op.norms[c] - 2.0f * products[c] : NAN;  // NaN is below nothing
    }
    __syncthreads();  // the pushes of the step before are counted
    const int candidates = count;
    __syncthreads();  // and everyone knows how many, before the next push
    if (candidates > buffers.capacity - step) {
      threshold = cut(keys, candidates, buffers.keep);
      if (threadIdx.x == 0) count = static_cast<int>(buffers.keep);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < columns_each; ++i)
      if (distance[i] < threshold)
        keys[atomicAdd(&count, 1)] = key_of(distance[i], static_cast<uint32_t>(op.first_id + first + i * threads + threadIdx.x));
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  buffers.counts[r] = count;
  buffers.thresholds[r] = threshold;
}

// d·d + sum with two roundings, where a compiler would like to make it one.
__device__ inline float square_added(float d, float sum) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(sum, __fmul_rn(d, d));
#else
  return sum + d * d;
#endif
}

__global__ void __launch_bounds__(threads) refine_rows(TopkFilterRefine op) {
  constexpr int sums = 16;
  const TopkBuffers& buffers = op.buffers;
  const int64_t r = blockIdx.x;
  uint64_t* const keys = buffers.keys + r * buffers.capacity;
  int64_t count = buffers.counts[r];
  if (count > buffers.keep) {
    cut(keys, count, buffers.keep);
    count = buffers.keep;
    if (threadIdx.x == 0) buffers.counts[r] = static_cast<int32_t>(count);
    __syncthreads();
  }
  const float* const query = op.queries + r * op.dim;
  const int lane = static_cast<int>(threadIdx.x) % sums;
  for (int64_t first = 0; first < count; first += threads / sums) {  // the whole warp stays together
    const int64_t i = first + threadIdx.x / sums;
    const int64_t row = i < count ? id_of(keys[i]) - op.first_id : -1;
    const bool is_here = row >= 0 && row < op.stored_rows;
    float sum = 0;
    if (is_here) {
      const float16* const stored = static_cast<const float16*>(op.stored) + row * op.stored_stride;
      int64_t j = lane;
#pragma unroll 4
      for (; j - lane + sums <= op.dim; j += sums) {
        const float difference = query[j] - widened(stored[j]);
        sum = fmaf(difference, difference, sum);
      }
      if (j < op.dim) sum = square_added(query[j] - widened(stored[j]), sum);
    }
    for (int bits = sums / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(whole_warp, sum, bits);
    if (is_here && lane == 0) keys[i] = key_of(sum, static_cast<uint32_t>(row + op.first_id));
  }
}

__global__ void __launch_bounds__(threads) select_rows(TopkFilterSelect op) {
  const TopkBuffers& buffers = op.buffers;
  const int64_t r = blockIdx.x;
  uint64_t* const candidates = buffers.keys + r * buffers.capacity;
  if (buffers.counts[r] > buffers.keep) cut(candidates, buffers.counts[r], buffers.keep);
  const uint32_t count = static_cast<uint32_t>(smaller(buffers.counts[r], buffers.keep));
  uint32_t n = 1;
  while (n < count) n *= 2;  // less than 2 · keep, so there is room for it in the buffer
  uint64_t* const keys = n <= in_shared ? dynamic_shared<uint64_t>() : candidates;
  for (uint32_t i = threadIdx.x; i < n; i += threads) keys[i] = i < count ? candidates[i] : ~uint64_t{0};
  sort_in_memory<threads>(keys, n);
  for (int64_t i = threadIdx.x; i < op.k; i += threads) {
    const bool found = i < count;
    op.distances[r * op.k + i] = found ? distance_of(keys[i]) : INFINITY;
    op.ids[r * op.k + i] = found ? id_of(keys[i]) : -1;
  }
}

// Runs a kernel of one argument, its op, with so many blocks, if any.
template <class Op>
inline Status for_blocks(void (*kernel)(Op), const Op& op, int64_t blocks, size_t shared_bytes, const Launch& where) {
  if constexpr (requires { op.buffers; })
    if (const int64_t least = op.buffers.keep + larger(op.buffers.keep, step); op.buffers.capacity < least)
      return {.code = Status::bad_structure, .argument = "capacity", .got = op.buffers.capacity, .wanted = least};
  OnDevice device(where);
  if (!device.ok()) return device.status();
  if (blocks > 0) launch(kernel, blocks, threads, shared_bytes, device.stream, op);
  return device.status();
}

}  // namespace

Status topk_filter_prepare(const TopkFilterPrepare& op, const Launch& where) {
  constexpr int64_t rows = threads / warp_size;
  return for_blocks(prepare_rows, op, (op.rows + rows - 1) / rows, 0, where);
}

Status topk_filter_update(const TopkFilterUpdate& op, const Launch& where) { return for_blocks(update_rows, op, op.rows, 0, where); }
Status topk_filter_refine(const TopkFilterRefine& op, const Launch& where) { return for_blocks(refine_rows, op, op.rows, 0, where); }

Status topk_filter_select(const TopkFilterSelect& op, const Launch& where) {
  const size_t shared_bytes = static_cast<size_t>(smaller(in_shared, 2 * op.buffers.keep)) * sizeof(uint64_t);
  return for_blocks(select_rows, op, op.rows, shared_bytes, where);
}

}  // namespace memdec::cuda
