// aggregate_neighbors: q(v) ∝ Σ over the neighbours i of 1[v = tokenᵢ]·exp(−dᵢ/T), as sorted sparse rows.
//
// A row of k neighbours is the work of a team, a warp for k ≤ 1024 (rows_by_warps), else a block (rows_by_blocks):
//   1. the least distance; weights exp((least − d)/T), so that the largest is 1 and their sum neither overflows nor vanishes
//   2. (token, place) packed into one integer and sorted by a network: in a warp's registers (above 256 neighbours by way of shared
//      memory, sort.cuh), or in memory
//   3. each thread owns as many consecutive sorted neighbours as every other. It sums the runs of equal tokens in float64, in the
//      order of their places; what a thread's last run has so far is carried to the next by a scan
//   4. where a run ends its sum over the total is its probability, cut by min_prob and by max_tokens
// Up to 1024 neighbours the instructions are what takes the time, so steps 1 to 4 have no branches but for rows with absent neighbours
// and for cuts: 4,300 a warp and row of 1024, of which the sort is half.
// Rows differ in how many pairs they give, and the pairs of all rows stand one row behind the other: a tile of rows (one, or a
// warp each) tells the tiles behind it how many it has as soon as it knows, and finds its own beginning by adding up what those
// before it have told (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016). Tiles are handed
// out in order, so that those before have begun, and nobody waits for ever. Everything is written once, at its place.
//
// Traffic: distances and token ids are read once (8 bytes a neighbour for float32 and int32), outputs written once (8 bytes a
// pair). Above 8192 neighbours a row is sorted in the workspace, and goes to it and back once for every step of the network.
#include <type_traits>

#include "cuda/rows.cuh"
#include "cuda/scan.cuh"
#include "cuda/sort.cuh"

namespace memdec::cuda {
namespace {

using Word = unsigned long long;  // the 64 bits that atomic operations take

constexpr Word none = ~Word{0};
constexpr int tile_warps = 4;                 // rows in a tile of rows_by_warps
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int wide_tiles = 4;                 // on a multiprocessor, of 32 neighbours a lane
#else
constexpr int wide_tiles = 5;                 // at 96 registers a thread, where the compiler would spill for later GPUs
#endif
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

// A token id in 32 bits; one that does not fit becomes one that is wrong, too.
__device__ inline int32_t in_32_bits(int32_t token) { return token; }
__device__ inline int32_t in_32_bits(int64_t token) {
  const auto low = static_cast<int32_t>(token);
  return static_cast<int32_t>(token >> 32) == low >> 31 ? low : INT32_MIN;
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

// to[e] = f(column e · 32 + lane of a row), or `beyond` where the row has none.
template <int each, class T, class To, class F>
__device__ inline void load_columns(const T* row, int64_t columns, To beyond, To (&to)[each], const F& f) {
  const T* const own = row + lane_of_thread();
  if (columns == each * warp_size) {
#pragma unroll
    for (int e = 0; e < each; ++e) to[e] = f(own[e * warp_size]);
    return;
  }
  const int count = static_cast<int>(columns) - lane_of_thread();
#pragma unroll
  for (int e = 0; e < each; ++e) to[e] = e * warp_size < count ? f(own[e * warp_size]) : beyond;
}

// 1 / T, kept from overflowing and vanishing: 0 · inf, the nearest neighbour's exponent, would be NaN.
inline float finite_reciprocal(double temperature) {
  constexpr double highest = 3e38;
  const double exact = 1 / temperature;
  return static_cast<float>(exact > highest ? highest : exact < 1 / highest ? 1 / highest : exact);
}

// The weight of a neighbour at `distance`, `least` being finite; an absent one is at +inf and weighs nothing.
__device__ inline float weight_of(float distance, float least, float scale) { return exponential((least - distance) * scale); }
__device__ inline float finite_least(float least) { return least < INFINITY ? least : 0; }  // where all are absent

// ---- steps 3 and 4, for a thread's consecutive neighbours of a sorted row
//
// A share has `count()` neighbours: token(e), whether a run ends(e), and value(e), first the neighbour's weight, then, where a run
// ends that is kept, its probability, and elsewhere 0. Neighbours that are absent come last and have a token that no other has.

// In registers: keys of 32 bits.
template <int each>
struct RegisterShare {
  static constexpr int places_log2() { return each == 2 ? 6 : each == 8 ? 8 : 10; }
  static constexpr uint32_t places = 32 * each;
  static_assert(uint32_t{1} << places_log2() == places);

  uint32_t key[each];  // an absent neighbour's is no_token and its place, which has no weight
  float values[each];
  uint32_t next;  // the first key of the next thread's share; one of no_token for the last thread

  __device__ static constexpr int count() { return each; }
  __device__ uint32_t token(int e) const { return key[e] >> places_log2(); }
  __device__ static constexpr uint32_t no_token() { return ~0u >> places_log2(); }
  __device__ bool ends(int e) const { return ((key[e] ^ (e + 1 < each ? key[e + 1] : next)) & token_bits) != 0; }
  __device__ float value(int e) const { return values[e]; }
  __device__ void set_value(int e, float value) { values[e] = value; }

  // Makes the compiler derive anew from keys and values what it needs from here on: kept, it would not fit into the registers.
  __device__ void derive_anew() {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int e = 0; e < each; ++e) asm volatile("" : "+r"(key[e]), "+f"(values[e]));
    asm volatile("" : "+r"(token_bits));
#endif
  }

 private:
  uint32_t token_bits = ~0u << places_log2();  // of a key; a variable, so that one instruction compares two keys by them
};

// In memory: the token in the upper half of a 64-bit key, the value in the lower.
struct MemoryShare {
  uint64_t* key;
  int size;
  uint32_t next;  // the first token of the next thread's share; no_token for the last thread

  __device__ int count() const { return size; }
  __device__ uint32_t token(int e) const { return static_cast<uint32_t>(key[e] >> 32); }
  __device__ static constexpr uint32_t no_token() { return ~0u; }
  __device__ bool ends(int e) const { return token(e) != (e + 1 < size ? token(e + 1) : next); }
  __device__ float value(int e) const { return float_of_bits(static_cast<uint32_t>(key[e])); }
  __device__ void set_value(int e, float value) { key[e] = key[e] >> 32 << 32 | bits_of_float(value); }
  __device__ void derive_anew() {}
};

// The sum of the run that is open where a thread's neighbours end, and whether it began among them.
struct OpenRun {
  double sum;
  int64_t is_new;
};
__device__ inline OpenRun merge(OpenRun a, OpenRun b) { return b.is_new ? b : OpenRun{a.sum + b.sum, a.is_new}; }

// 1 / b for a normal b, to twice float64's bits, and a / b from it: off by one part in 2^104 before it is rounded, so rounded correctly
// unless it lies that near to the middle of two numbers. A division in float64 for each token would cost more than all the rest.
struct Reciprocal {
  double high, low;
};
__device__ inline Reciprocal reciprocal_of(double b) {
#if defined(__CUDA_ARCH__)
  double high;  // to 20 bits, then 40, then all: 1 / b without the branch for other numbers
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(high) : "d"(b));
  high = fma(fma(-high, b, 1.0), high, high);
  high = fma(fma(-high, b, 1.0), high, high);
#else
  const double high = 1 / b;
#endif
  return {high, fma(-high, b, 1.0) * high};
}
__device__ inline double quotient(double a, Reciprocal b) { return fma(a, b.high, a * b.low); }

// Keeps the `most` most probable of a row's tokens, of equals those with the lower ids; returns what this thread's tokens lost.
template <class AnyTeam, class Share>
__device__ double cut_to(int64_t most, Share& share) {
  const auto count_from = [&](uint32_t bits) {
    int count = 0;
    share.derive_anew();
#pragma unroll
    for (int e = 0; e < share.count(); ++e) count += bits_of_float(share.value(e)) >= bits;
    return AnyTeam::sum(count);
  };
  uint32_t least = 0;  // becomes the bits of the most-th probability: the highest number that `most` tokens reach
#pragma unroll 1
  for (int bit = 29; bit >= 0; --bit)  // probabilities are at most 1, whose highest bit is this one
    if (count_from(least | 1u << bit) >= most) least |= 1u << bit;
  const int equals_kept = static_cast<int>(most) - count_from(least + 1);
  int equals = 0;
  share.derive_anew();
#pragma unroll
  for (int e = 0; e < share.count(); ++e) equals += bits_of_float(share.value(e)) == least;
  equals = AnyTeam::sum_before(equals);
  double lost = 0;
  share.derive_anew();
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

// What a run's sum is set to at its end: less than 2⁻¹⁰⁴¹, which leaves the next weight as it is, for half of what 0 costs.
__device__ inline double nearly_nothing(double sum) {
#if defined(__CUDA_ARCH__)
  return __hiloint2double(0, __double2loint(sum));
#else
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  bits &= 0xffffffff;
  memcpy(&sum, &bits, sizeof bits);
  return sum;
#endif
}

struct Kept {
  int before;  // pairs of the row that other threads have before this one's
  int length;  // pairs of the row
  float lost;  // the mass that was cut
};

// Turns the weights of a thread's share into probabilities of what is kept.
template <class AnyTeam, class Share>
__device__ Kept probabilities(const AggregateNeighbors& op, int64_t most, Share& share) {
  const bool any_ends = share.ends(share.count() - 1) || share.token(0) != share.token(share.count() - 1);
  double total = 0, run = 0;
  if (most > 0) {  // or there are no neighbours; without a branch ptxas, too, would keep the float64 weights for the loop below
#pragma unroll
    for (int e = 0; e < share.count(); ++e) {
      const double weight = static_cast<double>(share.value(e));
      total += weight;
      run += weight;
      if (share.ends(e)) run = nearly_nothing(run);
    }
  }
  run = AnyTeam::before(OpenRun{run, any_ends}, OpenRun{0, 0}, [](OpenRun a, OpenRun b) { return merge(a, b); }).sum;
  total = AnyTeam::sum(total);
  const Reciprocal whole = reciprocal_of(total > 0 ? total : 1);
  constexpr double visible = 0x1.0000000000001p-150;  // the least that does not round to 0 in float32
  const double least = op.min_prob > visible ? op.min_prob : visible;
  const auto for_each = [&](const auto& f) {  // f(e, whether it ends a run, the run's probability)
    double sum = run;
    share.derive_anew();
#pragma unroll
    for (int e = 0; e < share.count(); ++e) {
      sum += static_cast<double>(share.value(e));
      const bool is_end = share.ends(e);
      f(e, is_end, quotient(sum, whole));
      if (is_end) sum = nearly_nothing(sum);
    }
  };
  double lost = 0;
  if (op.min_prob > visible)  // what is not visible is nothing to the residual, too
    for_each([&](int, bool is_end, double exact) { lost += is_end && exact < least ? exact : nearly_nothing(exact); });
  int kept = 0;
  for_each([&](int e, bool is_end, double exact) {
    const bool is_kept = is_end && exact >= least;
    share.set_value(e, is_kept ? static_cast<float>(exact) : 0);
    kept += is_kept;
  });
  int length = AnyTeam::sum(kept);
  if (length > most) {
    lost += cut_to<AnyTeam>(most, share);
    kept = 0;
#pragma unroll
    for (int e = 0; e < share.count(); ++e) kept += share.value(e) > 0;
    length = static_cast<int>(most);
  }
  lost = AnyTeam::sum(lost);
  return {AnyTeam::sum_before(kept), length, static_cast<float>(lost)};
}

// put(i, token, probability) for each pair of a thread's share, i counting the row's pairs.
template <class Share, class Put>
__device__ inline void for_each_kept(const Share& share, int before, const Put& put) {
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

// The next tile, for a whole block, and which one it is; read anew, it takes no registers in between.
struct Tile {
  int64_t number;
};
__device__ inline int64_t this_tile() { return static_cast<volatile Tile&>(shared<Tile>()).number; }
__device__ inline int64_t next_tile(Progress* progress) {
  __syncthreads();  // the number of the tile before may still be read
  if (threadIdx.x == 0) shared<Tile>().number = static_cast<int64_t>(atomicAdd(&progress->tiles_begun, Word{1}));
  __syncthreads();
  return this_tile();
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

template <int each>
__global__ void __launch_bounds__(tile_warps* warp_size, each == 32 ? wide_tiles : 8)
    rows_by_warps(AggregateNeighbors op, float scale, int64_t most, Progress* progress, Word* tiles) {
  using Share = RegisterShare<each>;
  using Warp = Team<warp_size>;
  constexpr int pitch = warp_size + 1;  // a word of padding after every 32 pairs: threads put theirs up to 32 apart
  constexpr bool by_squares = each == warp_size;
  struct alignas(16) Row {
    int32_t token[(by_squares ? square_pitch : pitch) * each];  // the square that is sorted, then token ids
    float number[pitch * each];                                 // weights by place, then probabilities
  };
  struct Scratch {
    Row row[tile_warps];
    int length[tile_warps];
    int64_t begin;
  };
  Scratch& scratch = shared<Scratch>();
  const int64_t rows = op.distances.count, k = op.distances.columns;
  const int warp = warp_of_thread(), lane = lane_of_thread();
  const auto row_of_warp = [=](int64_t tile) { return tile * tile_warps + warp; };
  float* const numbers = scratch.row[warp].number;
  int32_t* const tokens = scratch.row[warp].token;

  Kept kept{0, 0, 0};
  if (const int64_t r = row_of_warp(next_tile(progress)); r < rows) {
    Share share;
    float distance[each];
    int32_t token[each];
    with_distances(op, r, [&](const auto* row) { load_columns(row, k, INFINITY, distance, [](auto d) { return widened(d); }); });
    with_token_ids(op, r, [&](const auto* row) { load_columns(row, k, -1, token, [](auto id) { return in_32_bits(id); }); });
    const auto vocab_size = static_cast<uint32_t>(op.vocab_size);
    bool all_present = true;
    float finite = 0;  // or NaN
#pragma unroll
    for (int e = 0; e < each; ++e) {
      all_present &= static_cast<uint32_t>(token[e]) < vocab_size;
      finite = fmaf(distance[e], 0, finite);
    }
    if (!__all_sync(whole_warp, all_present && finite == 0)) {
      bool wrong = false;
#pragma unroll
      for (int e = 0; e < each; ++e) {
        wrong |= is_wrong(distance[e]) || static_cast<uint32_t>(token[e]) + 1 > vocab_size;
        const bool present = fabsf(distance[e]) < INFINITY && static_cast<uint32_t>(token[e]) < vocab_size;
        if (!present) distance[e] = INFINITY, token[e] = static_cast<int32_t>(Share::no_token());
      }
      if (wrong) note_wrong(op, r, progress);
    }

    float least = INFINITY;
#pragma unroll
    for (int e = 0; e < each; ++e) {
      least = fminf(least, distance[e]);
      share.key[e] = (static_cast<uint32_t>(token[e]) << Share::places_log2()) + static_cast<uint32_t>(e * warp_size + lane);
    }
    least = finite_least(reduce_warp(least, [](float a, float b) { return fminf(a, b); }));
#pragma unroll
    for (int e = 0; e < each; ++e) numbers[e * warp_size + lane] = weight_of(distance[e], least, scale);
    if constexpr (by_squares) {
      sort_in_warp(share.key, reinterpret_cast<uint32_t*>(tokens));
    } else {
      sort_in_warp(share.key);
    }
    __syncwarp();  // weights are read by other lanes than wrote them
#pragma unroll
    for (int e = 0; e < each; ++e) share.values[e] = numbers[share.key[e] % Share::places];
    share.next = __shfl_down_sync(whole_warp, share.key[0], 1);
    if (lane == warp_size - 1) share.next = ~0u;
    kept = probabilities<Warp>(op, most, share);
    __syncwarp();  // the weights are read no more
    for_each_kept(share, kept.before, [&](int i, int32_t id, float probability) {
      const uint32_t at = static_cast<uint32_t>(i) + static_cast<uint32_t>(i) / warp_size;
      tokens[at] = id;
      numbers[at] = probability;
    });
  }
  if (lane == 0) scratch.length[warp] = kept.length;
  __syncthreads();  // the lengths, and every warp's pairs, are there
  int before = 0, length = 0;
  for (int w = 0; w < tile_warps; ++w) {
    if (w == warp) before = length;
    length += scratch.length[w];
  }
  const int64_t tile = this_tile(), r = row_of_warp(tile);
  if (warp == 0) {
    const int64_t begin = begin_of_tile(tiles, tile, length);
    if (lane == 0) scratch.begin = begin;
  }
  __syncthreads();
  if (r >= rows) return;
  const int64_t begin = scratch.begin + before;
  int32_t* out_ids = op.out_ids + begin + lane;
  float* out_probs = op.out_probs + begin + lane;
  const int32_t* from_ids = tokens + lane;  // pair 32 · i + lane is i · pitch from here
  const float* from_probs = numbers + lane;
  int left = kept.length - lane;
  const auto copy = [&](auto at_once) {
#pragma unroll 1
    for (; left > (at_once - 1) * warp_size; left -= at_once * warp_size) {
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        out_ids[i * warp_size] = from_ids[i * pitch];
        out_probs[i * warp_size] = from_probs[i * pitch];
      }
      out_ids += at_once * warp_size, out_probs += at_once * warp_size;
      from_ids += at_once * pitch, from_probs += at_once * pitch;
    }
  };
  copy(std::integral_constant<int, 4>{});
  copy(std::integral_constant<int, 1>{});
  if (lane != 0) return;
  op.residual[r] = kept.lost;
  op.out_indptr[r + 1] = begin + kept.length;
  if (r == rows - 1) progress->pairs = static_cast<Word>(begin + kept.length);
}

// `memory`: n keys and n weights a block, or null for shared memory. n is a power of two, at least k and row_threads.
__global__ void __launch_bounds__(row_threads, 2)
    rows_by_blocks(AggregateNeighbors op, float scale, int64_t most, uint32_t n, unsigned char* memory, Progress* progress, Word* tiles) {
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
    least = finite_least(reduce_block<row_threads>(least, [](float a, float b) { return fminf(a, b); }));
    for (uint32_t place = threadIdx.x; place < n; place += row_threads) weights[place] = weight_of(weights[place], least, scale);
    sort_in_memory<row_threads>(keys, n);

    MemoryShare share{keys + threadIdx.x * (n / row_threads), static_cast<int>(n / row_threads), MemoryShare::no_token()};
    if (threadIdx.x != row_threads - 1) share.next = share.token(share.size);
    __syncthreads();  // everyone has read the next thread's token
    for (int e = 0; e < share.size; ++e) share.set_value(e, share.key[e] == ~uint64_t{0} ? 0 : weights[static_cast<uint32_t>(share.key[e])]);
    const Kept kept = probabilities<Block>(op, most, share);
    if (warp_of_thread() == 0) {
      const int64_t begin = begin_of_tile(tiles, r, kept.length);
      if (lane_of_thread() == 0) shared<Begin>().begin = begin;
    }
    __syncthreads();
    const int64_t begin = shared<Begin>().begin;
    for_each_kept(share, kept.before, [&](int i, int32_t token, float probability) {
      op.out_ids[begin + i] = token;
      op.out_probs[begin + i] = probability;
    });
    if (threadIdx.x != 0) continue;
    op.residual[r] = kept.lost;
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
  const float scale = finite_reciprocal(op.temperature);
  int64_t most = smaller(op.distances.columns, op.vocab_size);
  if (op.max_tokens > 0) most = smaller(most, op.max_tokens);
  auto* const workspace = static_cast<unsigned char*>(where.workspace);
  auto* const progress = reinterpret_cast<Progress*>(workspace);
  auto* const tiles = reinterpret_cast<Word*>(workspace + plan.tiles_at);
  launch(begin, larger(1, (plan.tiles + block_threads - 1) / block_threads), block_threads, 0, device.stream, op.out_indptr, progress,
         tiles, plan.tiles);
  if (plan.tiles > 0) {
    const auto by_warps = [&](auto kernel) {
      launch(kernel, plan.blocks, tile_warps * warp_size, 0, device.stream, op, scale, most, progress, tiles);
    };
    switch (plan.each) {
      case 2: by_warps(rows_by_warps<2>); break;
      case 8: by_warps(rows_by_warps<8>); break;
      case 32: by_warps(rows_by_warps<32>); break;
      default: {
        const size_t shared_bytes = plan.is_shared ? static_cast<size_t>(plan.row_bytes) : 0;
        cudaFuncSetAttribute(rows_by_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        launch(rows_by_blocks, plan.blocks, row_threads, shared_bytes, device.stream, op, scale, most, static_cast<uint32_t>(plan.n),
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
