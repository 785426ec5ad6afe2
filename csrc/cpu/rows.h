// Reading rows of logits: the one pass that gives a row's (max, Σ exp(z − max)), and how rows are shared out over threads.
#pragma once

#include "core/softmax.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "memdec.h"

namespace memdec::MEMDEC_LEVEL {

// A row is read in blocks of this many columns, small enough to be in the first-level cache when it is read again (max first,
// then the sum). The split is the same for any number of threads, so every result is, too.
constexpr int64_t block_columns = 4096;

// Below this many elements a thread costs more than it brings.
constexpr int64_t elements_per_thread = 32768;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
inline T* row_of(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + rows.offset(r);
}

// Calls f(T{}) for the element type that dtype stands for; f returns nothing.
template <class F>
inline Status with_dtype(DType dtype, const char* argument, const F& f) {
  switch (dtype) {
    case DType::float32: f(float{}); return {};
    case DType::bfloat16: f(bfloat16{}); return {};
    case DType::float16: f(float16{}); return {};
    case DType::float64: f(double{}); return {};
  }
  return {.code = Status::bad_dtype, .argument = argument, .got = static_cast<int64_t>(dtype)};
}

// The softmax state of n ≤ block_columns elements.
template <class T>
inline Softmax<accumulator_t<T>> softmax_of_block(const T* z, int64_t n) {
  using V = vec_t<T>;
  using A = typename V::scalar;
  constexpr int64_t w = V::width;
  const V lowest = broadcast<V>(static_cast<A>(-INFINITY));
  V high[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int u = 0; u < 4; ++u) high[u] = max(load(z + i + u * w), high[u]);
  for (; i + w <= n; i += w) high[0] = max(load(z + i), high[0]);
  if (i < n) high[1] = max(load_some(z + i, n - i, static_cast<A>(-INFINITY)), high[1]);
  Softmax<A> state;
  state.max = reduce_max(max(max(high[0], high[1]), max(high[2], high[3])));

  // A NaN was skipped above; it comes back here, through exp. A block of −inf is measured from 0, for a sum of 0.
  const V shift = broadcast<V>(state.max == static_cast<A>(-INFINITY) ? 0 : state.max);
  const V zero = broadcast<V>(0);
  V sum[4] = {zero, zero, zero, zero};
  for (i = 0; i + 4 * w <= n; i += 4 * w)
    for (int u = 0; u < 4; ++u) sum[u] = sum[u] + exp(load(z + i + u * w) - shift);
  for (; i + w <= n; i += w) sum[0] = sum[0] + exp(load(z + i) - shift);
  if (i < n) sum[1] = sum[1] + exp(load_some(z + i, n - i, static_cast<A>(-INFINITY)) - shift);
  state.sum = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return state;
}

// The softmax state of a whole row.
template <class T>
inline Softmax<accumulator_t<T>> softmax_of_row(const T* z, int64_t columns) {
  Softmax<accumulator_t<T>> state;
  for (int64_t begin = 0; begin < columns; begin += block_columns)
    state = merge(state, softmax_of_block(z + begin, smaller(block_columns, columns - begin)));
  return state;
}

// How many threads `elements` of work are worth.
inline int threads_for(int64_t elements, int threads) {
  return static_cast<int>(larger(1, smaller(threads, elements / elements_per_thread)));
}

// Whether there are too few rows to keep every thread busy with rows of its own.
inline bool rows_are_few(const Rows& rows, int threads) {
  return threads > 1 && rows.count < 2 * threads && rows.columns > block_columns;
}

// Calls f(begin, end) until every row was in one range, on several threads where that pays.
template <class F>
inline void for_each_range(const Rows& rows, int threads, const F& f) {
  const int used = threads_for(rows.count * rows.columns, threads);
  // Ranges are a few dozen a thread, so that a thread that is held up does not hold up the rest.
  parallel(rows.count, larger(1, rows.count / (used * int64_t{32})), used, f);
}

// Calls f(r) for every row, on several threads where that pays.
template <class F>
inline void for_each_row(const Rows& rows, int threads, const F& f) {
  for_each_range(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// Calls f(r, begin, end) for every block of columns of every row, on several threads where that pays.
template <class F>
inline void for_each_block(const Rows& rows, int threads, const F& f) {
  const int64_t blocks = (rows.columns + block_columns - 1) / block_columns;
  parallel(rows.count * blocks, 1, threads_for(rows.count * rows.columns, threads), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * block_columns;
      f(i / blocks, begin, smaller(begin + block_columns, rows.columns));
    }
  });
}

// Memory for a kernel's own use, freed at the end of the scope; throws std::bad_alloc, which dispatch.cpp turns into a Status.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count) : data(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(larger(count, 1))))) {}
  ~Scratch() { ::operator delete(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

// Calls f(r, state) once for every row, with its softmax state. Few long rows are split over the threads.
template <class T, class F>
inline void with_softmax_of_rows(const Rows& rows, int threads, const F& f) {
  using A = accumulator_t<T>;
  if (!rows_are_few(rows, threads)) {
    for_each_row(rows, threads, [&](int64_t r) { f(r, softmax_of_row(row_of<const T>(rows, r), rows.columns)); });
    return;
  }
  const int64_t blocks = (rows.columns + block_columns - 1) / block_columns;
  const Scratch<Softmax<A>> states(rows.count * blocks);
  for_each_block(rows, threads, [&](int64_t r, int64_t begin, int64_t end) {
    states[r * blocks + begin / block_columns] = softmax_of_block(row_of<const T>(rows, r) + begin, end - begin);
  });
  for (int64_t r = 0; r < rows.count; ++r) {
    Softmax<A> state;
    for (int64_t b = 0; b < blocks; ++b) state = merge(state, states[r * blocks + b]);
    f(r, state);
  }
}

// Every index in [0, wanted): the status that an op returns before it writes anything.
template <class I>
inline Status check_indices(const I* index, int64_t count, int64_t wanted, const char* argument) {
  for (int64_t i = 0; i < count; ++i)
    if (static_cast<int64_t>(index[i]) < 0 || static_cast<int64_t>(index[i]) >= wanted)
      return {.code = Status::bad_index, .argument = argument, .at = i, .got = static_cast<int64_t>(index[i]), .wanted = wanted};
  return {};
}

// Whether a teacher of `rows` rows over `columns` tokens can be read safely: the status that an op returns before it writes.
inline Status check_sparse(const SparseRows& sparse, int64_t rows, int64_t columns) {
  const auto broken = [&](int64_t r, int64_t least) {
    return Status{.code = Status::bad_structure, .argument = "teacher.indptr", .at = r, .got = sparse.indptr[r], .wanted = least};
  };
  if (sparse.indptr[0] != 0) return broken(0, 0);
  for (int64_t r = 1; r <= rows; ++r)
    if (sparse.indptr[r] < sparse.indptr[r - 1]) return broken(r, sparse.indptr[r - 1]);
  if (sparse.indptr[rows] != sparse.nnz) return broken(rows, sparse.nnz);
  const uint32_t limit = static_cast<uint32_t>(smaller(columns, INT32_MAX));
  bool outside = false;
  for (int64_t i = 0; i < sparse.nnz; ++i) outside |= static_cast<uint32_t>(sparse.ids[i]) >= limit;  // vectorises
  return outside ? check_indices(sparse.ids, sparse.nnz, columns, "teacher.token_ids") : Status{};
}

}  // namespace memdec::MEMDEC_LEVEL
