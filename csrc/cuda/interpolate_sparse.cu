// interpolate_sparse: the kNN-LM, log(α·(q + (1−m)·p) + (1−α)·p) with p = softmax(base), q a sparse row and m = Σq its mass:
//   log p(v) + log(1 − α·m)                                     where q has no v
//   logaddexp(log p(v) + log(1 − α·m), log(α·q(v)))             where it has
//
// Traffic: each logit is read twice, each log-prob written once.
#include "cuda/spans.cuh"

namespace memdec::cuda {
namespace {

// A row that lacks less than this of the whole has lost it to rounding: at α = 1 the base has no part in it.
constexpr double whole_mass = 1 - 1e-6;

// What the blocks of a row need of it.
struct Law {
  int64_t begin;  // the teacher's entries, wherever its row pointers point
  int64_t end;
  double alpha;  // NaN if it is not in [0, 1]: the host could not look at it
  float max;
  float scale;
  bool unused;  // the base has no part in the row

  // Of a token that the teacher has not.
  __device__ float log_prob(float z) const { return unused ? -INFINITY : (z - max) + scale; }
};

// A warp a row.
__global__ void __launch_bounds__(warp_size) merge_rows(InterpolateSparse op, const Softmax<float>* states, Law* laws) {
  let_next_kernel_start();
  const int64_t r = blockIdx.x, spans = spans_of(op.base.columns);
  Law law{};
  law.begin = larger(0, smaller(op.teacher.indptr[r], op.teacher.nnz));
  law.end = larger(law.begin, smaller(op.teacher.indptr[r + 1], op.teacher.nnz));
  double mass = 0;
  for (int64_t i = law.begin + threadIdx.x; i < law.end; i += warp_size) mass += static_cast<double>(op.teacher.probs[i]);
  mass = reduce_warp(mass, [](double a, double b) { return a + b; });
  const double given = op.alphas ? op.alphas[r] : op.alpha;
  law.alpha = given >= 0 && given <= 1 ? given : NAN;
  const double share = 1 - law.alpha * (mass >= whole_mass ? 1 : mass);
  law.unused = share <= 0;  // a NaN is not

  wait_for_kernel_before();
  const Softmax<float> state = merged_by_warp(spans, [&](int64_t i) { return states[r * spans + i]; });
  law.max = state.max;
  law.scale = state.sum > 0 ? logarithm(static_cast<float>(share)) - logarithm(state.sum) : NAN;
  if (threadIdx.x == 0) laws[r] = law;
}

// A block a span.
template <class T>
__global__ void __launch_bounds__(block_threads) write_log_probs(InterpolateSparse op, const Law* laws) {
  wait_for_kernel_before();
  const int64_t columns = op.base.columns, spans = spans_written(columns), r = blockIdx.x / spans, span = blockIdx.x % spans;
  const Law law = laws[r];
  const T* const z = row_of<const T>(op.base, r);
  float* const out = static_cast<float*>(op.log_probs) + r * columns;
  const int64_t lead = lead_of(out), from = span * span_columns - lead, to = smaller(columns, from + span_columns);
  float value[share_size];
  load_share(z, columns, span, value, lead);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] = law.log_prob(value[i]);
  store_floats<T>(out, columns, span, value, lead);
  if (!(law.alpha > 0)) return;
  __syncthreads();  // the base's part is written, and can be written over
  for (int64_t i = law.begin + threadIdx.x; i < law.end; i += block_threads) {
    const int32_t id = op.teacher.ids[i];
    if (id < 0 || id < from || id >= to) continue;
    const double teacher = log(law.alpha * static_cast<double>(op.teacher.probs[i]));
    out[id] = static_cast<float>(logaddexp(static_cast<double>(law.log_prob(widened(z[id]))), teacher));
  }
}

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states;
  Law* laws;
};

Scratch scratch_of(const InterpolateSparse& op, Parts& parts) {
  auto* const states = parts.take<Softmax<float>>(op.base.count * spans_of(op.base.columns));
  return {states, parts.take<Law>(op.base.count)};
}

}  // namespace

int64_t workspace_bytes(const InterpolateSparse& op) {
  Parts parts(nullptr);
  scratch_of(op, parts);
  return parts.bytes();
}

Status interpolate_sparse(const InterpolateSparse& op, const Launch& where) {
  const Rows& rows = op.base;
  return on_device(where, rows.dtype, "base_logits", [&]<class T>(T, cudaStream_t stream) {
    if (rows.count == 0) return;
    Parts parts(where.workspace);
    const Scratch scratch = scratch_of(op, parts);
    launch(reduce_spans_of_rows<T>, rows.count * spans_of(rows.columns), block_threads, 0, stream, rows, scratch.states);
    launch_early(merge_rows, rows.count, warp_size, 0, stream, op, scratch.states, scratch.laws);
    launch_early(write_log_probs<T>, rows.count * spans_written(rows.columns), block_threads, 0, stream, op, scratch.laws);
  });
}

}  // namespace memdec::cuda
