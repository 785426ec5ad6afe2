// The k nearest of many rows, found as the distances pass by in blocks: exact search.
//
// The caller multiplies a block of queries by a block of stored rows (a matrix product, the work proper) and hands over the
// products. What is to be ranked is ‖x‖² − 2·q·x, which is the squared distance less ‖q‖², the same for all of a query's rows.
//
//   topk_filter_prepare  makes float32 of a block of float16 keys, takes their mean off, and gives their norms
//   topk_filter_update   compares a block of products with each query's threshold, many at a time, and pushes what is below into
//                        the query's buffer; a full buffer is cut to the `keep` best, whose worst is the new threshold
//   topk_filter_refine   replaces the rank of the candidates among a block of stored rows by Σ (q − x)², computed without
//                        cancellation and in an order that does not depend on how the work was cut
//   topk_filter_select   sorts the k best of every query
//
// Traffic: each product is read once. For N rows in no particular order a query sees about keep·log₂(N / keep) pushes.
//
// A candidate is a 64-bit key, the distance's rank above the row's id. Blocks come in ascending order of ids and the comparison is
// strict, so of equal distances the lowest ids are kept.
#include "cpu/rows.h"
#include "cpu/select.h"

namespace memdec::MEMDEC_LEVEL {

namespace {

// One query's buffer of candidates.
struct Candidates {
  uint64_t* keys;
  int64_t count;
  int64_t capacity;
  int64_t keep;
  float threshold;

  void cut(uint64_t* scratch) {
    if (count <= keep) return;
    threshold = float_of_rank(static_cast<uint32_t>(select_smallest(keys, count, keep, scratch) >> 32));
    count = keep;
  }
};

// What may be pushed between two looks at the room that is left.
constexpr int64_t stride = 16;

#if defined(MEMDEC_LEVEL_IS_avx512)
// Pushes what is below the threshold of 16 columns. No branch on "none is": two strides in three hold one, which no predictor can
// follow. May write 16 keys beyond the last.
inline void push_stride(const float* products, const float* norms, uint32_t first_id, float bound, Candidates& row) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 distance = _mm512_fmadd_ps(_mm512_set1_ps(-2.0f), _mm512_loadu_ps(products), _mm512_loadu_ps(norms));
  const __mmask16 below = _mm512_cmp_ps_mask(distance, _mm512_set1_ps(bound), _CMP_LT_OQ);
  const __m512i bits = _mm512_castps_si512(distance);
  const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  const __m512i ranks = _mm512_maskz_compress_epi32(below, _mm512_xor_si512(bits, flip));
  const __m512i ids = _mm512_maskz_compress_epi32(below, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first_id))));
  const auto keys = [](__m256i rank, __m256i id) {
    return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(rank), 32), _mm512_cvtepu32_epi64(id));
  };
  uint64_t* const to = row.keys + row.count;
  _mm512_storeu_si512(to, keys(_mm512_castsi512_si256(ranks), _mm512_castsi512_si256(ids)));
  const int pushed = __builtin_popcount(below);
  if (pushed > 8) _mm512_storeu_si512(to + 8, keys(_mm512_extracti64x4_epi64(ranks, 1), _mm512_extracti64x4_epi64(ids, 1)));
  row.count += pushed;
}
#elif defined(MEMDEC_LEVEL_IS_avx2)
// For each set of lanes their numbers, ascending, a byte each: how to move them to the front.
struct FrontLanes {
  uint64_t of[256];
  constexpr FrontLanes() : of() {
    for (unsigned set = 0; set < 256; ++set)
      for (unsigned lane = 0, to = 0; lane < 8; ++lane)
        if (set >> lane & 1) of[set] |= static_cast<uint64_t>(lane) << 8 * to++;
  }
};
constexpr FrontLanes front_lanes;

// Pushes what is below the threshold of 16 columns, with as few branches as the AVX-512 twin.
inline void push_stride(const float* products, const float* norms, uint32_t first_id, float bound, Candidates& row) {
  for (int half = 0; half < 16; half += 8) {
    const __m256 distance =
        _mm256_fmadd_ps(_mm256_set1_ps(-2.0f), _mm256_loadu_ps(products + half), _mm256_loadu_ps(norms + half));
    const unsigned below = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(distance, _mm256_set1_ps(bound), _CMP_LT_OQ)));
    const __m256i bits = _mm256_castps_si256(distance);
    const __m256i flip = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    const __m256i front = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(front_lanes.of + below)));
    const __m256i ranks = _mm256_permutevar8x32_epi32(_mm256_xor_si256(bits, flip), front);
    const __m256i ids = _mm256_add_epi32(front, _mm256_set1_epi32(static_cast<int>(first_id) + half));
    // The unpackings interleave within 128 bits: first the keys 0, 1, 4, 5, then 2, 3, 6, 7.
    const __m256i even = _mm256_unpacklo_epi32(ids, ranks);
    const __m256i odd = _mm256_unpackhi_epi32(ids, ranks);
    __m256i* const to = reinterpret_cast<__m256i*>(row.keys + row.count);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    const int pushed = __builtin_popcount(below);
    if (pushed > 4) _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    row.count += pushed;
  }
}
#else
inline void push_stride(const float* products, const float* norms, uint32_t first_id, float bound, Candidates& row) {
  int found = 0;  // most strides hold nothing: this is what the compiler can vectorise
  for (int i = 0; i < stride; ++i) found |= norms[i] - 2.0f * products[i] < bound;
  if (!found) return;
  for (uint32_t i = 0; i < stride; ++i) {
    const float distance = norms[i] - 2.0f * products[i];
    if (distance < bound) row.keys[row.count++] = key_of(rank_of(distance), first_id + i);
  }
}
#endif

// Pushes what is below the threshold of columns [begin, end).
inline void filter_columns(const float* products, const float* norms, int64_t begin, int64_t end, uint32_t first_id,
                           Candidates& row, uint64_t* scratch) {
  for (int64_t j = begin; j < end; j += stride) {
    if (row.count + stride > row.capacity) row.cut(scratch);
    const uint32_t id = first_id + static_cast<uint32_t>(j);
    if (end - j >= stride) {
      push_stride(products + j, norms + j, id, row.threshold, row);
    } else {  // beyond the end every distance is +inf, which is below no threshold
      float last_products[stride] = {}, last_norms[stride];
      for (int64_t i = 0; i < stride; ++i) last_norms[i] = INFINITY;
      for (int64_t i = j; i < end; ++i) {
        last_products[i - j] = products[i];
        last_norms[i - j] = norms[i];
      }
      push_stride(last_products, last_norms, id, row.threshold, row);
    }
  }
}

// Σ (q − x)² over d elements. Sixteen partial sums, added up in a fixed tree, on every level.
inline float squared_distance(const float* q, const float16* x, int64_t d) {
  constexpr int64_t lanes = 16;
  constexpr int64_t vectors = lanes / VecF::width;
  VecF sum[vectors];
  for (VecF& s : sum) s = broadcast<VecF>(0.0f);
  int64_t i = 0;
  for (; i + lanes <= d; i += lanes)
    for (int64_t v = 0; v < vectors; ++v) {
      const VecF difference = load(q + i + v * VecF::width) - load(x + i + v * VecF::width);
      sum[v] = fma(difference, difference, sum[v]);
    }
  float lane[lanes];
  for (int64_t v = 0; v < vectors; ++v) store(lane + v * VecF::width, sum[v]);
  for (int64_t l = 0; i < d; ++i, ++l) {
    const float difference = q[i] - to_float(x[i]);
    lane[l] += difference * difference;
  }
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

}  // namespace

Status topk_filter_prepare(const TopkFilterPrepare& op, const Launch& launch) {
  const int threads = threads_for(op.rows * op.dim, launch.threads);
  parallel(op.rows, larger(1, op.rows / (threads * int64_t{16})), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float16* const stored = static_cast<const float16*>(op.stored) + r * op.stored_stride;
      float* const centred = op.centred + r * op.dim;
      VecF sum[2] = {broadcast<VecF>(0.0f), broadcast<VecF>(0.0f)};
      int64_t i = 0;
      for (; i + 2 * VecF::width <= op.dim; i += 2 * VecF::width)
        for (int64_t v = 0; v < 2; ++v) {
          const VecF x = load(stored + i + v * VecF::width) - load(op.mean + i + v * VecF::width);
          store(centred + i + v * VecF::width, x);
          sum[v] = fma(x, x, sum[v]);
        }
      float norm = reduce_add(sum[0] + sum[1]);
      for (; i < op.dim; ++i) {
        centred[i] = to_float(stored[i]) - op.mean[i];
        norm += centred[i] * centred[i];
      }
      op.norms[r] = norm;
    }
  });
  return {};
}

Status topk_filter_update(const TopkFilterUpdate& op, const Launch& launch) {
  const TopkBuffers& buffers = op.buffers;
  const int threads = threads_for(op.rows * op.columns, launch.threads);
  parallel(op.rows, larger(1, op.rows / (threads * int64_t{16})), threads, [&](int64_t begin, int64_t end) {
    const Scratch<uint64_t> scratch(buffers.capacity + select_slack);
    for (int64_t r = begin; r < end; ++r) {
      const float* const products = op.products + r * op.products_stride;
      Candidates row{buffers.keys + r * buffers.capacity, buffers.counts[r], buffers.capacity - select_slack, buffers.keep,
                     buffers.thresholds[r]};
      // Columns [hidden, shown) are not this query's to find.
      int64_t hidden = op.columns, shown = op.columns;
      if (op.excluded) {
        hidden = larger(0, smaller(op.columns, op.excluded[2 * r] - op.first_id));
        shown = larger(hidden, smaller(op.columns, op.excluded[2 * r + 1] - op.first_id));
      }
      const uint32_t first_id = static_cast<uint32_t>(op.first_id);
      filter_columns(products, op.norms, 0, hidden, first_id, row, scratch.data);
      filter_columns(products, op.norms, shown, op.columns, first_id, row, scratch.data);
      buffers.counts[r] = static_cast<int32_t>(row.count);
      buffers.thresholds[r] = row.threshold;
    }
  });
  return {};
}

Status topk_filter_refine(const TopkFilterRefine& op, const Launch& launch) {
  const TopkBuffers& buffers = op.buffers;
  const int threads = threads_for(op.rows * buffers.keep * op.dim, launch.threads);
  const float16* const stored = static_cast<const float16*>(op.stored);
  // Candidates lie anywhere among the stored rows: visited query by query each would come from main memory. Instead a group of
  // queries goes through the stored rows block by block, a block small enough for the second-level cache; but not so small that
  // a query has less than a few candidates in it, for then finding them would be the work.
  constexpr int64_t group = 512;
  constexpr int64_t block_bytes = 512 << 10;
  const int64_t block = larger(larger(1, block_bytes / (2 * op.dim)), op.stored_rows * 4 / larger(1, buffers.keep));
  parallel(op.rows, larger(1, smaller(group, (op.rows + threads - 1) / threads)), threads, [&](int64_t begin, int64_t end) {
    const Scratch<uint64_t> scratch(buffers.capacity + select_slack);
    const Scratch<int64_t> next(end - begin);  // each query's first candidate that is not in an earlier block
    for (int64_t r = begin; r < end; ++r) {
      Candidates row{buffers.keys + r * buffers.capacity, buffers.counts[r], buffers.capacity - select_slack, buffers.keep, 0};
      row.cut(scratch.data);
      buffers.counts[r] = static_cast<int32_t>(row.count);
      radix_sort(row.keys, row.count, scratch.data, 32);
      int64_t i = 0;
      while (i < row.count && id_of(row.keys[i]) < op.first_id) ++i;
      next[r - begin] = i;
    }
    for (int64_t from = 0; from < op.stored_rows; from += block) {
      const int64_t to = op.first_id + smaller(op.stored_rows, from + block);
      for (int64_t r = begin; r < end; ++r) {
        uint64_t* const keys = buffers.keys + r * buffers.capacity;
        const int64_t count = buffers.counts[r];
        int64_t i = next[r - begin];
        for (; i < count && id_of(keys[i]) < to; ++i) {
          const int64_t id = id_of(keys[i]);
          const float distance = squared_distance(op.queries + r * op.dim, stored + (id - op.first_id) * op.stored_stride, op.dim);
          keys[i] = key_of(rank_of(distance), static_cast<uint32_t>(id));
        }
        next[r - begin] = i;
      }
    }
  });
  return {};
}

Status topk_filter_select(const TopkFilterSelect& op, const Launch& launch) {
  const TopkBuffers& buffers = op.buffers;
  const int threads = threads_for(op.rows * buffers.keep * 16, launch.threads);
  parallel(op.rows, larger(1, op.rows / (threads * int64_t{16})), threads, [&](int64_t begin, int64_t end) {
    const Scratch<uint64_t> scratch(buffers.capacity + select_slack);
    for (int64_t r = begin; r < end; ++r) {
      uint64_t* const keys = buffers.keys + r * buffers.capacity;
      int64_t count = buffers.counts[r];
      if (count > op.k) select_smallest(keys, count, op.k, scratch.data);
      count = smaller(count, op.k);
      radix_sort(keys, count, scratch.data);
      for (int64_t i = 0; i < op.k; ++i) {
        const bool found = i < count;
        op.distances[r * op.k + i] = found ? float_of_rank(static_cast<uint32_t>(keys[i] >> 32)) : INFINITY;
        op.ids[r * op.k + i] = found ? static_cast<int64_t>(keys[i] & 0xffffffffu) : -1;
      }
    }
  });
  return {};
}

}  // namespace memdec::MEMDEC_LEVEL
