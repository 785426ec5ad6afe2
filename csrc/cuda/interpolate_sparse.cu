// interpolate_sparse: the kNN-LM, log(α·(q + (1−m)·p) + (1−α)·p) with p = softmax(base), q a sparse row and m = Σq its mass:
//   log p(v) + log(1 − α·m)                                     where q has no v
//   logaddexp(log p(v) + log(1 − α·m), log(α·q(v)))             where it has
//
// Traffic: each logit is read from memory once (for_each_step), each log-prob written once.
#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

// A row that lacks less than this of the whole has lost it to rounding: at α = 1 the base has no part in it.
constexpr double whole_mass = 1 - 1e-6;

template <class T>
__device__ inline void write_span(const InterpolateSparse& op, int64_t r, int64_t span, const Softmax<float>* states) {
  const int64_t columns = op.base.columns, spans = spans_of(columns);
  const Softmax<float> state = merged_by_warp(spans, [&](int64_t i) { return states[r * spans + i]; });
  // The teacher's entries, wherever its row pointers point.
  const int64_t begin = larger(0, smaller(op.teacher.indptr[r], op.teacher.nnz));
  const int64_t end = larger(begin, smaller(op.teacher.indptr[r + 1], op.teacher.nnz));
  double mass = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += block_threads) mass += static_cast<double>(op.teacher.probs[i]);
  mass = sum_over_block<block_threads>(mass);
  const double given = op.alphas ? op.alphas[r] : op.alpha;
  const double alpha = given >= 0 && given <= 1 ? given : NAN;  // the host could not look at it
  const double share = 1 - alpha * (mass >= whole_mass ? 1 : mass);

  const bool unused = share <= 0;  // a NaN is not
  const float scale = state.sum > 0 ? logarithm(static_cast<float>(share)) - logarithm(state.sum) : NAN;
  const auto log_prob = [&](float z) { return unused ? -INFINITY : (z - state.max) + scale; };
  const T* const z = row_of<const T>(op.base, r);
  float* const out = static_cast<float*>(op.log_probs) + r * columns;
  const int64_t lead = lead_of(out), from = span * span_columns - lead, to = smaller(columns, from + span_columns);
  float value[share_size];
  load_share(z, columns, span, value, lead);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = log_prob(value[i]);
  store_floats<T>(out, columns, span, value, lead);
  if (!(alpha > 0)) return;
  __syncthreads();  // the base's part is written, and can be written over
  for (int64_t i = begin + threadIdx.x; i < end; i += block_threads) {
    const int32_t id = op.teacher.ids[i];
    if (id < 0 || id < from || id >= to) continue;
    const double teacher = log(alpha * static_cast<double>(op.teacher.probs[i]));
    out[id] = static_cast<float>(logaddexp(static_cast<double>(log_prob(widened(z[id]))), teacher));
  }
}

// Blocks first for the spans that are written, from the states that the step before left, then for those that are read.
template <class T>
__global__ void __launch_bounds__(block_threads) interpolate_sparse_step(InterpolateSparse op, Softmax<float>* states, Group read,
                                                                        Group written) {
  const int64_t spans = spans_written(op.base.columns), writers = written.count * spans;
  if (blockIdx.x < writers) write_span<T>(op, written.first + blockIdx.x / spans, blockIdx.x % spans, states);
  else reduce_span<T>(op.base, read.first * spans_of(op.base.columns) + (blockIdx.x - writers), states);
}

}  // namespace

int64_t workspace_bytes(const InterpolateSparse& op) {
  return op.base.count * spans_of(op.base.columns) * static_cast<int64_t>(sizeof(Softmax<float>));
}

Status interpolate_sparse(const InterpolateSparse& op, const Launch& where) {
  const Rows& rows = op.base;
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    auto* const states = static_cast<Softmax<float>*>(where.workspace);
    for_each_step(where.device, rows.count, bytes_of_row(rows), [&](Group read, Group written) {
      const int64_t blocks = read.count * spans_of(rows.columns) + written.count * spans_written(rows.columns);
      launch(interpolate_sparse_step<T>, blocks, block_threads, 0, stream, op, states, read, written);
    });
  });
}

}  // namespace memdec::cuda
