// aggregate_neighbors: q(v) ∝ Σ over the neighbours i of 1[v = tokenᵢ]·exp(−dᵢ/T), as sorted sparse rows.
//
// A row, all of it in the first-level cache:
//   1. the least distance, and whether anything is absent, out of range or not a number
//   2. weights exp((least − d)/T): the largest is 1, so that their sum neither overflows nor vanishes
//   3. the weights of each token summed, in the order of its neighbours, in float64, and the tokens put in order: either
//      a. a table with a sum for every token of the vocabulary, and a bit that says which were touched: little work, but the table
//         must be worth its making, and fit the second-level cache; or
//      b. (token, place) packed into one integer and sorted by token, stably, and runs of equal tokens summed
//      which give the same bits
//   4. divided by the total; cut by min_prob and by max_tokens
// Rows are done in chunks. A chunk that is done waits for the one before it to say where it ends, and is copied behind it: the
// outputs are written once, without gaps, and no second pass over them is needed.
//
// Traffic: distances and token ids are read once, outputs written once.
#include <type_traits>

#include "cpu/pages.h"
#include "cpu/rows.h"
#include "cpu/select.h"

namespace memdec::MEMDEC_LEVEL {

namespace {

constexpr int64_t chunk_rows = 16;

// For every token of the vocabulary what a row has of it; zeros between rows.
struct Table {
  double* sums;        // (V)
  uint64_t* occurring;  // (V / 64) a bit a token
};

// The words of Table::occurring, a whole number of 64.
inline int64_t words_of(int64_t vocab_size) { return (vocab_size + 64 * 64 - 1) / (64 * 64) * 64; }

// What one row needs while it is worked on. E packs a token above a place: 32 bits where both fit, else 64.
template <class A, class E>
struct Workspace {
  A* weight;         // (k + vector) by place
  E* keys;           // (k)
  E* sorted;         // (k)
  Table table;       // its sums null: rows are sorted
  double* sum;       // (k) by distinct token
  uint64_t* ranked;  // (k + slack), for max_tokens
  uint64_t* spare;   // (k + slack)
  int32_t* tokens;   // (chunk_rows · most) the chunk's output
  float* probs;
};

// An upper bound of a row's places for `token`, and of the passes that sort them.
struct Packing {
  int token_bits;
  int place_bits;
  int passes;
  int digit_bits;
};

inline int bits_for(int64_t count) {  // of the numbers below count
  int bits = 1;
  while (bits < 62 && (int64_t{1} << bits) < count) ++bits;
  return bits;
}

#if defined(MEMDEC_LEVEL_IS_avx512)
// Sorts keys by their token, stably: a partition by one bit a pass, sixteen keys at a time. Unlike counters it does not slow
// down where most neighbours agree on the token. May write 16 keys beyond the last.
inline uint32_t* sort_by_token(uint32_t* keys, uint32_t* spare, int64_t n, const Packing& packing) {
  const __m512i one = _mm512_set1_epi32(1);
  for (int bit = packing.place_bits; bit < packing.place_bits + packing.token_bits; ++bit) {
    const __m512i mask = _mm512_slli_epi32(one, static_cast<unsigned>(bit));
    int64_t zeros = 0, ones = 0;
    for (int64_t i = 0; i < n; i += 16) {  // zeros ≤ i: what is overwritten has been read
      const __m512i some = _mm512_loadu_si512(keys + i);
      const __mmask16 valid = n - i < 16 ? low_lanes(n - i) : static_cast<__mmask16>(0xffff);
      const __mmask16 set = _mm512_mask_test_epi32_mask(valid, some, mask);
      const __mmask16 clear = static_cast<__mmask16>(valid & ~set);
      _mm512_storeu_si512(keys + zeros, _mm512_maskz_compress_epi32(clear, some));
      _mm512_storeu_si512(spare + ones, _mm512_maskz_compress_epi32(set, some));
      zeros += __builtin_popcount(clear);
      ones += __builtin_popcount(set);
    }
    for (int64_t i = 0; i < ones; i += 16) _mm512_storeu_si512(keys + zeros + i, _mm512_loadu_si512(spare + i));
  }
  return keys;
}
#endif

// Sorts keys by their token, stably. Either array holds the result, which is returned.
template <class E>
inline E* sort_by_token(E* from, E* to, int64_t n, const Packing& packing) {
  uint32_t place[512];
  const E mask = (E{1} << packing.digit_bits) - 1;
  for (int pass = 0; pass < packing.passes; ++pass) {
    const int shift = packing.place_bits + pass * packing.digit_bits;
    for (int64_t d = 0; d <= static_cast<int64_t>(mask); ++d) place[d] = 0;
    for (int64_t i = 0; i < n; ++i) ++place[from[i] >> shift & mask];
    uint32_t begin = 0;
    for (int64_t d = 0; d <= static_cast<int64_t>(mask); ++d) {
      const uint32_t count = place[d];
      place[d] = begin;
      begin += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      const E key = from[i];
      to[place[key >> shift & mask]++] = key;
    }
    E* const swap = from;
    from = to;
    to = swap;
  }
  return from;
}

// 1. The least distance of present neighbours. `plain` is false where the row has anything that is absent or wrong.
template <class T, class I>
inline accumulator_t<T> least_distance(const T* distances, const I* tokens, int64_t k, int64_t vocab_size, bool& plain) {
  using V = vec_t<T>;
  using A = typename V::scalar;
  const V infinity = broadcast<V>(static_cast<A>(INFINITY));
  V least[2] = {infinity, infinity};
  V sum = broadcast<V>(0);  // of d·0: 0 where all are finite, else NaN
  const V zero = broadcast<V>(0);
  int64_t i = 0;
  for (; i + 2 * V::width <= k; i += 2 * V::width)
    for (int u = 0; u < 2; ++u) {
      const V d = load(distances + i + u * V::width);
      least[u] = min(d, least[u]);
      sum = fma(d, zero, sum);
    }
  for (; i < k; i += V::width) {
    const int64_t n = smaller(V::width, k - i);
    const V d = n == V::width ? load(distances + i) : load_some(distances + i, n, static_cast<A>(0));
    sum = fma(d, zero, sum);
    const V padded = n == V::width ? d : load_some(distances + i, n, static_cast<A>(INFINITY));
    least[0] = min(padded, least[0]);
  }
  uint32_t outside = 0;
  using U = std::make_unsigned_t<I>;
  const U limit = static_cast<U>(vocab_size);
  for (int64_t j = 0; j < k; ++j) outside |= static_cast<U>(tokens[j]) >= limit;
  plain = outside == 0 && reduce_add(sum) == 0;
  return -reduce_max(zero - min(least[0], least[1]));
}

// x, or 0 where `drop`: no branch, and nothing that x waits for.
inline double unless(bool drop, double x) {
#if defined(MEMDEC_LEVEL_IS_avx512) || defined(MEMDEC_LEVEL_IS_avx2)
  const __m128i mask = _mm_cvtsi64_si128(static_cast<int64_t>(drop) - 1);
  return _mm_cvtsd_f64(_mm_and_pd(_mm_set_sd(x), _mm_castsi128_pd(mask)));
#else
  return drop ? 0.0 : x;
#endif
}

// 3a. The sum of the weights of each token, and the token; returns how many tokens there are. The table is zeros before and
// after. token_of(i) is the token of neighbour i. May write 4 tokens beyond the last.
template <class A, class F>
__attribute__((noinline)) int64_t sum_in_table(const F& token_of, const A* weight, int64_t n, int64_t vocab_size, const Table& table,
                                               double* sum, int32_t* tokens) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t token = token_of(i);
    table.sums[token] += static_cast<double>(weight[i]);
    table.occurring[token / 64] |= uint64_t{1} << token % 64;
  }
  int64_t distinct = 0;
  for (int64_t first = 0; first < words_of(vocab_size); first += 64)
    for (uint64_t some = nonzero_words(table.occurring + first); some != 0; some &= some - 1) {
      const uint64_t word = static_cast<uint64_t>(first) + lowest_bit(some);
      const uint64_t base = 64 * word;
      uint64_t set = table.occurring[word];
      table.occurring[word] = 0;
      int32_t* to = tokens + distinct;
      distinct += __builtin_popcountll(set);
      do {  // four at a time whether there are so many or not: how many there are nobody can predict
        uint64_t pair[2];
        for (uint64_t& two : pair) {
          const uint64_t low = lowest_bit(set);
          set &= set - 1;
          two = (base << 32 | base) + (lowest_bit(set) << 32 | low);
          set &= set - 1;
        }
        __builtin_memcpy(to, pair, sizeof(pair));
        to += 4;
      } while (set != 0);
    }
  for (int64_t i = 0; i < distinct; ++i) {
    sum[i] = table.sums[tokens[i]];
    table.sums[tokens[i]] = 0;
  }
  return distinct;
}

// 3b. The sum of the weights of each run of one token, and the token; returns how many runs. No branch on "another token": it
// would be mispredicted at every other neighbour. A sum waits for the one before it, so two stretches that meet where a run ends
// are gone through side by side. A function of its own, because its loop needs every register.
template <class A, class E>
__attribute__((noinline)) int64_t sum_runs(const E* sorted, const A* weight, int64_t n, int place_bits, double* sum, int32_t* tokens) {
  const E places = (E{1} << place_bits) - 1;
  int64_t middle = n / 2;
  while (middle > 0 && middle < n && (sorted[middle] ^ sorted[middle - 1]) <= places) ++middle;
  const auto add = [&](int64_t i, int64_t& at, E& before, double& run) {
    const E key = sorted[i];
    const bool another = (key ^ before) > places;
    at += another;
    run = unless(another, run) + static_cast<double>(weight[key & places]);
    sum[at] = run;
    tokens[at] = static_cast<int32_t>(key >> place_bits);
    before = key;
  };
  int64_t low = -1, high = middle - 1;
  E before_low = ~sorted[0], before_high = middle < n ? ~sorted[middle] : 0;
  double run_low = 0, run_high = 0;
  const int64_t together = smaller(middle, n - middle);
  for (int64_t i = 0; i < together; ++i) {
    add(i, low, before_low, run_low);
    add(middle + i, high, before_high, run_high);
  }
  for (int64_t i = together; i < middle; ++i) add(i, low, before_low, run_low);
  for (int64_t i = middle + together; i < n; ++i) add(i, high, before_high, run_high);
  int64_t distinct = low + 1;
  for (int64_t i = middle; i <= high; ++i, ++distinct) {
    tokens[distinct] = tokens[i];
    sum[distinct] = sum[i];
  }
  return distinct;
}

template <class T, class I, class E>
struct Kernel {
  using A = accumulator_t<T>;
  using V = vec_t<T>;

  const AggregateNeighbors& op;
  const Packing packing;
  int64_t most;  // pairs a row can give
  int64_t first_bad_distance;  // flat positions, −1: none; the lowest, whichever thread comes first
  int64_t first_bad_token;

  static void note(int64_t& lowest, int64_t position) {
    int64_t seen = __atomic_load_n(&lowest, __ATOMIC_RELAXED);
    while ((seen < 0 || position < seen) &&
           !__atomic_compare_exchange_n(&lowest, &seen, position, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  // 1 / T, kept from overflowing and vanishing: 0 · inf, the nearest neighbour's exponent, would be NaN.
  static A finite_reciprocal(double temperature) {
    constexpr double highest = sizeof(A) == sizeof(float) ? 3e38 : 1e308;
    const double exact = 1 / temperature;
    return static_cast<A>(exact > highest ? highest : exact < 1 / highest ? 1 / highest : exact);
  }

  // Writes row r's pairs to tokens and probs; returns how many.
  int64_t row(int64_t r, Workspace<A, E>& work, int32_t* tokens, float* probs) {
    const T* const distances = row_of<const T>(op.distances, r);
    const I* const ids = static_cast<const I*>(op.token_ids) + r * op.token_ids_stride;
    const int64_t k = op.distances.columns;
    bool plain;
    A least = least_distance(distances, ids, k, op.vocab_size, plain);
    const A scale = finite_reciprocal(op.temperature);

    // 2. and 3.: weights by place, and keys in the order of the neighbours.
    int64_t present = 0;
    if (plain) {
      present = k;
      for (int64_t i = 0; !work.table.sums && i < k; ++i) work.keys[i] = static_cast<E>(static_cast<E>(ids[i]) << packing.place_bits | static_cast<E>(i));
      weigh(distances, k, least, scale, work.weight);
    } else {
      least = static_cast<A>(INFINITY);
      for (int64_t i = 0; i < k; ++i) {
        const A d = static_cast<A>(to_float(distances[i]));
        const int64_t token = static_cast<int64_t>(ids[i]);
        if (!(d > static_cast<A>(-INFINITY))) {
          note(first_bad_distance, r * k + i);
          continue;
        }
        if (token < -1 || token >= op.vocab_size) {
          note(first_bad_token, r * k + i);
          continue;
        }
        if (token < 0 || d == static_cast<A>(INFINITY)) continue;
        work.keys[present] = static_cast<E>(static_cast<E>(token) << packing.place_bits | static_cast<E>(present));
        work.weight[present] = d;
        least = d < least ? d : least;
        ++present;
      }
      weigh(work.weight, present, least, scale, work.weight);
    }
    if (present == 0) return 0;
    int64_t distinct;
    if (work.table.sums) {
      const auto with = [&](const auto& token_of) {
        return sum_in_table(token_of, work.weight, present, op.vocab_size, work.table, work.sum, tokens);
      };
      distinct = plain ? with([&](int64_t i) { return static_cast<uint32_t>(ids[i]); })
                       : with([&](int64_t i) { return static_cast<uint32_t>(work.keys[i] >> packing.place_bits); });
    } else {
      const E* const sorted = sort_by_token(work.keys, work.sorted, present, packing);
      distinct = sum_runs(sorted, work.weight, present, packing.place_bits, work.sum, tokens);
    }
    double part[8] = {};
    int64_t i = 0;
    for (; i + 8 <= distinct; i += 8)
      for (int u = 0; u < 8; ++u) part[u] += work.sum[i + u];
    for (; i < distinct; ++i) part[0] += work.sum[i];
    const double total = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    const double norm = 1 / total;
    for (i = 0; i < distinct; ++i) probs[i] = static_cast<float>(work.sum[i] * norm);
    VecF lowest = broadcast<VecF>(1.0f);
    for (i = 0; i + VecF::width <= distinct; i += VecF::width) lowest = min(load(probs + i), lowest);
    if (i < distinct) lowest = min(load_some(probs + i, distinct - i, 1.0f), lowest);
    const float least_kept = -reduce_max(broadcast<VecF>(0.0f) - lowest);
    op.residual[r] = 0;
    // A float32 may have been rounded over min_prob: near it, cut() decides in float64.
    if (least_kept > 0 && static_cast<double>(least_kept) > op.min_prob * (1 + 1e-6) && distinct <= most) return distinct;
    return cut(r, work, tokens, probs, distinct, total);
  }

  // Asks for a row of input that will be read next: it arrives while the row before it is worked on.
  void fetch(int64_t r) const {
    const char* const distances = reinterpret_cast<const char*>(row_of<const T>(op.distances, r));
    const char* const ids = reinterpret_cast<const char*>(static_cast<const I*>(op.token_ids) + r * op.token_ids_stride);
    const int64_t k = smaller(op.distances.columns, 4096);  // no more than the cache holds
    for (int64_t byte = 0; byte < k * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(distances + byte, 0, 2);
    for (int64_t byte = 0; byte < k * static_cast<int64_t>(sizeof(I)); byte += 64) __builtin_prefetch(ids + byte, 0, 2);
  }

  // Drops what is zero, below min_prob or not among the max_tokens most probable; of equals, the higher ids go first.
  int64_t cut(int64_t r, Workspace<A, E>& work, int32_t* tokens, float* probs, int64_t distinct, double total) {
    uint64_t last = ~uint64_t{0};
    const auto rank = [&](int64_t i) { return key_of(~bits_of_float(probs[i]), static_cast<uint32_t>(i)); };
    if (distinct > most) {
      for (int64_t i = 0; i < distinct; ++i) work.ranked[i] = rank(i);
      last = select_smallest(work.ranked, distinct, most, work.spare);
    }
    int64_t kept = 0;
    double mass_cut = 0;
    for (int64_t i = 0; i < distinct; ++i) {
      const double probability = work.sum[i] / total;
      if (probs[i] > 0 && probability >= op.min_prob && rank(i) <= last) {
        tokens[kept] = tokens[i];
        probs[kept] = probs[i];
        ++kept;
      } else {
        mass_cut += probability;
      }
    }
    op.residual[r] = static_cast<float>(mass_cut);
    return kept;
  }

  template <class S>
  static void weigh(const S* distances, int64_t n, A least, A scale, A* weight) {
    const V from = broadcast<V>(least);
    const V by = broadcast<V>(scale);
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) store(weight + i, exp((from - load(distances + i)) * by));
    if (i < n) store_some(weight + i, exp((from - load_some(distances + i, n - i, least)) * by), n - i);
  }
};

// Memory for `count` elements of a workspace, from a block that is large enough.
template <class P>
inline P* take(char*& block, int64_t count) {
  P* const result = reinterpret_cast<P*>(block);
  block += (static_cast<int64_t>(sizeof(P)) * count + 63) / 64 * 64;
  return result;
}

// Whether a thread that has `neighbours` to add up should do so in a table of the whole vocabulary: where that pays for
// clearing it once, and it stays in the cache.
inline bool table_is_worth_it(int64_t neighbours, int64_t vocab_size) {
  return vocab_size <= 1 << 19 && neighbours >= 2 * vocab_size;
}

template <class T, class I, class E>
inline Status aggregate(const AggregateNeighbors& op, const Packing& packing, int most_threads) {
  using K = Kernel<T, I, E>;
  using A = typename K::A;
  const int64_t rows = op.distances.count;
  const int64_t k = op.distances.columns;
  int64_t most = smaller(k, op.vocab_size);
  if (op.max_tokens > 0) most = smaller(most, op.max_tokens);
  K kernel{op, packing, most, -1, -1};
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const int threads = static_cast<int>(smaller(threads_for(rows * k, most_threads), chunks));

  // A chunk's rows are worked on in its own output, so the last of them may need room for k.
  const int64_t room = k + 32;  // a few vectors may be written in full
  const int64_t chunk_room = (chunk_rows - 1) * most + room;
  const bool with_table = table_is_worth_it(rows * k / threads, op.vocab_size);
  const int64_t words = with_table ? words_of(op.vocab_size) : 0;
  const int64_t bytes = room * static_cast<int64_t>(sizeof(A) + 2 * sizeof(E) + sizeof(double) + 2 * sizeof(uint64_t)) +
                        chunk_room * static_cast<int64_t>(sizeof(int32_t) + sizeof(float)) +
                        words * static_cast<int64_t>(64 * sizeof(double) + sizeof(uint64_t)) + 10 * 64;
  prefer_large_pages(op.out_ids, static_cast<int64_t>(sizeof(int32_t)) * rows * most);
  prefer_large_pages(op.out_probs, static_cast<int64_t>(sizeof(float)) * rows * most);
  const Scratch<char> memory(bytes * threads + 64);
  const Scratch<int64_t> ends(chunks + 1);  // where each chunk's pairs begin; −1 until that is known
  ends[0] = 0;
  for (int64_t c = 1; c <= chunks; ++c) ends[c] = -1;
  int64_t next_chunk = 0;

  // Each thread takes the next chunk until there are none. A chunk waits only for those before it, which other threads have
  // already begun: somebody can always go on.
  parallel(threads, 1, threads, [&](int64_t slot, int64_t) {
    char* block = memory.data + slot * bytes;
    block += 64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(block) % 64);
    Workspace<A, E> work{};
    work.weight = take<A>(block, room);
    work.keys = take<E>(block, room);
    work.sorted = take<E>(block, room);
    work.sum = take<double>(block, room);
    work.ranked = take<uint64_t>(block, room);
    work.spare = take<uint64_t>(block, room);
    work.tokens = take<int32_t>(block, chunk_room);
    work.probs = take<float>(block, chunk_room);
    if (with_table) {
      work.table = {take<double>(block, 64 * words), take<uint64_t>(block, words)};
      __builtin_memset(work.table.sums, 0, sizeof(double) * static_cast<size_t>(64 * words));
      __builtin_memset(work.table.occurring, 0, sizeof(uint64_t) * static_cast<size_t>(words));
    }
    for (;;) {
      const int64_t chunk = __atomic_fetch_add(&next_chunk, 1, __ATOMIC_RELAXED);
      if (chunk >= chunks) return;
      const int64_t first = chunk * chunk_rows;
      const int64_t last = smaller(rows, first + chunk_rows);
      int64_t lengths[chunk_rows];
      int64_t pairs = 0;
      for (int64_t r = first; r < last; ++r) {
        if (r + 1 < rows) kernel.fetch(r + 1);
        op.residual[r] = 0;
        lengths[r - first] = kernel.row(r, work, work.tokens + pairs, work.probs + pairs);
        pairs += lengths[r - first];
      }
      int64_t begin;
      wait_until([&] { return (begin = __atomic_load_n(&ends[chunk], __ATOMIC_ACQUIRE)) >= 0; });
      __atomic_store_n(&ends[chunk + 1], begin + pairs, __ATOMIC_RELEASE);
      stream(op.out_ids + begin, work.tokens, static_cast<int64_t>(sizeof(int32_t)) * pairs);
      stream(op.out_probs + begin, work.probs, static_cast<int64_t>(sizeof(float)) * pairs);
      for (int64_t r = first; r < last; ++r) {
        op.out_indptr[r] = begin;
        begin += lengths[r - first];
      }
      streamed();
    }
  });
  op.out_indptr[rows] = ends[chunks];
  if (kernel.first_bad_distance >= 0)
    return {.code = Status::bad_number, .argument = "distances", .at = kernel.first_bad_distance};
  if (kernel.first_bad_token >= 0) {
    const int64_t at = kernel.first_bad_token;
    const I* const ids = static_cast<const I*>(op.token_ids) + at / k * op.token_ids_stride;
    return {.code = Status::bad_index, .argument = "token_ids", .at = at, .got = static_cast<int64_t>(ids[at % k]), .wanted = op.vocab_size};
  }
  return {};
}

}  // namespace

Status aggregate_neighbors(const AggregateNeighbors& op, const Launch& launch) {
  const int token_bits = bits_for(op.vocab_size);
  Packing packing;
  packing.token_bits = token_bits;
  packing.place_bits = bits_for(op.distances.columns);
  packing.passes = (token_bits + 8) / 9;
  packing.digit_bits = (token_bits + packing.passes - 1) / packing.passes;
  const bool narrow_keys = token_bits + packing.place_bits <= 32;
  Status status;
  const Status dtype = with_dtype(op.distances.dtype, "distances", [&]<class T>(T) {
    const auto with_ids = [&]<class I>(I) {
      status = narrow_keys ? aggregate<T, I, uint32_t>(op, packing, launch.threads) : aggregate<T, I, uint64_t>(op, packing, launch.threads);
    };
    if (op.wide_ids) {
      with_ids(int64_t{});
    } else {
      with_ids(int32_t{});
    }
  });
  return dtype.code != Status::ok ? dtype : status;
}

}  // namespace memdec::MEMDEC_LEVEL
