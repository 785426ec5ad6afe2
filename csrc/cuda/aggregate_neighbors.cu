// aggregate_neighbors: q(v) ∝ Σ over the neighbours i of 1[v = tokenᵢ]·exp(−dᵢ/T), as sorted sparse rows.
//
// A row of k neighbours is the work of a team, a warp for k ≤ 1024 (rows_by_warps), else a block (rows_by_blocks):
//   1. the least distance; weights exp((least − d)/T), so that the largest is 1 and their sum neither overflows nor vanishes
//   2. (token, place) packed into one integer and sorted by a network: in a warp's registers, or in memory
//   3. each thread owns as many consecutive sorted neighbours as every other. It sums the runs of equal tokens in float64, in the
//      order of their places; what a thread's last run has so far is carried to the next by a scan
//   4. where a run ends its sum over the total is its probability, cut by min_prob and by max_tokens
// Rows differ in how many pairs they give, and the pairs of all rows stand one row behind the other: a tile of rows (one, or a
// warp each) tells the tiles behind it how many it has as soon as it knows, and finds its own beginning by adding up what those
// before it have told (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016). Tiles are handed
// out in order, so that those before have begun, and nobody waits for ever. Everything is written once, at its place.
//
// Traffic: distances and token ids are read once (8 bytes a neighbour for float32 and int32), outputs written once (8 bytes a
// pair). Above 8192 neighbours a row is sorted in the workspace, and goes to it and back once for every step of the network.
#include "cuda/rows.cuh"
#include "cuda/scan.cuh"
#include "cuda/sort.cuh"

namespace memdec::cuda {
namespace {

using Word = unsigned long long;  // the 64 bits that atomic operations take

constexpr Word none = ~Word{0};
constexpr int tile_warps = 4;                 // rows in a tile of rows_by_warps
constexpr int row_threads = 512;              // of a row in rows_by_blocks
constexpr int64_t in_registers = 1024;        // neighbours that rows_by_warps takes
constexpr int64_t in_shared = 8192;           // that rows_by_blocks sorts in 96 KiB of shared memory, which every GPU since sm_80 has
constexpr int64_t workspace_limit = 256 << 20;  // for rows in the workspace, as many as fit at a time, but at least one

// The head of the workspace: what tiles tell each other, and the host.
struct Progress {
  Word tiles_begun;
  Word bad_distance;  // the lowest flat position of each kind; `none`
  Word bad_token;
  Word pairs;  // of all rows
};

// ---- what a neighbour is

// f(pointer to row r) with the type that its elements have: one branch a row.
template <class F>
__device__ inline void with_distances(const AggregateNeighbors& op, int64_t r, const F& f) {
  switch (op.distances.dtype) {
    case DType::bfloat16: return f(row_of<const bfloat16>(op.distances, r));
    case DType::float16: return f(row_of<const float16>(op.distances, r));
    default: return f(row_of<const float>(op.distances, r));
  }
}
template <class F>
__device__ inline void with_token_ids(const AggregateNeighbors& op, int64_t r, const F& f) {
  if (op.wide_ids) return f(static_cast<const int64_t*>(op.token_ids) + r * op.token_ids_stride);
  f(static_cast<const int32_t*>(op.token_ids) + r * op.token_ids_stride);
}

__device__ inline bool is_wrong(float distance) { return !(distance > -INFINITY); }
__device__ inline bool is_wrong(int64_t token, int64_t vocab_size) { return token < -1 || token >= vocab_size; }
__device__ inline bool is_present(float distance, int64_t token, int64_t vocab_size) {
  return distance < INFINITY && !is_wrong(distance) && token >= 0 && token < vocab_size;
}

// Notes what no neighbour can have, of those that this thread's lane has seen in a row. A second look, so that the first needs no
// addresses.
__device__ inline void note_wrong(const AggregateNeighbors& op, int64_t r, Progress* progress) {
  with_distances(op, r, [&](const auto* distances) {
    with_token_ids(op, r, [&](const auto* tokens) {
#pragma unroll 1
      for (int64_t place = lane_of_thread(); place < op.distances.columns; place += warp_size) {
        const Word position = static_cast<Word>(r * op.distances.columns + place);
        if (is_wrong(widened(distances[place]))) {
          atomicMin(&progress->bad_distance, position);
        } else if (is_wrong(tokens[place], op.vocab_size)) {
          atomicMin(&progress->bad_token, position);
        }
      }
    });
  });
}

// 1 / T, kept from overflowing and vanishing: 0 · inf, the nearest neighbour's exponent, would be NaN.
__device__ inline float finite_reciprocal(double temperature) {
  constexpr double highest = 3e38;
  const double exact = 1 / temperature;
  return static_cast<float>(exact > highest ? highest : exact < 1 / highest ? 1 / highest : exact);
}

// The weight of a neighbour at `distance`; an absent one is at +inf and weighs nothing, even where all are.
__device__ inline float weight_of(float distance, float least, float scale) {
  return distance < INFINITY ? exponential((least - distance) * scale) : 0;
}

// ---- steps 3 and 4, for a thread's consecutive neighbours of a sorted row
//
// A share has `count()` neighbours: token(e) and value(e), first the neighbour's weight, then, where a run ends that is kept, its
// probability, and elsewhere 0. Neighbours that are absent come last and have a token that no other has.

// In registers: keys of 32 bits.
template <int each>
struct RegisterShare {
  static constexpr int places_log2() { return each == 2 ? 6 : each == 8 ? 8 : 10; }
  static constexpr uint32_t places = 32 * each;
  static_assert(uint32_t{1} << places_log2() == places);

  uint32_t key[each];
  float values[each];

  __device__ static constexpr int count() { return each; }
  __device__ uint32_t token(int e) const { return key[e] >> places_log2(); }
  __device__ static constexpr uint32_t no_token() { return ~0u >> places_log2(); }
  __device__ float value(int e) const { return values[e]; }
  __device__ void set_value(int e, float value) { values[e] = value; }
};

// In memory: the token in the upper half of a 64-bit key, the value in the lower.
struct MemoryShare {
  uint64_t* key;
  int size;

  __device__ int count() const { return size; }
  __device__ uint32_t token(int e) const { return static_cast<uint32_t>(key[e] >> 32); }
  __device__ static constexpr uint32_t no_token() { return ~0u; }
  __device__ float value(int e) const { return float_of_bits(static_cast<uint32_t>(key[e])); }
  __device__ void set_value(int e, float value) { key[e] = key[e] >> 32 << 32 | bits_of_float(value); }
};

// The sum of the run that is open where a thread's neighbours end, and whether it began among them.
struct OpenRun {
  double sum;
  int64_t is_new;
};
__device__ inline OpenRun merge(OpenRun a, OpenRun b) { return b.is_new ? b : OpenRun{a.sum + b.sum, a.is_new}; }

// a / b, correctly rounded, from 1 / b: a division in float64 for each token would cost more than all the rest.
__device__ inline double quotient(double a, double b, double reciprocal) {
  double q = a * reciprocal;
  q = fma(fma(-q, b, a), reciprocal, q);
  return fma(fma(-q, b, a), reciprocal, q);
}

// Keeps the `most` most probable of a row's tokens, of equals those with the lower ids; returns what this thread's tokens lost.
template <class AnyTeam, class Share>
__device__ double cut_to(int64_t most, Share& share) {
  const auto count_from = [&](uint32_t bits) {
    int64_t count = 0;
#pragma unroll
    for (int e = 0; e < share.count(); ++e) count += bits_of_float(share.value(e)) >= bits;
    return AnyTeam::sum(count);
  };
  uint32_t least = 0;  // becomes the bits of the most-th probability: the highest number that `most` tokens reach
#pragma unroll 1
  for (int bit = 29; bit >= 0; --bit)  // probabilities are at most 1, whose highest bit is this one
    if (count_from(least | 1u << bit) >= most) least |= 1u << bit;
  const int64_t equals_kept = most - count_from(least + 1);
  int64_t equals = 0;
#pragma unroll
  for (int e = 0; e < share.count(); ++e) equals += bits_of_float(share.value(e)) == least;
  equals = AnyTeam::sum_before(equals);
  double lost = 0;
#pragma unroll
  for (int e = 0; e < share.count(); ++e) {
    const uint32_t bits = bits_of_float(share.value(e));
    const bool is_equal = bits == least;
    if (bits < least || (is_equal && equals >= equals_kept)) {
      lost += static_cast<double>(share.value(e));
      share.set_value(e, 0);
    }
    equals += is_equal;
  }
  return lost;
}

struct Kept {
  int64_t before;  // pairs of the row that other threads have before this one's
  int64_t length;  // pairs of the row
};

// Turns the weights of a thread's share into probabilities of what is kept. `next`: the first token of the next thread's share.
template <class AnyTeam, class Share>
__device__ Kept probabilities(const AggregateNeighbors& op, int64_t r, int64_t most, Share& share, uint32_t next) {
  const auto ends = [&](int e) { return share.token(e) != (e + 1 < share.count() ? share.token(e + 1) : next); };
  OpenRun open{0, 0};
  double total = 0;
#pragma unroll
  for (int e = 0; e < share.count(); ++e) {
    const double weight = static_cast<double>(share.value(e));
    total += weight;
    open.sum += weight;
    if (ends(e)) open = {0, 1};
  }
  double run = AnyTeam::before(open, OpenRun{0, 0}, [](OpenRun a, OpenRun b) { return merge(a, b); }).sum;
  total = AnyTeam::sum(total);
  const double reciprocal = 1 / total;
  double lost = 0;
  int64_t kept = 0;
#pragma unroll
  for (int e = 0; e < share.count(); ++e) {
    run += static_cast<double>(share.value(e));
    float probability = 0;
    if (ends(e)) {
      const double exact = quotient(run, total, reciprocal);
      probability = static_cast<float>(exact);
      if (!(probability > 0 && exact >= op.min_prob)) {
        probability = 0;
        lost += exact;
      }
      run = 0;
    }
    share.set_value(e, probability);
    kept += probability > 0;
  }
  int64_t length = AnyTeam::sum(kept);
  if (length > most) {
    lost += cut_to<AnyTeam>(most, share);
    kept = 0;
#pragma unroll
    for (int e = 0; e < share.count(); ++e) kept += share.value(e) > 0;
    length = most;
  }
  lost = AnyTeam::sum(lost);
  if (AnyTeam::rank() == 0) op.residual[r] = static_cast<float>(lost);
  return {AnyTeam::sum_before(kept), length};
}

// put(i, token, probability) for each pair of a thread's share, i counting the row's pairs.
template <class Share, class Put>
__device__ inline void for_each_kept(const Share& share, int64_t before, const Put& put) {
#pragma unroll
  for (int e = 0; e < share.count(); ++e)
    if (share.value(e) > 0) put(before++, static_cast<int32_t>(share.token(e)), share.value(e));
}

// ---- where a tile's pairs begin
//
// tiles[t] is 0 until tile t knows how many pairs it has, then `is_length` and that number, and at last `is_end` and the number of
// pairs up to its end. State and number are one word, so that nothing else needs to be ordered.

constexpr Word is_length = Word{1} << 62, is_end = Word{2} << 62, number = is_length - 1;

__global__ void __launch_bounds__(block_threads) begin(int64_t* out_indptr, Progress* progress, Word* tiles, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x;
  if (i < count) tiles[i] = 0;
  if (i != 0) return;
  *progress = {0, none, none, 0};
  out_indptr[0] = 0;
}

// The next tile, for a whole block.
__device__ inline int64_t next_tile(Progress* progress) {
  struct Next {
    int64_t tile;
  };
  __syncthreads();  // the number of the tile before may still be read
  if (threadIdx.x == 0) shared<Next>().tile = static_cast<int64_t>(atomicAdd(&progress->tiles_begun, Word{1}));
  __syncthreads();
  return shared<Next>().tile;
}

// The pairs of all tiles before this one, which has `length`. A whole warp calls it.
__device__ inline int64_t begin_of_tile(volatile Word* tiles, int64_t tile, int64_t length) {
  const int lane = lane_of_thread();
  const Word mine = static_cast<Word>(length);
  if (lane == 0) tiles[tile] = tile == 0 ? is_end | mine : is_length | mine;
  if (tile == 0) return 0;
  Word before = 0;
  for (int64_t nearest = tile - 1;; nearest -= warp_size) {  // lane l looks at the tile l before the nearest
    const int64_t at = nearest - lane;
    Word state = is_end;
    do {
      if (at >= 0) state = tiles[at];
    } while (!__all_sync(whole_warp, state != 0));
    const unsigned ended = __ballot_sync(whole_warp, state >= is_end);
    const int last = ended ? __ffs(ended) - 1 : warp_size - 1;  // the nearest that knows its end
    before += Team<warp_size>::sum(lane <= last ? state & number : Word{0});
    if (ended) break;
  }
  if (lane == 0) tiles[tile] = is_end | (before + mine);
  return static_cast<int64_t>(before);
}

// ---- the kernels

// At 32 keys a lane some 160 registers a thread are used, three tiles a multiprocessor; asked for four, the compiler spills.
template <int each>
__global__ void __launch_bounds__(tile_warps* warp_size)
    rows_by_warps(AggregateNeighbors op, int64_t most, Progress* progress, Word* tiles) {
  using Share = RegisterShare<each>;
  using Warp = Team<warp_size>;
  constexpr int room = 33 * each;  // a word of padding after every 32: threads put their pairs 32 apart
  struct Scratch {
    float number[tile_warps][room];  // weights by place, then probabilities
    int32_t token[tile_warps][room];
    int64_t length[tile_warps];
    int64_t begin;
  };
  Scratch& scratch = shared<Scratch>();
  const int64_t tile = next_tile(progress), rows = op.distances.count, k = op.distances.columns;
  const int warp = warp_of_thread(), lane = lane_of_thread();
  const int64_t r = tile * tile_warps + warp;
  float* const numbers = scratch.number[warp];
  int32_t* const tokens = scratch.token[warp];
  const auto padded = [](int64_t i) { return i + i / 32; };

  Kept kept{0, 0};
  if (r < rows) {
    Share share;
    float distance[each];
    bool wrong = false;
    with_distances(op, r, [&](const auto* row) {
#pragma unroll
      for (int e = 0; e < each; ++e) {
        const int place = e * warp_size + lane;
        distance[e] = place < k ? widened(row[place]) : INFINITY;
      }
    });
    with_token_ids(op, r, [&](const auto* row) {
#pragma unroll
      for (int e = 0; e < each; ++e) {
        const int place = e * warp_size + lane;
        const int64_t token = place < k ? row[place] : -1;
        wrong |= is_wrong(distance[e]) || is_wrong(token, op.vocab_size);
        const bool present = is_present(distance[e], token, op.vocab_size);
        share.key[e] = present ? static_cast<uint32_t>(token) << Share::places_log2() | static_cast<uint32_t>(place) : ~0u;
        if (!present) distance[e] = INFINITY;
      }
    });
    if (wrong) note_wrong(op, r, progress);

    float least = INFINITY;
#pragma unroll
    for (int e = 0; e < each; ++e) least = fminf(least, distance[e]);
    least = reduce_warp(least, [](float a, float b) { return fminf(a, b); });
    const float scale = finite_reciprocal(op.temperature);
#pragma unroll
    for (int e = 0; e < each; ++e) numbers[e * warp_size + lane] = weight_of(distance[e], least, scale);
    sort_in_warp(share.key);
    __syncwarp();  // weights are read by other lanes than wrote them
#pragma unroll
    for (int e = 0; e < each; ++e) share.values[e] = share.key[e] == ~0u ? 0 : numbers[share.key[e] % Share::places];
    const uint32_t next = __shfl_down_sync(whole_warp, share.token(0), 1);
    kept = probabilities<Warp>(op, r, most, share, lane == warp_size - 1 ? Share::no_token() : next);
    __syncwarp();  // the weights are read no more
    for_each_kept(share, kept.before, [&](int64_t i, int32_t token, float probability) {
      tokens[padded(i)] = token;
      numbers[padded(i)] = probability;
    });
  }
  if (lane == 0) scratch.length[warp] = kept.length;
  __syncthreads();  // the lengths, and every warp's pairs, are there
  int64_t before = 0, length = 0;
  for (int w = 0; w < tile_warps; ++w) {
    if (w == warp) before = length;
    length += scratch.length[w];
  }
  if (warp == 0) {
    const int64_t begin = begin_of_tile(tiles, tile, length);
    if (lane == 0) scratch.begin = begin;
  }
  __syncthreads();
  if (r >= rows) return;
  const int64_t begin = scratch.begin + before;
  for (int64_t i = lane; i < kept.length; i += warp_size) {
    op.out_ids[begin + i] = tokens[padded(i)];
    op.out_probs[begin + i] = numbers[padded(i)];
  }
  if (lane != 0) return;
  op.out_indptr[r + 1] = begin + kept.length;
  if (r == rows - 1) progress->pairs = static_cast<Word>(begin + kept.length);
}

// `memory`: n keys and n weights a block, or null for shared memory. n is a power of two, at least k and row_threads.
__global__ void __launch_bounds__(row_threads, 2)
    rows_by_blocks(AggregateNeighbors op, int64_t most, uint32_t n, unsigned char* memory, Progress* progress, Word* tiles) {
  using Block = Team<row_threads>;
  struct Begin {
    int64_t begin;
  };
  const int64_t rows = op.distances.count, k = op.distances.columns;
  const size_t row_bytes = size_t{n} * (sizeof(uint64_t) + sizeof(float));
  uint64_t* const keys = reinterpret_cast<uint64_t*>(memory ? memory + blockIdx.x * row_bytes : dynamic_shared<unsigned char>());
  float* const weights = reinterpret_cast<float*>(keys + n);
  for (;;) {
    const int64_t r = next_tile(progress);
    if (r >= rows) return;
    float least = INFINITY;
    bool wrong = false;
    with_distances(op, r, [&](const auto* distances) {
      with_token_ids(op, r, [&](const auto* tokens) {
        for (uint32_t place = threadIdx.x; place < n; place += row_threads) {
          const float distance = place < k ? widened(distances[place]) : INFINITY;
          const int64_t token = place < k ? tokens[place] : -1;
          wrong |= is_wrong(distance) || is_wrong(token, op.vocab_size);
          const bool present = is_present(distance, token, op.vocab_size);
          keys[place] = present ? static_cast<uint64_t>(token) << 32 | place : ~uint64_t{0};
          weights[place] = present ? distance : INFINITY;
          least = fminf(least, weights[place]);
        }
      });
    });
    if (wrong) note_wrong(op, r, progress);
    least = reduce_block<row_threads>(least, [](float a, float b) { return fminf(a, b); });
    const float scale = finite_reciprocal(op.temperature);
    for (uint32_t place = threadIdx.x; place < n; place += row_threads) weights[place] = weight_of(weights[place], least, scale);
    sort_in_memory<row_threads>(keys, n);

    MemoryShare share{keys + threadIdx.x * (n / row_threads), static_cast<int>(n / row_threads)};
    const bool is_last = threadIdx.x == row_threads - 1;
    const uint32_t next = is_last ? MemoryShare::no_token() : share.token(share.size);
    __syncthreads();  // everyone has read the next thread's token
    for (int e = 0; e < share.size; ++e) share.set_value(e, share.key[e] == ~uint64_t{0} ? 0 : weights[static_cast<uint32_t>(share.key[e])]);
    const Kept kept = probabilities<Block>(op, r, most, share, next);
    if (warp_of_thread() == 0) {
      const int64_t begin = begin_of_tile(tiles, r, kept.length);
      if (lane_of_thread() == 0) shared<Begin>().begin = begin;
    }
    __syncthreads();
    const int64_t begin = shared<Begin>().begin;
    for_each_kept(share, kept.before, [&](int64_t i, int32_t token, float probability) {
      op.out_ids[begin + i] = token;
      op.out_probs[begin + i] = probability;
    });
    if (threadIdx.x != 0) continue;
    op.out_indptr[r + 1] = begin + kept.length;
    if (r == rows - 1) progress->pairs = static_cast<Word>(begin + kept.length);
  }
}

// ---- the launcher

struct Plan {
  int each = 0;         // neighbours a lane, for rows_by_warps; 0: rows_by_blocks
  int64_t tiles = 0;
  int64_t blocks = 0;
  int64_t n = 0;        // of rows_by_blocks
  int64_t row_bytes = 0;
  bool is_shared = true;
  int64_t tiles_at = 256, rows_at = 0, bytes = 0;  // in the workspace
};

Plan plan_of(const AggregateNeighbors& op) {
  Plan plan;
  const int64_t k = op.distances.columns;
  plan.each = k <= 64 ? 2 : k <= 256 ? 8 : 32;
  if (k > in_registers || op.vocab_size * (warp_size * plan.each) >= int64_t{1} << 32) plan.each = 0;  // ~0 is no neighbour's key
  plan.tiles = plan.each ? (op.distances.count + tile_warps - 1) / tile_warps : op.distances.count;
  plan.blocks = plan.tiles;
  plan.rows_at = (plan.tiles_at + plan.tiles * static_cast<int64_t>(sizeof(Word)) + 255) / 256 * 256;
  plan.bytes = plan.rows_at;
  if (plan.each) return plan;
  plan.n = row_threads;
  while (plan.n < k) plan.n *= 2;
  plan.row_bytes = plan.n * static_cast<int64_t>(sizeof(uint64_t) + sizeof(float));
  plan.is_shared = plan.n <= in_shared;
  plan.blocks = smaller(plan.tiles, plan.is_shared ? 1024 : larger(1, smaller(264, workspace_limit / plan.row_bytes)));
  if (!plan.is_shared) plan.bytes += plan.blocks * plan.row_bytes;
  return plan;
}

}  // namespace

int64_t workspace_bytes(const AggregateNeighbors& op) { return plan_of(op).bytes; }

Status aggregate_neighbors(const AggregateNeighbors& op, const Launch& where) {
  if (op.distances.dtype == DType::float64)
    return {.code = Status::bad_dtype, .argument = "distances", .got = static_cast<int64_t>(op.distances.dtype)};
  OnDevice device(where);
  if (!device.ok()) return device.status();
  const Plan plan = plan_of(op);
  int64_t most = smaller(op.distances.columns, op.vocab_size);
  if (op.max_tokens > 0) most = smaller(most, op.max_tokens);
  auto* const workspace = static_cast<unsigned char*>(where.workspace);
  auto* const progress = reinterpret_cast<Progress*>(workspace);
  auto* const tiles = reinterpret_cast<Word*>(workspace + plan.tiles_at);
  launch(begin, larger(1, (plan.tiles + block_threads - 1) / block_threads), block_threads, 0, device.stream, op.out_indptr, progress,
         tiles, plan.tiles);
  if (plan.tiles > 0) {
    const auto by_warps = [&](auto kernel) { launch(kernel, plan.blocks, tile_warps * warp_size, 0, device.stream, op, most, progress, tiles); };
    switch (plan.each) {
      case 2: by_warps(rows_by_warps<2>); break;
      case 8: by_warps(rows_by_warps<8>); break;
      case 32: by_warps(rows_by_warps<32>); break;
      default: {
        const size_t shared_bytes = plan.is_shared ? static_cast<size_t>(plan.row_bytes) : 0;
        cudaFuncSetAttribute(rows_by_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        launch(rows_by_blocks, plan.blocks, row_threads, shared_bytes, device.stream, op, most, static_cast<uint32_t>(plan.n),
               plan.is_shared ? nullptr : workspace + plan.rows_at, progress, tiles);
      }
    }
  }
  Progress done{};
  cudaMemcpyAsync(&done, progress, sizeof done, cudaMemcpyDeviceToHost, device.stream);
  cudaStreamSynchronize(device.stream);
  if (const Status status = device.status(); status.code != Status::ok) return status;
  *op.pairs = static_cast<int64_t>(done.pairs);
  if (done.bad_distance != none)
    return {.code = Status::bad_number, .argument = "distances", .at = static_cast<int64_t>(done.bad_distance)};
  if (done.bad_token == none) return {};
  const int64_t at = static_cast<int64_t>(done.bad_token), k = op.distances.columns;
  const int64_t element = at / k * op.token_ids_stride + at % k;
  int64_t wide = 0;
  int32_t narrow = 0;
  if (op.wide_ids) {
    cudaMemcpyAsync(&wide, static_cast<const int64_t*>(op.token_ids) + element, sizeof wide, cudaMemcpyDeviceToHost, device.stream);
  } else {
    cudaMemcpyAsync(&narrow, static_cast<const int32_t*>(op.token_ids) + element, sizeof narrow, cudaMemcpyDeviceToHost, device.stream);
  }
  cudaStreamSynchronize(device.stream);
  if (const Status status = device.status(); status.code != Status::ok) return status;
  return {.code = Status::bad_index, .argument = "token_ids", .at = at, .got = op.wide_ids ? wide : narrow, .wanted = op.vocab_size};
}

}  // namespace memdec::cuda
