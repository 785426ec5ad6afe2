// decode_step: a few tokens of each text go through all layers of a Llama-like model and through its head, in one call.
//
// Of few rows a product takes as long as its weights take to read, once for all rows, in the order in which they lie. So what
// must not come in between is anything else: a step is one list of tiles, which the threads take one after the other,
//
//   layer 0: norms of the rows | rows of Wq, Wk, Wv | rotations | heads | rows of Wo | norms | rows of Wgate, Wup | rows of Wdown
//   layer 1: …                                                           last: norms | rows of the head
//
// and a tile waits until all tiles of the groups before its own are done. Who comes late takes the next tile there is; a
// thread that never comes is not missed.
//
// Results are rounded to the weights' dtype where the models of transformers round, and computed in float32 between. What comes
// out for a token does not depend on how many others are read beside it: each product is summed in the same order.
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

constexpr int64_t tile_bytes = 131072;  // of weights: what is asked for ahead at the end of a tile is another thread's
constexpr int64_t widest_tile = 128;    // rows of weights
// Bytes of weights that are asked for before they are read: of rows that are read side by side a processor does not see by itself
// what comes next. Into the second-level cache, which may wait for more at a time than the first.
constexpr int64_t ahead = 8192;
constexpr int weights_at_once = 4;  // rows of a weight that are read side by side
#if defined(MEMDEC_LEVEL_IS_avx512)
constexpr int rows_at_once = 6;  // rows that one reading of them serves: as many as there are registers for
#else
constexpr int rows_at_once = 2;
#endif
constexpr int groups = 8;  // of a layer

// To the dtype and back.
template <class T>
inline VecF rounded(VecF v) {
  T lane[VecF::width];
  store(lane, v);
  return load(lane);
}
template <>
inline VecF rounded<float>(VecF v) {
  return v;
}

// Calls f(i, n) for every vector of `count` elements: from i, n of them, n < width for the last one at most.
template <class F>
inline void for_each_vector(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += VecF::width) f(i, smaller(VecF::width, count - i));
}
template <class T>
inline VecF load_up_to(const T* p, int64_t n) {
  return n == VecF::width ? load(p) : load_some(p, n, 0.0f);
}
template <class T>
inline void store_up_to(T* p, VecF v, int64_t n) {
  if (n == VecF::width) {
    store(p, v);
  } else {
    store_some(p, v, n);
  }
}

// Two vectors' worth of a weight, a half at a time: of bfloat16 the even and the odd elements, since these are one instruction each
// where the first and the second half are two. Inputs of products lie in this order, see place_of.
template <class T>
struct Pair {
  static constexpr bool interleaved = false;
  const T* from;
  explicit Pair(const T* p) : from(p) {}
  VecF half(int i) const { return load(from + i * VecF::width); }
};
#if defined(MEMDEC_LEVEL_IS_avx512)
template <>
struct Pair<bfloat16> {
  static constexpr bool interleaved = true;
  __m512i bits;
  explicit Pair(const bfloat16* p) : bits(_mm512_loadu_si512(p)) {}
  VecF half(int i) const {
    return {_mm512_castsi512_ps(i == 0 ? _mm512_slli_epi32(bits, 16) : _mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))};
  }
};
#elif defined(MEMDEC_LEVEL_IS_avx2)
template <>
struct Pair<bfloat16> {
  static constexpr bool interleaved = true;
  __m256i bits;
  explicit Pair(const bfloat16* p) : bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) {}
  VecF half(int i) const {
    return {_mm256_castsi256_ps(i == 0 ? _mm256_slli_epi32(bits, 16) : _mm256_and_si256(bits, _mm256_set1_epi32(-0x10000)))};
  }
};
#endif

constexpr int64_t pair_width = 2 * VecF::width;

// Where column k of an input of `columns` lies; what is left over behind the last pair of vectors stays as it is.
template <class T>
inline int64_t place_of(int64_t k, int64_t columns) {
  if (!Pair<T>::interleaved || k >= columns / pair_width * pair_width) return k;
  return k / pair_width * pair_width + k % 2 * VecF::width + k % pair_width / 2;
}

// Puts n values from column k on into an input.
template <class T>
inline void put(float* input, int64_t columns, int64_t k, VecF values, int64_t n) {
  float lane[VecF::width];
  store(lane, values);
  for (int64_t i = 0; i < n; ++i) input[place_of<T>(k + i, columns)] = lane[i];
}

// sums[m][r] += w_r · x_m of a vector's columns.
template <int M, int R, class F>
inline void add_products(VecF (&sums)[M][R], const VecF (&w)[R], const F& x_of) {
  for (int m = 0; m < M; ++m) {
    const VecF x = x_of(m);
    for (int r = 0; r < R; ++r) sums[m][r] = fma(w[r], x, sums[m][r]);
  }
}

// out[m · widest_tile + r] = w_r · x_m of R rows of a weight, one behind the other, and M inputs, `columns` elements each.
template <int M, int R, class T>
inline void dots(const T* weight, const float* x, int64_t columns, float* out) {
  VecF sums[M][R], w[R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) sums[m][r] = broadcast<VecF>(0.0f);
  int64_t k = 0;
  for (; k + pair_width <= columns; k += pair_width) {
    const auto pair = [&](int r) { return Pair<T>(weight + r * columns + k); };
    const auto add = [&](const auto&... pairs) {
      for (int half = 0; half < 2; ++half) {
        const VecF halves[R] = {pairs.half(half)...};
        add_products(sums, halves, [&](int m) { return load(x + m * columns + k + half * VecF::width); });
      }
    };
    for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(weight + r * columns + k) + ahead, 0, 2);
    if constexpr (R == 4) {
      add(pair(0), pair(1), pair(2), pair(3));
    } else {
      static_assert(R == 1);
      add(pair(0));
    }
  }
  for (; k < columns; k += VecF::width) {
    const int64_t n = smaller(VecF::width, columns - k);
    for (int r = 0; r < R; ++r) w[r] = load_up_to(weight + r * columns + k, n);
    add_products(sums, w, [&](int m) { return load_up_to(x + m * columns + k, n); });
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * widest_tile + r] = reduce_add(sums[m][r]);
}

// The same for as many vectors as there are.
template <int R, int M = rows_at_once, class T>
inline void dots_of_rows(const T* weight, const float* x, int64_t rows, int64_t columns, float* out) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) dots<M, R>(weight, x + m * columns, columns, out + m * widest_tile);
  if constexpr (M > 1) {
    if (m < rows) dots_of_rows<R, M - 1>(weight, x + m * columns, rows - m, columns, out + m * widest_tile);
  }
}

// Calls use(m, n, some, y) for vectors of `some` outputs y = round(x_m · Wᵀ + b), n the first of them, from `begin` to `end`, at most
// widest_tile of them.
template <class T, class F>
inline void multiply(const void* weights, const void* biases, int64_t begin, int64_t end, const float* x, int64_t rows, int64_t columns,
                     const F& use) {
  constexpr int64_t most_rows = 16;
  const T* const weight = static_cast<const T*>(weights) + begin * columns;
  const T* const bias = biases ? static_cast<const T*>(biases) + begin : nullptr;
  const int64_t count = end - begin;
  float sums[most_rows * widest_tile];
  for (int64_t first = 0; first < rows; first += most_rows) {
    const int64_t some = smaller(most_rows, rows - first);
    int64_t n = 0;
    for (; n + weights_at_once <= count; n += weights_at_once)
      dots_of_rows<weights_at_once>(weight + n * columns, x + first * columns, some, columns, sums + n);
    for (; n < count; ++n) dots_of_rows<1>(weight + n * columns, x + first * columns, some, columns, sums + n);
    for (int64_t m = 0; m < some; ++m)
      for_each_vector(count, [&](int64_t i, int64_t wide) {
        VecF y = load_up_to(sums + m * widest_tile + i, wide);
        if (bias) y = y + load_up_to(bias + i, wide);
        use(first + m, begin + i, wide, rounded<T>(y));
      });
  }
}

// Calls out(i, n, y) for vectors of n values of y = x / √(mean(x²) + ε) · w.
template <class T, class F>
inline void norm(const float* x, const void* weights, double epsilon, int64_t count, const F& out) {
  const T* const weight = static_cast<const T*>(weights);
  VecF squares = broadcast<VecF>(0.0f);
  for_each_vector(count, [&](int64_t i, int64_t n) {
    const VecF v = load_up_to(x + i, n);
    squares = fma(v, v, squares);
  });
  const float factor = 1.0f / sqrtf(reduce_add(squares) / static_cast<float>(count) + static_cast<float>(epsilon));
  for_each_vector(count, [&](int64_t i, int64_t n) {
    const VecF normed = rounded<T>(load_up_to(x + i, n) * broadcast<VecF>(factor));
    out(i, n, rounded<T>(normed * load_up_to(weight + i, n)));
  });
}

template <class T>
class Step {
 public:
  Step(const DecodeStep& op, int threads)
      : op_(op),
        rows_(op.texts * op.tokens),
        seen_(op.filled + op.tokens),
        query_(op.heads * op.dim),
        key_(op.key_heads * op.dim),
        states_(rows_ * op.hidden),
        normed_(rows_ * op.hidden),
        merged_(rows_ * (query_ + 2 * key_)),
        attended_(rows_ * query_),
        gates_(rows_ * op.inner),
        gated_(rows_ * op.inner),
        scores_(op.texts * op.heads * op.tokens * seen_) {
    const int64_t weights = op.layers * (op.hidden * (2 * query_ + 2 * key_) + 3 * op.hidden * op.inner) + op.hidden * op.vocab;
    threads_ = threads_for(weights, threads);
    merged_tile_ = tile(query_ + 2 * key_, op.hidden);
    output_tile_ = tile(op.hidden, query_);
    gate_tile_ = tile(op.inner, 2 * op.hidden);
    down_tile_ = tile(op.hidden, op.inner);
    head_tile_ = tile(op.vocab, op.hidden);
    const int64_t counts[groups] = {rows_,
                                    tiles(query_ + 2 * key_, merged_tile_),
                                    rows_ * op.key_heads,
                                    op.texts * op.heads,
                                    tiles(op.hidden, output_tile_),
                                    rows_,
                                    tiles(op.inner, gate_tile_),
                                    tiles(op.hidden, down_tile_)};
    starts_[0] = 0;
    for (int g = 0; g < groups; ++g) starts_[g + 1] = starts_[g] + counts[g];
  }

  void run() {
    const T* const given = static_cast<const T*>(op_.embedded);
    for (int64_t i = 0; i < rows_ * op_.hidden; ++i) states_[i] = to_float(given[i]);
    const int64_t head = op_.layers * starts_[groups];
    parallel(head + rows_ + tiles(op_.vocab, head_tile_), 1, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i < head) {
          in_layer(i);
        } else {
          at_the_end(i - head, head);
        }
        __atomic_fetch_add(&done_, 1, __ATOMIC_RELEASE);
      }
    });
  }

 private:
  static int64_t tiles(int64_t outputs, int64_t each) { return (outputs + each - 1) / each; }

  // How many rows of a weight are a tile: few enough that no thread waits long for another at the end of a group.
  int64_t tile(int64_t outputs, int64_t columns) const {
    const int64_t whole =
        smaller(widest_tile, smaller(tile_bytes / (columns * static_cast<int64_t>(sizeof(T))), outputs / (4 * threads_)));
    return larger(1, whole / weights_at_once) * weights_at_once;
  }

  void wait_for(int64_t tiles_done) const {
    wait_until([&] { return __atomic_load_n(&done_, __ATOMIC_ACQUIRE) >= tiles_done; });
  }

  void in_layer(int64_t i) {
    const int64_t layer = i / starts_[groups], place = i % starts_[groups];
    int group = 0;
    while (place >= starts_[group + 1]) ++group;
    wait_for(layer * starts_[groups] + starts_[group]);
    const StepLayer& weights = op_.layer[layer];
    const int64_t at = place - starts_[group];
    switch (group) {
      case 0: return norm_row(weights.input_norm, at, nullptr);
      case 1: return merge(weights, at);
      case 2: return rotate(weights, at);
      case 3: return attend(weights, at);
      case 4: return add(weights.output, weights.output_bias, attended_.data, query_, at * output_tile_, output_tile_);
      case 5: return norm_row(weights.attended_norm, at, static_cast<T*>(weights.mlp_input));
      case 6: return gate(weights, at);
      default: return add(weights.down, weights.down_bias, gated_.data, op_.inner, at * down_tile_, down_tile_);
    }
  }

  void at_the_end(int64_t i, int64_t before) {
    if (i < rows_) {
      wait_for(before);
      return norm_row(op_.norm, i, nullptr);
    }
    wait_for(before + rows_);
    const int64_t begin = (i - rows_) * head_tile_;
    T* const logits = static_cast<T*>(op_.logits);
    multiply<T>(op_.head, op_.head_bias, begin, smaller(begin + head_tile_, op_.vocab), normed_.data, rows_, op_.hidden,
                [&](int64_t m, int64_t n, int64_t some, VecF y) { store_up_to(logits + m / op_.tokens * op_.logits_stride + m % op_.tokens * op_.vocab + n, y, some);
                });
  }

  // Also to `out`, where there is one.
  void norm_row(const void* weight, int64_t row, T* out) {
    norm<T>(states_.data + row * op_.hidden, weight, op_.epsilon, op_.hidden, [&](int64_t i, int64_t n, VecF y) {
      put<T>(normed_.data + row * op_.hidden, op_.hidden, i, y, n);
      if (out) store_up_to(out + row * op_.hidden + i, y, n);
    });
  }

  // Queries, keys and values: a tile may begin in one of them and end in the next.
  void merge(const StepLayer& weights, int64_t at) {
    const int64_t width = query_ + 2 * key_;
    const int64_t begin = at * merged_tile_, end = smaller(begin + merged_tile_, width);
    const auto part = [&](const void* weight, const void* bias, int64_t first, int64_t count) {
      const int64_t from = larger(begin, first), to = smaller(end, first + count);
      if (from >= to) return;
      multiply<T>(weight, bias, from - first, to - first, normed_.data, rows_, op_.hidden, [&](int64_t m, int64_t n, int64_t some, VecF y) {
        store_up_to(merged_.data + m * width + first + n, y, some);
      });
    };
    part(weights.query, weights.query_bias, 0, query_);
    part(weights.key, weights.key_bias, query_, key_);
    part(weights.value, weights.value_bias, query_ + key_, key_);
  }

  // A key head of a row, its queries, and its values: the former two are rotated, the latter two go into the cache.
  void rotate(const StepLayer& weights, int64_t at) {
    const int64_t row = at / op_.key_heads, head = at % op_.key_heads, group = op_.heads / op_.key_heads, dim = op_.dim;
    float* const merged = merged_.data + row * (query_ + 2 * key_);
    for (int64_t h = head * group; h < (head + 1) * group; ++h) rotate_head(merged + h * dim, weights.query_norm, row);
    rotate_head(merged + query_ + head * dim, weights.key_norm, row);
    const int64_t slot = ((row / op_.tokens * op_.key_heads + head) * op_.room + op_.filled + row % op_.tokens) * dim;
    for_each_vector(dim, [&](int64_t i, int64_t n) {
      store_up_to(static_cast<T*>(weights.keys) + slot + i, load_up_to(merged + query_ + head * dim + i, n), n);
      store_up_to(static_cast<T*>(weights.values) + slot + i, load_up_to(merged + query_ + key_ + head * dim + i, n), n);
    });
  }

  // (a, b) → (a·cos − b·sin, b·cos + a·sin), where the model norms its heads after that.
  void rotate_head(float* x, const void* weight, int64_t row) const {
    if (weight) norm<T>(x, weight, op_.epsilon, op_.dim, [&](int64_t i, int64_t n, VecF y) { store_up_to(x + i, y, n); });
    const T* const cos = static_cast<const T*>(op_.cos) + row * op_.turns_stride;
    const T* const sin = static_cast<const T*>(op_.sin) + row * op_.turns_stride;
    const int64_t half = op_.dim / 2;
    for_each_vector(half, [&](int64_t i, int64_t n) {
      const VecF a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
      const VecF turned_a = rounded<T>(a * load_up_to(sin + half + i, n)), turned_b = rounded<T>(b * load_up_to(sin + i, n));
      store_up_to(x + i, rounded<T>(rounded<T>(a * load_up_to(cos + i, n)) - turned_b), n);
      store_up_to(x + half + i, rounded<T>(rounded<T>(b * load_up_to(cos + half + i, n)) + turned_a), n);
    });
  }

  // The query's products with R keys, one behind the other.
  template <int R>
  void score(const T* keys, const float* query, float* out) const {
    VecF sums[1][R], k[R];
    for (int r = 0; r < R; ++r) sums[0][r] = broadcast<VecF>(0.0f);
    for_each_vector(op_.dim, [&](int64_t i, int64_t n) {
      for (int r = 0; r < R; ++r) k[r] = load_up_to(keys + r * op_.dim + i, n);
      add_products(sums, k, [&](int) { return load_up_to(query + i, n); });
    });
    for (int r = 0; r < R; ++r) out[r] = reduce_add(sums[0][r]);
  }

  // A head of a text: each of its tokens looks at what is in the cache, up to itself.
  void attend(const StepLayer& weights, int64_t at) {
    const int64_t text = at / op_.heads, head = at % op_.heads, dim = op_.dim;
    const int64_t first = (text * op_.key_heads + head / (op_.heads / op_.key_heads)) * op_.room * dim;
    const T* const keys = static_cast<const T*>(weights.keys) + first;
    const T* const values = static_cast<const T*>(weights.values) + first;
    const int64_t* const mask = op_.mask ? op_.mask + text * op_.mask_stride : nullptr;
    for (int64_t token = 0; token < op_.tokens; ++token) {
      const int64_t row = text * op_.tokens + token, count = op_.filled + token + 1;
      const float* const query = merged_.data + row * (query_ + 2 * key_) + head * dim;
      float* const scores = scores_.data + (at * op_.tokens + token) * seen_;
      int64_t next = 0;
      for (; next + weights_at_once <= count; next += weights_at_once) score<weights_at_once>(keys + next * dim, query, scores + next);
      for (; next < count; ++next) score<1>(keys + next * dim, query, scores + next);
      float highest = -INFINITY;
      for (int64_t j = 0; j < count; ++j) {
        scores[j] = mask && !mask[j] ? -INFINITY : scores[j] * static_cast<float>(op_.scale);
        highest = scores[j] > highest ? scores[j] : highest;
      }
      // A NaN was not above anything; exp brings it back.
      const VecF shift = broadcast<VecF>(highest == -INFINITY ? 0.0f : highest);
      VecF sums = broadcast<VecF>(0.0f);
      for_each_vector(count, [&](int64_t i, int64_t n) {
        const VecF weight = exp((n == VecF::width ? load(scores + i) : load_some(scores + i, n, -INFINITY)) - shift);
        store_up_to(scores + i, weight, n);
        sums = sums + weight;
      });
      float total = reduce_add(sums);
      if (total == 0) total = 1;  // padding that sees nothing: zeros, for a NaN would stay in the cache
      float* const out = attended_.data + row * query_;
      constexpr int64_t wide = 4;
      for (int64_t i = 0; i < dim; i += wide * VecF::width) {
        const int64_t left = smaller(wide * VecF::width, dim - i);
        VecF found[wide];
        for (auto& each : found) each = broadcast<VecF>(0.0f);
        for (int64_t j = 0; j < count; ++j) {
          if (mask && !mask[j]) continue;
          const VecF weight = broadcast<VecF>(scores[j]);
          const T* const value = values + j * dim + i;
          if (left == wide * VecF::width) {
            for (int64_t u = 0; u < wide; ++u) found[u] = fma(weight, load(value + u * VecF::width), found[u]);
          } else {
            for_each_vector(left, [&](int64_t k, int64_t n) {
              found[k / VecF::width] = fma(weight, load_up_to(value + k, n), found[k / VecF::width]);
            });
          }
        }
        for_each_vector(left, [&](int64_t k, int64_t n) {
          put<T>(out, query_, head * dim + i + k, rounded<T>(found[k / VecF::width] / broadcast<VecF>(total)), n);
        });
      }
    }
  }

  // states += x · Wᵀ + b
  void add(const void* weight, const void* bias, const float* x, int64_t columns, int64_t begin, int64_t count) {
    multiply<T>(weight, bias, begin, smaller(begin + count, op_.hidden), x, rows_, columns, [&](int64_t m, int64_t n, int64_t some, VecF y) {
      float* const state = states_.data + m * op_.hidden + n;
      store_up_to(state, rounded<T>(load_up_to(state, some) + y), some);
    });
  }

  // silu(g)·u
  void gate(const StepLayer& weights, int64_t at) {
    const int64_t begin = at * gate_tile_, end = smaller(begin + gate_tile_, op_.inner);
    multiply<T>(weights.gate, weights.gate_bias, begin, end, normed_.data, rows_, op_.hidden, [&](int64_t m, int64_t n, int64_t some, VecF g) {
      const VecF one = broadcast<VecF>(1.0f), most = broadcast<VecF>(88.0f), zero = broadcast<VecF>(0.0f);
      store_up_to(gates_.data + m * op_.inner + n, rounded<T>(g / (one + exp(min(most, zero - g)))), some);
    });
    multiply<T>(weights.up, weights.up_bias, begin, end, normed_.data, rows_, op_.hidden, [&](int64_t m, int64_t n, int64_t some, VecF u) {
      const VecF gated = rounded<T>(load_up_to(gates_.data + m * op_.inner + n, some) * u);
      put<T>(gated_.data + m * op_.inner, op_.inner, n, gated, some);
    });
  }

  const DecodeStep& op_;
  const int64_t rows_, seen_, query_, key_;  // rows, tokens that a cache then holds, widths of queries and of keys
  // Values of the dtype, kept as float32, of a row one behind the other.
  const Scratch<float> states_, normed_, merged_, attended_, gates_, gated_, scores_;
  int threads_ = 1;
  int64_t merged_tile_ = 1, output_tile_ = 1, gate_tile_ = 1, down_tile_ = 1, head_tile_ = 1;
  int64_t starts_[groups + 1];  // tiles of a layer before each of its groups
  int64_t done_ = 0;
};

Status decode_step(const DecodeStep& op, const Launch& launch) {
  switch (op.dtype) {
    case DType::float32: Step<float>(op, launch.threads).run(); return {};
    case DType::bfloat16: Step<bfloat16>(op, launch.threads).run(); return {};
    case DType::float16: Step<float16>(op, launch.threads).run(); return {};
    default: return {.code = Status::bad_dtype, .argument = "weights", .got = static_cast<int64_t>(op.dtype)};
  }
}

}  // namespace memdec::MEMDEC_LEVEL
