// What the sampling ops share: a token drawn by Gumbel-max from a row of scores, in one step or in two (core/noise.h), and what
// transformers' warpers keep of a row.
#pragma once

#include "cpu/mixture.h"
#include "cpu/noise.h"

namespace memdec::MEMDEC_LEVEL {

static_assert(block_columns == draw_columns, "the states of a row's blocks are what one of them is drawn by");

// What is done to log-probs before a draw, as transformers defines it and in its order.
struct Warpers {
  double temperature;
  int64_t top_k;
  double top_p, min_p;

  bool cut() const { return top_k > 0 || top_p < 1 || min_p > 0; }
  bool none() const { return !cut() && temperature == 1; }
};

// The key and the counter of row r, for an op with the fields of InterpolateSample.
template <class Op>
inline uint64_t seed_of(const Op& op, int64_t r) {
  const uint64_t seed = op.seeds ? static_cast<uint64_t>(op.seeds[r * op.seeds_stride]) : op.seed;
  return op.seeds_stride == 0 ? seed + static_cast<uint64_t>(r) * golden : seed;
}
template <class Op>
inline uint64_t offset_of(const Op& op, int64_t r) {
  return op.offsets ? static_cast<uint64_t>(op.offsets[r * op.offsets_stride]) : op.offset;
}

template <class A>
struct Best {
  A score = static_cast<A>(-INFINITY);
  int64_t token = -1;
};

template <class A>
inline bool is_finite(A x) {
  return x - x == 0;
}
inline float below(float x) { return ::nextafterf(x, -INFINITY); }
inline double below(double x) { return ::nextafter(x, -INFINITY); }

// The largest of n elements; NaN where there is one.
template <class T>
inline accumulator_t<T> largest(const T* z, int64_t n) {
  using V = vec_t<T>;
  using A = accumulator_t<T>;
  const V zero = broadcast<V>(0), one = broadcast<V>(1);
  V high = broadcast<V>(static_cast<A>(-INFINITY)), broken = zero;
  for_each_vector(z, z, n, [&](int64_t, int64_t, V x, V) {
    high = max(x, high);
    broken = select(equal(x, x), broken, one);
  });
  return any(less(zero, broken)) ? static_cast<A>(NAN) : reduce_max(high);
}

// The best z(v) − top + g(v) among n tokens from `begin` on, where it exceeds `best`. No NaN; top is finite.
//
// As E ≥ u, noise −log E above some x needs a draw u below exp(−x). Most vectors hold no draw that small, and no logarithm is
// taken for them.
template <class T>
inline void take_best(const T* z, int64_t n, int64_t begin, accumulator_t<T> top, uint64_t seed, uint64_t offset,
                      Best<accumulator_t<T>>& best, Stream stream) {
  using V = vec_t<T>;
  const V shift = broadcast<V>(top);
  uint32_t draw[noise_columns];
  for (int64_t part = 0; part < n; part += noise_columns) {
    const int64_t count = smaller(noise_columns, n - part);
    const double part_top = static_cast<double>(largest(z + part, count) - top);
    // The draw from which on a token of this part cannot win; the margin is for the rounding of scores.
    const auto useless_from = [&] {
      const double u = ::exp(part_top - static_cast<double>(best.score) + 1e-4);
      return u < 0.99 ? static_cast<uint32_t>(u * 0x1p32) + 1 : 0xffffffffu;
    };
    if (part_top + largest_gumbel < static_cast<double>(best.score)) continue;
    uint32_t limit = useless_from();
    draws_of_range(seed, offset, begin + part, count, draw, stream);
    for_each_vector(z + part, z + part, count, [&](int64_t i, int64_t, V logit, V) {
      uint32_t least = draw[i];
      for (int j = 1; j < V::width; ++j) least = least < draw[i + j] ? least : draw[i + j];
      if (least > limit) return;
      const V score = (logit - shift) + gumbel<V>(draw + i);
      if (!any(less(broadcast<V>(best.score), score))) return;
      best.score = reduce_max(score);
      best.token = begin + part + i + first(equal(score, broadcast<V>(best.score)));
      limit = useless_from();
    });
  }
}

// The draw from a whole row; −1 where there is a NaN, a +inf or nothing but −inf.
template <class T>
inline int64_t draw_row(const T* z, int64_t columns, uint64_t seed, uint64_t offset, Stream stream) {
  const auto top = largest(z, columns);
  Best<accumulator_t<T>> best;
  if (is_finite(top)) take_best(z, columns, 0, top, seed, offset, best, stream);
  return best.token;
}

// Tokens and their scores, in the order in which they were added until sort(): ascending scores, equals as they were. A
// least-significant-digit radix sort, 11 bits at a time, of keys whose order as integers is the order of the scores.
template <class A>
struct Candidates {
  using Key = decltype([] {
    if constexpr (sizeof(A) == 4) return uint32_t{};
    else return uint64_t{};
  }());
  static constexpr int digit_bits = 11, bins = 1 << digit_bits;

  const Scratch<Key> keys;
  const Scratch<int32_t> tokens;
  int64_t count = 0;
  explicit Candidates(int64_t capacity) : keys(2 * capacity), tokens(2 * capacity), spare(capacity) {}

  static Key key_of(A score) {
    Key bits;
    score += 0;  // −0 is 0
    __builtin_memcpy(&bits, &score, sizeof bits);
    const Key sign = Key{1} << (8 * sizeof(Key) - 1);
    return bits & sign ? ~bits : bits | sign;
  }
  A score(int64_t i) const {
    const Key sign = Key{1} << (8 * sizeof(Key) - 1);
    const Key bits = keys[i] & sign ? keys[i] ^ sign : ~keys[i];
    A score;
    __builtin_memcpy(&score, &bits, sizeof score);
    return score;
  }
  void add(A score, int32_t token) {
    keys[count] = key_of(score);
    tokens[count++] = token;
  }
  void sort() {
    Key *from = keys.data, *to = keys.data + spare;
    int32_t *token_from = tokens.data, *token_to = tokens.data + spare;
    for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += digit_bits) {
      int64_t position[bins] = {};
      for (int64_t i = 0; i < count; ++i) ++position[(from[i] >> shift) % bins];
      int64_t sum = 0;
      for (int64_t& p : position) {
        const int64_t here = p;
        p = sum;
        sum += here;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = position[(from[i] >> shift) % bins]++;
        to[at] = from[i];
        token_to[at] = token_from[i];
      }
      Key* const key = from;
      from = to, to = key;
      int32_t* const token = token_from;
      token_from = token_to, token_to = token;
    }
    if (from == keys.data) return;
    __builtin_memcpy(keys.data, from, sizeof(Key) * static_cast<size_t>(count));
    __builtin_memcpy(tokens.data, token_from, sizeof(int32_t) * static_cast<size_t>(count));
  }

  double weight(int64_t i, A top) const { return ::exp(static_cast<double>(score(i)) - static_cast<double>(top)); }

  // From the least score up, drops candidates while the running sum of exp(score − top), `whole` less that of all candidates
  // to begin with, is at most share · whole; the last stays. Only those that fall into the bin of scores where that ends are
  // sorted: what is left is in no order.
  void cut_below(double share, double whole, A top) {
    constexpr int scores_bins = 512;
    constexpr double bins_a_unit = 16;
    const auto bin_of = [&](int64_t i) {
      const double below_top = (static_cast<double>(top) - static_cast<double>(score(i))) * bins_a_unit;
      return below_top < scores_bins - 1 ? static_cast<int>(below_top) : scores_bins - 1;
    };
    double mass[scores_bins] = {}, left = 0;
    for (int64_t i = 0; i < count; ++i) mass[bin_of(i)] += weight(i, top);
    for (const double m : mass) left += m;
    if (whole < left) whole = left;
    double running = whole - left;
    int edge = scores_bins - 1;
    while (edge > 0 && running + mass[edge] <= share * whole) running += mass[edge--];
    int64_t above = 0, within = 0;
    for (int64_t i = 0; i < count; ++i) within += bin_of(i) == edge;
    Candidates edges(within);
    for (int64_t i = 0; i < count; ++i) {
      const int bin = bin_of(i);
      if (bin == edge) edges.add(score(i), tokens[i]);
      if (bin >= edge) continue;
      keys[above] = keys[i];
      tokens[above++] = tokens[i];
    }
    edges.sort();
    int64_t least = 0;
    const int64_t most = edges.count - (above == 0);  // the last of all stays
    while (least < most && (running += edges.weight(least, top)) <= share * whole) ++least;
    count = above;
    for (int64_t i = least; i < edges.count; ++i) {
      keys[count] = edges.keys[i];
      tokens[count++] = edges.tokens[i];
    }
  }

 private:
  int64_t spare;
};

// A score that no token which is kept can lie below.
//   top_k   the k-th largest of the maxima of groups of 64 tokens: k groups have a token that reaches it
//   top_p   all tokens with less than (1 − top_p) / V of the likeliest one's probability hold less than 1 − top_p together
//   min_p   its own bound
template <class A>
inline A bound_of_kept(const A* scores, int64_t columns, A top, const Warpers& warpers) {
  if (warpers.top_k > 0) {
    constexpr int64_t group = 64;
    const int64_t groups = (columns + group - 1) / group;
    if (warpers.top_k > groups) return static_cast<A>(-INFINITY);
    Candidates<A> maxima(groups);
    for (int64_t g = 0; g < groups; ++g)
      maxima.add(largest(scores + g * group, smaller(group, columns - g * group)), static_cast<int32_t>(g));
    maxima.sort();
    return maxima.score(groups - warpers.top_k);
  }
  // The margin is for the rounding of scores and sums: what it lets through is cut exactly later.
  const double share = warpers.top_p < 1 ? (1 - warpers.top_p) / static_cast<double>(columns) : warpers.min_p;
  return static_cast<A>(static_cast<double>(top) + ::log(share) - 1e-2);
}

// Fills `kept` with tokens of a row of scores whose largest is `top`, so that what top_k and top_p keep is kept[least …], and
// returns `least`. What min_p keeps of them has at least the score floor_of(top, warpers).
template <class A>
inline int64_t keep(const A* scores, int64_t columns, A top, const Warpers& warpers, Candidates<A>& kept) {
  using V = vec_t<A>;
  const A under = below(bound_of_kept(scores, columns, top, warpers));
  double whole = 0;  // Σ exp(score − top) over all tokens: what top_p is a share of, where top_k takes no part
  const bool needs_whole = warpers.top_p < 1 && warpers.top_k == 0;
  for (int64_t begin = 0; begin < columns; begin += block_columns) {
    V sum = broadcast<V>(0);
    for_each_vector(scores + begin, scores + begin, smaller(block_columns, columns - begin), [&](int64_t i, int64_t lanes, V s, V) {
      if (needs_whole) sum = sum + exp(s - broadcast<V>(top));
      if (!any(less(broadcast<V>(under), s))) return;
      for (int64_t j = begin + i; j < begin + i + lanes; ++j)
        if (scores[j] > under) kept.add(scores[j], static_cast<int32_t>(j));
    });
    whole += static_cast<double>(reduce_add(sum));
  }
  int64_t least = 0;  // kept[least …] in sorted order are left
  if (needs_whole) kept.cut_below(1 - warpers.top_p, whole, top);
  else if (warpers.top_k > 0) kept.sort();
  if (warpers.top_k > 0 && warpers.top_k < kept.count) {
    least = kept.count - warpers.top_k;
    while (least > 0 && kept.score(least - 1) == kept.score(least)) --least;
  }
  if (warpers.top_p < 1 && !needs_whole) {
    double total = 0, running = 0;
    for (int64_t i = least; i < kept.count; ++i) total += kept.weight(i, top);
    while (least < kept.count - 1 && (running += kept.weight(least, top)) <= (1 - warpers.top_p) * total) ++least;
  }
  return least;
}

template <class A>
inline A floor_of(A top, const Warpers& warpers) {
  return warpers.min_p > 0 ? static_cast<A>(static_cast<double>(top) + ::log(warpers.min_p)) : static_cast<A>(-INFINITY);
}

// The token drawn from what the warpers keep of a row of scores; −1 where there is a NaN or nothing but −inf.
template <class A>
inline int64_t draw_warped(const A* scores, int64_t columns, uint64_t seed, uint64_t offset, const Warpers& warpers) {
  constexpr int64_t width = vec_t<A>::width;
  const A top = largest(scores, columns);
  if (!is_finite(top)) return -1;
  Candidates<A> kept(columns);
  const int64_t least = keep(scores, columns, top, warpers, kept);
  const A floor = floor_of(top, warpers);
  Best<A> best;
  uint32_t draw[noise_columns + width] = {};
  A noise[width];
  for (int64_t begin = least; begin < kept.count; begin += noise_columns) {
    const int64_t n = smaller(noise_columns, kept.count - begin);
    draws_of_tokens(seed, offset, kept.tokens.data + begin, n, draw);
    for (int64_t i = 0; i < n; ++i) {
      if (i % width == 0) store(noise, gumbel<vec_t<A>>(draw + i));
      const A score = kept.score(begin + i);
      const A value = score + noise[i % width];
      const int64_t token = kept.tokens[begin + i];
      if (score >= floor && (value > best.score || (value == best.score && token < best.token))) best = {value, token};
    }
  }
  return best.token;
}

// Draws each row's token from softmax(z(r)) in one step, z(r) a pointer to its scores.
template <class T, class Z, class Seed, class Offset>
inline void draw_rows(const Rows& rows, int threads, int64_t* tokens, const Z& z, const Seed& seed, const Offset& offset,
                      Stream stream) {
  using A = accumulator_t<T>;
  const int64_t columns = rows.columns, blocks = blocks_of(columns);
  if (!rows_are_few(rows, threads)) {
    for_each_row(rows, threads, [&](int64_t r) { tokens[r] = draw_row(z(r), columns, seed(r), offset(r), stream); });
    return;
  }
  const Scratch<A> tops(rows.count * blocks);
  const Scratch<Best<A>> bests(rows.count * blocks);
  for_each_block(rows, threads, [&](int64_t r, int64_t begin, int64_t end) {
    tops[r * blocks + begin / block_columns] = largest(z(r) + begin, end - begin);
  });
  for (int64_t r = 0; r < rows.count; ++r) tops[r * blocks] = largest(tops.data + r * blocks, blocks);
  for_each_block(rows, threads, [&](int64_t r, int64_t begin, int64_t end) {
    Best<A> best;
    const A top = tops[r * blocks];
    if (is_finite(top)) take_best(z(r) + begin, end - begin, begin, top, seed(r), offset(r), best, stream);
    bests[r * blocks + begin / block_columns] = best;
  });
  for (int64_t r = 0; r < rows.count; ++r) {
    Best<A> winner;
    for (int64_t b = 0; b < blocks; ++b)
      if (bests[r * blocks + b].score > winner.score) winner = bests[r * blocks + b];
    tokens[r] = winner.token;
  }
}

// The first step of a draw in two: the block, of all of a row's by their states; −1 where there is a NaN, a +inf or nothing but −inf.
template <class A>
inline int64_t draw_block(const Softmax<A>* states, int64_t blocks, uint64_t seed, uint64_t offset) {
  Best<double> best;
  Random4 four{};
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(states[b].sum >= 0)) return -1;
    if (b % 4 == 0) four = draws_of(seed, offset, block_stream, static_cast<uint32_t>(b / 4));
    const double score = states[b].logsumexp() + gumbel_of<double>(four.word[b % 4]);
    if (score > best.score) best = {score, b};
  }
  return best.token;
}

// A row's scores by the block: block(begin, end, buffer) points to those of tokens begin … end − 1, in the buffer or elsewhere.
template <class T, class Block>
inline Softmax<accumulator_t<T>> softmax_of_scores(const Block& block, int64_t begin, int64_t end) {
  T buffer[block_columns];
  return softmax_of_block(block(begin, end, buffer), end - begin);
}

// Both steps, from the states of a row's blocks.
template <class T, class Block>
inline int64_t draw_in_two(const Block& block, int64_t columns, const Softmax<accumulator_t<T>>* states, uint64_t seed, uint64_t offset) {
  const int64_t drawn = draw_block(states, blocks_of(columns), seed, offset);
  if (drawn < 0) return -1;
  T buffer[block_columns];
  const int64_t begin = drawn * block_columns, end = smaller(begin + block_columns, columns);
  Best<accumulator_t<T>> best;
  take_best(block(begin, end, buffer), end - begin, begin, states[drawn].max, seed, offset, best, noise_stream);
  return best.token;
}

template <class T, class Block>
inline int64_t draw_in_two(const Block& block, int64_t columns, uint64_t seed, uint64_t offset) {
  const Scratch<Softmax<accumulator_t<T>>> states(blocks_of(columns));
  for (int64_t begin = 0; begin < columns; begin += block_columns)
    states[begin / block_columns] = softmax_of_scores<T>(block, begin, smaller(begin + block_columns, columns));
  return draw_in_two<T>(block, columns, states.data, seed, offset);
}

// Draws each row's token in two steps, blocks_in(r) what gives its scores by the block.
template <class T, class Row, class Seed, class Offset>
inline void draw_rows_in_two(const Rows& rows, int threads, int64_t* tokens, const Row& blocks_in, const Seed& seed, const Offset& offset) {
  const int64_t columns = rows.columns, blocks = blocks_of(columns);
  if (!rows_are_few(rows, threads)) {
    for_each_row(rows, threads, [&](int64_t r) { tokens[r] = draw_in_two<T>(blocks_in(r), columns, seed(r), offset(r)); });
    return;
  }
  const Scratch<Softmax<accumulator_t<T>>> states(rows.count * blocks);
  for_each_block(rows, threads, [&](int64_t r, int64_t begin, int64_t end) {
    states[r * blocks + begin / block_columns] = softmax_of_scores<T>(blocks_in(r), begin, end);
  });
  for_each_row(rows, threads, [&](int64_t r) {
    tokens[r] = draw_in_two<T>(blocks_in(r), columns, states.data + r * blocks, seed(r), offset(r));
  });
}

}  // namespace memdec::MEMDEC_LEVEL
