// linear_of_rows: a linear layer of up to eight rows, which takes as long as its weights take to read.
//
// A block takes tiles of sixteen rows of the weights, one after the other: eight gates and their eight ups, or sixteen outputs, or eight
// where there would be too few tiles. Its warps share the width: of a step of 512 columns a warp takes 64, whole cache lines. A warp asks
// for its weights of the first steps before the kernel that was queued before this one is done, and from then on for those of a later
// step, or tile, with each that it uses; they are copied to shared memory that no other warp reads, so no warp waits for another. The rows
// stand where a tensor core takes its second factor, of eight columns, so eight rows cost little more than one, and a row's result has
// the same bits whatever rows are beside it.
#include "cuda/reductions.cuh"
#include "cuda/vectors.cuh"

namespace memdec::cuda {
namespace {

constexpr int most_rows = 8;
constexpr int tile_warps = 8;
constexpr int tile_threads = tile_warps * warp_size;
constexpr int each = 8;                   // columns in 16 bytes
constexpr int chunks = 8;                 // 16 bytes each, of a warp's columns: a cache line
constexpr int warp_columns = chunks * each;
constexpr int step_columns = tile_warps * warp_columns;
constexpr int blocks_at_once = 2;  // of a multiprocessor: the rest is for the next kernel's, which ask for their weights

// sum += A · B of 16 × 16 by 16 × 8 numbers. Of A a lane brings columns 2q, 2q + 1 (a[0], a[1]) and 2q + 8, 2q + 9 (a[2], a[3]) of rows g
// (a[0], a[2]) and g + 8, with g = lane / 4, q = lane % 4; of B these rows of column g; of the sum it has columns 2q, 2q + 1 of row g
// and of row g + 8. The order of the sixteen products' sum is the tensor core's own.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__)
  if constexpr (__is_same(T, bfloat16))
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const int row = lane_of_thread() / 4, column = lane_of_thread() % 4 * 2;
  const auto add_product = [](float& to, uint32_t left, uint32_t right) {
    for (int half = 0; half < 32; half += 16)
      to += widened(T{static_cast<uint16_t>(left >> half)}) * widened(T{static_cast<uint16_t>(right >> half)});
  };
  for (int q = 0; q < 4; ++q) {
    for (int part = 0; part < 2; ++part) {
      const uint32_t b = part ? b1 : b0;
      const uint32_t first = __shfl_sync(whole_warp, b, column * 4 + q), second = __shfl_sync(whole_warp, b, (column + 1) * 4 + q);
      const uint32_t upper = __shfl_sync(whole_warp, a[2 * part], row * 4 + q), lower = __shfl_sync(whole_warp, a[2 * part + 1], row * 4 + q);
      add_product(sum[0], upper, first), add_product(sum[1], upper, second);
      add_product(sum[2], lower, first), add_product(sum[3], lower, second);
    }
  }
#endif
}

// The sums of eight rows of weights with the rows of x, in two parts: in one what is in words x and z of sixteen bytes, in the other what
// is in y and w. A tensor core's first factor has sixteen rows: here the lower eight are the upper ones' other words, which are of no use
// beside the same words of x, and so half of each product is thrown away; a vector of weights goes in as it was read.
struct Sums {
  float part[2][4] = {};
  __device__ float of(int column) const { return part[0][column] + part[1][2 + column]; }
};
template <class T>
__device__ inline void multiply_add_chunk(Sums& sums, uint4 weights, uint4 factor) {
  multiply_add<T>(sums.part[0], {weights.x, weights.y, weights.z, weights.w}, factor.x, factor.y);
  multiply_add<T>(sums.part[1], {weights.x, weights.y, weights.z, weights.w}, factor.z, factor.w);
}

struct Scratch {
  float squares[most_rows][tile_warps];
  float sums[2][tile_warps][4][warp_size];  // of a tile, and of the one before
};

// Sixteen bytes of x such that the first two words meet words x and z of the weights, and the last two y and w: see multiply_add_chunk.
__device__ inline uint4 as_factor(uint4 numbers) { return {numbers.x, numbers.z, numbers.y, numbers.w}; }

// Bytes of a normed row in shared memory, such that the pieces of two rows which eight lanes read at once lie in different banks.
__host__ __device__ inline int64_t row_bytes(int64_t width) { return (2 * width + 127) / 128 * 128 + 64; }

// The rows, normed as transformers norms them (rounded before they are multiplied by the weight, and after), to shared memory.
template <class T>
__device__ inline void norm_rows(const LinearOfRows& op, Scratch& scratch, unsigned char* to) {
  const int thread = static_cast<int>(threadIdx.x), rows = static_cast<int>(op.rows), width = static_cast<int>(op.width);
  const int64_t apart = row_bytes(width);
  const T* const weight = static_cast<const T*>(op.norm);
  const auto place = [=](int row, int column) { return reinterpret_cast<T*>(to + row * apart) + column; };
  uint4 factors = thread * each < width ? load_aligned(weight + thread * each) : uint4{0, 0, 0, 0};
  wait_for_kernel_before();
  float squares[most_rows] = {};
  for (int column = thread * each; column < width; column += tile_threads * each) {
    uint4 numbers[most_rows];
#pragma unroll
    for (int row = 0; row < most_rows; ++row)
      if (row < rows) numbers[row] = load_aligned(static_cast<const T*>(op.x) + row * op.x_stride + column);
#pragma unroll
    for (int row = 0; row < most_rows; ++row) {
      if (row >= rows) break;
      store_aligned(place(row, column), numbers[row]);
      float value[each];
      unpack(T{}, numbers[row], value);
#pragma unroll
      for (int e = 0; e < each; ++e) squares[row] += value[e] * value[e];
    }
  }
#pragma unroll
  for (int row = 0; row < most_rows; ++row) {
    if (row >= rows) break;
    const float sum = reduce_warp(squares[row], [](float a, float b) { return a + b; });
    if (lane_of_thread() == 0) scratch.squares[row][warp_of_thread()] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < tile_warps; ++w) sum += scratch.squares[row][w];
    const float scale = rsqrtf(sum / static_cast<float>(width) + static_cast<float>(op.epsilon));
    for (int column = thread * each; column < width; column += tile_threads * each) {
      float value[each], factor[each];
      unpack(T{}, load_aligned(place(row, column)), value);
      unpack(T{}, column == thread * each ? factors : load_aligned(weight + column), factor);
#pragma unroll
      for (int e = 0; e < each; ++e) value[e] = widened(narrowed<T>(value[e] * scale)) * factor[e];
      store_aligned(place(row, column), as_factor(pack(T{}, value)));
    }
  }
  __syncthreads();
}

// What the sixteen rows of a tile are.
enum class Tile { eight, sixteen, gated };

template <Tile kind>
struct Ring {
  static constexpr int parts = kind == Tile::eight ? 1 : 2;  // of eight rows
  static constexpr int outputs = kind == Tile::sixteen ? 16 : 8;
  static constexpr int stages = 8 / parts;  // steps whose weights are on the way
  static constexpr int64_t vectors = int64_t{stages} * parts * tile_warps * 8 * chunks;
};

template <class T, Tile kind, bool norms>
__global__ void __launch_bounds__(tile_threads, 2) linear_of_tiles(LinearOfRows op) {
  let_next_kernel_start();
  using R = Ring<kind>;
  constexpr int parts = R::parts;
  const int warp = warp_of_thread(), lane = lane_of_thread(), thread = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(op.width), steps = (width + step_columns - 1) / step_columns;
  Scratch& scratch = *dynamic_shared<Scratch>();
  // (stages, parts, tile_warps, 8 rows, chunks); the halves of odd rows change places, for eight lanes to read from different banks.
  uint4* const ring = reinterpret_cast<uint4*>(&scratch + 1) + warp * 8 * chunks;
  unsigned char* const normed = reinterpret_cast<unsigned char*>(&scratch + 1) + R::vectors * 16;
  constexpr int part_vectors = tile_warps * 8 * chunks;
  const int64_t part_apart = (kind == Tile::gated ? op.outputs : 8) * width;

  // What is asked for next, of rows lane / 8 and lane / 8 + 4 of eight: chunk lane % 8 of step asked_step of tile asked_tile.
  const int asked_column = warp * warp_columns + lane % chunks * each;
  uint4* const to = ring + lane / chunks * chunks + (lane % chunks ^ lane / chunks % 2 * 4);
  const int64_t half_apart = int64_t{4} * width;
  int64_t asked_tile = blockIdx.x;
  int asked_step = 0, asked_stage = 0, rows_left = 0;  // of the layer, from this lane's first row on
  const T* from = nullptr;
  const uint64_t policy = cache_policy(true);
  const auto begin_tile = [&] {
    const int64_t output = asked_tile * R::outputs + lane / chunks;
    rows_left = static_cast<int>(smaller(larger(op.outputs - output, 0), 16));
    from = static_cast<const T*>(op.weight) + output * width + asked_column;
  };
  begin_tile();
  // A group of copies; an empty one where there is nothing left to ask for.
  const auto ask = [&] {
    if (asked_column + asked_step * step_columns < width) {
      uint4* const stage = to + asked_stage * (parts * part_vectors);
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const T* const address = from + (part ? part_apart : 0);
        constexpr int rows_apart = kind == Tile::sixteen ? 8 : 0;
        if (rows_left > part * rows_apart)
          copy_behind(stage + part * part_vectors, reinterpret_cast<const uint4*>(address), policy);
        if (rows_left > part * rows_apart + 4)
          copy_behind(stage + part * part_vectors + 4 * chunks, reinterpret_cast<const uint4*>(address + half_apart), policy);
      }
    }
    end_group();
    from += step_columns;
    asked_stage = asked_stage + 1 < R::stages ? asked_stage + 1 : 0;
    if (++asked_step == steps) asked_step = 0, asked_tile += gridDim.x, begin_tile();
  };
#pragma unroll 1
  for (int i = 0; i < R::stages; ++i) ask();

  // From here on what the kernels before have written can be read.
  if constexpr (norms) norm_rows<T>(op, scratch, normed);
  else wait_for_kernel_before();

  // A lane multiplies chunks lane % 4 and lane % 4 + 4 of row lane / 4. What it makes of rows of x that there are not, nobody looks at.
  const int row = lane / 4, first_column = warp * warp_columns + lane % 4 * each, x_row = static_cast<int>(smaller(row, op.rows - 1));
  const T* const x = static_cast<const T*>(op.x) + x_row * op.x_stride + first_column;
  const T* const normed_x = reinterpret_cast<const T*>(normed + x_row * row_bytes(width)) + first_column;
  const auto is_inside = [=](int step, int half) { return first_column + step * step_columns + half * (warp_columns / 2) < width; };
  const auto all_inside = [=](int step) { return (warp + 1) * warp_columns + step * step_columns <= width; };
  const auto x_of = [&](int step, int half) { return load_aligned(x + step * step_columns + half * (warp_columns / 2)); };
  constexpr int held = norms ? 1 : 3;  // steps whose numbers of x a thread has, or has asked for
  [[maybe_unused]] uint4 ahead[held][2] = {};
  const auto ask_x = [&](int step, uint4* numbers) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (is_inside(step, half)) numbers[half] = x_of(step, half);
  };
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int64_t at = blockIdx.x; at * R::outputs < op.outputs; at += gridDim.x, parity ^= 1) {
    if constexpr (!norms) {
#pragma unroll
      for (int j = 0; j < held; ++j) ask_x(j, ahead[j]);
    }
    // What a thread adds to its sum: of output thread / 8 of the tile and row thread % 8.
    const int own_row = thread % most_rows;
    const int64_t own_output = at * R::outputs + thread / most_rows;
    const bool mine = thread < R::outputs * most_rows && own_row < op.rows && own_output < op.outputs;
    float bias = 0, up_bias = 0, before = 0;
    if (mine && op.bias) {
      bias = widened(static_cast<const T*>(op.bias)[own_output]);
      if constexpr (kind == Tile::gated) up_bias = widened(static_cast<const T*>(op.bias)[op.outputs + own_output]);
    }
    if (mine && op.residual) before = widened(static_cast<const T*>(op.residual)[own_row * op.residual_stride + own_output]);

    Sums made[parts];
#pragma unroll 1
    for (int first = 0; first < steps; first += held) {
#pragma unroll
      for (int j = 0; j < held; ++j) {
        const int step = first + j;
        if (step >= steps) break;
        wait_for_groups<R::stages - 1>();
        __syncwarp();
        const uint4* const weights = ring + stage * (parts * part_vectors) + row * chunks;
        uint4 vectors[parts][2], factors[2];
        const auto read = [&](int half) {
#pragma unroll
          for (int part = 0; part < parts; ++part) vectors[part][half] = weights[part * part_vectors + lane % 4 + (half ^ row % 2) * 4];
          if constexpr (norms) factors[half] = load_aligned(normed_x + step * step_columns + half * (warp_columns / 2));
          else factors[half] = as_factor(ahead[j][half]);
        };
        if (all_inside(step)) {
          read(0), read(1);
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < parts; ++part) vectors[part][half] = {0, 0, 0, 0};
            factors[half] = {0, 0, 0, 0};
            if (is_inside(step, half)) read(half);
          }
        }
        if constexpr (!norms) ask_x(step + held, ahead[j]);
        __syncwarp();  // all lanes have read the stage
        ask();
        stage = stage + 1 < R::stages ? stage + 1 : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int part = 0; part < parts; ++part) multiply_add_chunk<T>(made[part], vectors[part][half], factors[half]);
        }
      }
    }
    auto& sums = scratch.sums[parity];
#pragma unroll
    for (int i = 0; i < 2 * parts; ++i) sums[warp][i][lane] = made[i / 2].of(i % 2);
    __syncthreads();
    if (!mine) continue;
    const auto total = [&](int part, float shift) {
      const int source = thread / most_rows % 8 * 4 + own_row / 2;
      float value = 0;
#pragma unroll
      for (int w = 0; w < tile_warps; ++w) value += sums[w][2 * part + own_row % 2][source];
      return widened(narrowed<T>(value + shift));
    };
    float y = total(kind == Tile::sixteen ? thread / most_rows / 8 : 0, bias);
    if constexpr (kind == Tile::gated) y = widened(narrowed<T>(y / (1 + expf(-y)))) * total(1, up_bias);
    static_cast<T*>(op.result)[own_row * op.outputs + own_output] = narrowed<T>(y + before);
  }
}

// What python/memdec/decoding/products.py counts on.
static_assert(sizeof(Scratch) + Ring<Tile::gated>::vectors * 16 == 73984 && Ring<Tile::eight>::vectors == Ring<Tile::gated>::vectors);

template <class T, Tile kind, bool norms>
void run_tiles(const LinearOfRows& op, int processors, int most_shared, cudaStream_t stream) {
  const int64_t shared_bytes =
      static_cast<int64_t>(sizeof(Scratch)) + Ring<kind>::vectors * 16 + (norms ? op.rows * row_bytes(op.width) : 0);
  const auto kernel = linear_of_tiles<T, kind, norms>;
  // What the device has, always: another thread may be between this and its launch.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  const int64_t tiles = (op.outputs + Ring<kind>::outputs - 1) / Ring<kind>::outputs;
  launch_early(kernel, smaller(tiles, int64_t{processors} * blocks_at_once), tile_threads, static_cast<size_t>(shared_bytes), stream, op);
}

template <class T>
void run(const LinearOfRows& op, const Launch& where, cudaStream_t stream) {
  int processors = 0, most_shared = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, where.device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device);
  const auto run_kind = [&]<Tile kind>() {
    op.norm ? run_tiles<T, kind, true>(op, processors, most_shared, stream) : run_tiles<T, kind, false>(op, processors, most_shared, stream);
  };
  if (op.gated) run_kind.template operator()<Tile::gated>();
  else if (op.outputs >= int64_t{processors} * 16) run_kind.template operator()<Tile::sixteen>();
  else run_kind.template operator()<Tile::eight>();
}

}  // namespace

Status linear_of_rows(const LinearOfRows& op, const Launch& where) {
  OnDevice device(where);
  if (!device.ok()) return device.status();
  switch (op.dtype) {
    case DType::bfloat16: run<bfloat16>(op, where, device.stream); break;
    case DType::float16: run<float16>(op, where, device.stream); break;
    default: return {.code = Status::bad_dtype, .argument = "x", .got = static_cast<int64_t>(op.dtype)};
  }
  return device.status();
}

}  // namespace memdec::cuda
