// alignment_loss: β·KL(q‖p) + (1−β)·CE of p = softmax(z) against a sparse teacher q and a label y, and its gradient.
//
// With m = Σ q, log p(v) = (z_v − max) − log s, s = Σ exp(z − max):
//
//     kl      = Σ q·(log q − log p)              over the |q| entries of the row; q = 0 adds 0, q > 0 on a masked token +inf
//     ce      = −log p(y)
//     dL/dz   = (β·m + 1 − β)·p − β·q − (1−β)·onehot(y)
//
// Of a row's gradient, scale·exp(z − max) is written everywhere; then the |q| + 1 places that differ are overwritten with what
// was computed for them in float32 before anything was written: the gradient may lie over the logits.
//
// Traffic: the loss reads a row once. With the gradient it reads it again, as far as possible in shared memory, the rest hoped for in
// the second-level cache, and writes it.
// The separate backward pass reads once and writes once. Beside that 4 bytes an entry go through the workspace.
//
// Many rows: a block a row, from end to end. Few rows: their spans are reduced first (softmax.cuh), then a block a row makes the
// losses and the corrections, then a block a span writes the gradient.
#include "cuda/softmax.cuh"

namespace memdec::cuda {
namespace {

// Blocks that a multiprocessor must hold at once. More is the compiler's own aim, and it spills registers for it.
template <class T>
constexpr int blocks_at_once = sizeof(T) == 4 ? 2 : 3;

// What is common to AlignmentLoss and AlignmentGradient.
struct Job {
  Rows logits;
  const int64_t* labels;
  int64_t ignore_index;
  SparseRows teacher;
  float beta;
  Reduction reduction;
  const float* known_max;  // (N,) of each row, from an earlier pass, or null: the rows are read for it
  const float* known_sum;  // (N,)
  float* max;              // (N,) out, or null
  float* sum;              // (N,) out, or null
  float* losses[3];        // total, kl, ce, out, or null
  Rows grad;               // data null: none is wanted
  const float* grad_weight;    // a factor of the gradient, or null: 1
  int64_t grad_weight_stride;  // from row to row: 0 or 1
};

// What a row's gradient is but for the corrections: scale·exp(z − max), or 0 everywhere.
struct Slope {
  float max;
  float scale;
  float at_label;  // the gradient at the label, unless that is one of the teacher's entries
  bool has_label;  // it is one
  bool is_zero;
};

// What the kernels of one call leave each other.
struct Scratch {
  Softmax<float>* states;  // of split rows, see softmax.cuh
  int64_t* kept;           // (1,) rows that are not ignored, for Reduction::mean
  float* row_losses;       // (2, N) kl and ce of each row, where they are to be summed
  float* corrected;        // (nnz,) the gradient at the teacher's entries
  Slope* slopes;           // (N,) of split rows
};

Scratch scratch_of(const Job& job, Parts& parts) {
  const bool split = is_split(job.logits), reduced = job.losses[0] && job.reduction != Reduction::none;
  Scratch scratch{};
  if (split && !job.known_max) scratch.states = parts.take<Softmax<float>>(split_states(job.logits));
  if (job.reduction == Reduction::mean) scratch.kept = parts.take<int64_t>(1);
  if (reduced) scratch.row_losses = parts.take<float>(2 * job.logits.count);
  if (job.grad.data) scratch.corrected = parts.take<float>(job.teacher.indptr ? job.teacher.nnz : 0);
  if (job.grad.data && split) scratch.slopes = parts.take<Slope>(job.logits.count);
  return scratch;
}

// One row's part of the target: entries [begin, end) of the teacher, wherever its row pointers point.
struct Target {
  int64_t begin;
  int64_t end;
  int64_t label;
  bool label_is_known;  // in [0, V)
};

__device__ inline Target target_of_row(const Job& job, int64_t r) {
  Target target{0, 0, job.labels[r], false};
  target.label_is_known = target.label >= 0 && target.label < job.logits.columns;
  if (!job.teacher.indptr) return target;
  target.begin = larger(0, smaller(job.teacher.indptr[r], job.teacher.nnz));
  target.end = larger(target.begin, smaller(job.teacher.indptr[r + 1], job.teacher.nnz));
  return target;
}

__device__ inline bool is_token(const Job& job, int32_t id) { return id >= 0 && id < job.logits.columns; }

// c·x, where a coefficient of exactly 0 drops an infinite term (β of 0 or 1 leaves one loss only), but not a NaN.
__device__ inline float weighted(float c, float x) { return c == 0 && x == x ? 0 : c * x; }

__device__ inline double share_of_rows(const Job& job, const Scratch& scratch) {
  return job.reduction == Reduction::mean ? 1.0 / static_cast<double>(larger(*scratch.kept, 1)) : 1.0;
}

// What the gradient of row r's loss is multiplied with.
__device__ inline float weight_of_row(const Job& job, const Scratch& scratch, int64_t r) {
  const double weight = job.grad_weight ? static_cast<double>(job.grad_weight[r * job.grad_weight_stride]) : 1.0;
  return static_cast<float>(weight * share_of_rows(job, scratch));
}

// Sums over a row's entries.
struct Sums {
  float mass;
  float kl;
  uint32_t has_label;  // the label is one of the entries

  static __device__ Sums merge(Sums a, Sums b) { return {a.mass + b.mass, a.kl + b.kl, a.has_label | b.has_label}; }
};

template <class T>
__device__ inline Sums sums_of_row(const Job& job, const T* z, const Target& target, Softmax<float> state) {
  Sums sums{};
  const float log_sum = logarithm(state.sum);
  for (int64_t i = target.begin + threadIdx.x; i < target.end; i += wide_threads) {
    const int32_t id = job.teacher.ids[i];
    const float q = job.teacher.probs[i];
    if (!is_token(job, id)) {
      sums.kl = NAN;
      continue;
    }
    sums.mass += q;
    if (q != 0) sums.kl += q * (logarithm(q) - ((widened(z[id]) - state.max) - log_sum));
    sums.has_label |= id == target.label;
  }
  return reduce_block<wide_threads>(sums, Sums::merge);
}

// The row's slope, and its gradient at the teacher's entries; reads of z all that write_entries will overwrite.
template <class T>
__device__ inline Slope corrections(const Job& job, const Scratch& scratch, const T* z, const Target& target, Softmax<float> state,
                                    const Sums& sums, float weight) {
  const float pull = weight * job.beta, label_pull = weight * (1 - job.beta);
  Slope slope{state.max, weight * (job.beta * sums.mass + (1 - job.beta)) / state.sum, 0, sums.has_label != 0, false};
  if (!target.label_is_known) slope.scale = NAN;
  for (int64_t i = target.begin + threadIdx.x; i < target.end; i += wide_threads) {
    const int32_t id = job.teacher.ids[i];
    if (!is_token(job, id)) continue;
    const float p = exponential(widened(z[id]) - slope.max) * slope.scale;
    scratch.corrected[i] = (p - pull * job.teacher.probs[i]) - (id == target.label ? label_pull : 0);
  }
  if (target.label_is_known) slope.at_label = exponential(widened(z[target.label]) - slope.max) * slope.scale - label_pull;
  return slope;
}

// Span `span` of a row's gradient, but for the corrections.
template <class T>
__device__ inline void write_slope(const T* z, T* grad, int64_t columns, int64_t span, const Slope& slope) {
  const int64_t lead = lead_of(grad);
  float value[share_size] = {};
  if (!slope.is_zero) {
    load_share<wide_threads>(z, columns, span, value, lead);
#pragma unroll
    for (int i = 0; i < share_size; ++i) value[i] = decay(value[i] - slope.max) * slope.scale;
  }
  store_share<wide_threads>(grad, columns, span, value, lead);
}

// The corrections in columns [from, to), over what write_slope wrote there: a barrier lies between the two.
template <class T>
__device__ inline void write_entries(const Job& job, const Scratch& scratch, T* grad, const Target& target, const Slope& slope,
                                     int64_t from, int64_t to) {
  for (int64_t i = target.begin + threadIdx.x; i < target.end; i += wide_threads) {
    const int32_t id = job.teacher.ids[i];
    if (is_token(job, id) && id >= from && id < to) grad[id] = narrowed<T>(scratch.corrected[i]);
  }
  const bool here = target.label_is_known && !slope.has_label && target.label >= from && target.label < to;
  if (here && threadIdx.x == 0) grad[target.label] = narrowed<T>(slope.at_label);
}

__device__ inline void write_losses(const Job& job, const Scratch& scratch, int64_t r, float kl, float ce) {
  if (scratch.row_losses) {
    scratch.row_losses[r] = kl;
    scratch.row_losses[job.logits.count + r] = ce;
  } else if (job.losses[0]) {
    job.losses[0][r] = weighted(job.beta, kl) + weighted(1 - job.beta, ce);
    job.losses[1][r] = kl;
    job.losses[2][r] = ce;
  }
}

// A block a row, whose first `copied` spans fit into shared memory: its losses, and its gradient, or (where rows are split) what
// write_gradient_of_spans needs for it.
template <class T>
__global__ void __launch_bounds__(wide_threads, blocks_at_once<T>) align_rows(Job job, Scratch scratch, int64_t copied) {
  const int64_t r = blockIdx.x, columns = job.logits.columns;
  const T* const z = row_of<const T>(job.logits, r);
  const Copy<T> copy(z, copied);
  const Target target = target_of_row(job, r);
  const bool ignored = target.label == job.ignore_index;
  Softmax<float> state{0, 0};
  Slope slope{0, 0, 0, false, true};
  if (ignored) {
    if (threadIdx.x == 0) write_losses(job, scratch, r, 0, 0);
  } else {
    copy.begin(z, columns);
    state = job.known_max ? Softmax<float>{job.known_max[r], job.known_sum[r]} : softmax_of_row<T>(job.logits, r, scratch.states, copy);
    const Sums sums = sums_of_row(job, z, target, state);
    if (threadIdx.x == 0)
      write_losses(job, scratch, r, sums.kl, target.label_is_known ? -state.log_prob(widened(z[target.label])) : NAN);
    if (job.grad.data) slope = corrections(job, scratch, z, target, state, sums, weight_of_row(job, scratch, r));
  }
  if (threadIdx.x == 0 && job.max) job.max[r] = state.max;
  if (threadIdx.x == 0 && job.sum) job.sum[r] = state.sum;
  if (!job.grad.data) return;
  if (scratch.slopes) {
    if (threadIdx.x == 0) scratch.slopes[r] = slope;
    return;
  }
  T* const grad = row_of<T>(job.grad, r);
  __syncthreads();  // every thread has read the logits that it needs from others' columns
  for (int64_t span = 0; span < spans_of<wide_threads>(columns + lead_of(grad)); ++span)
    write_slope(span < copy.spans ? copy.column : z, grad, columns, span, slope);
  __syncthreads();  // the slope is written, and can be written over
  if (!ignored) write_entries(job, scratch, grad, target, slope, 0, columns);
}

// A block a span of the split rows' gradients.
template <class T>
__global__ void __launch_bounds__(wide_threads, blocks_at_once<T>) write_gradient_of_spans(Job job, Scratch scratch) {
  const int64_t columns = job.logits.columns, spans = spans_of<wide_threads>(columns + width_of<T>);
  const int64_t r = blockIdx.x / spans, span = blockIdx.x % spans;
  const Slope slope = scratch.slopes[r];
  T* const grad = row_of<T>(job.grad, r);
  write_slope(row_of<const T>(job.logits, r), grad, columns, span, slope);
  __syncthreads();  // the slope is written, and can be written over
  const int64_t from = span * wide_columns - lead_of(grad);
  if (!slope.is_zero) write_entries(job, scratch, grad, target_of_row(job, r), slope, from, from + wide_columns);
}

// One block: how many rows are not ignored.
__global__ void __launch_bounds__(wide_threads) count_kept(Job job, Scratch scratch) {
  int64_t kept = 0;
  for (int64_t r = threadIdx.x; r < job.logits.count; r += wide_threads) kept += job.labels[r] != job.ignore_index;
  kept = sum_over_block<wide_threads>(kept);
  if (threadIdx.x == 0) *scratch.kept = kept;
}

// One block: the sum or the mean of the rows' losses, in float64.
__global__ void __launch_bounds__(wide_threads) reduce_losses(Job job, Scratch scratch) {
  double part[2] = {};
  for (int64_t r = threadIdx.x; r < job.logits.count; r += wide_threads)
    for (int i = 0; i < 2; ++i) part[i] += static_cast<double>(scratch.row_losses[i * job.logits.count + r]);
  const double share = share_of_rows(job, scratch);
  const float kl = static_cast<float>(sum_over_block<wide_threads>(part[0]) * share);
  const float ce = static_cast<float>(sum_over_block<wide_threads>(part[1]) * share);
  if (threadIdx.x != 0) return;
  *job.losses[0] = weighted(job.beta, kl) + weighted(1 - job.beta, ce);
  *job.losses[1] = kl;
  *job.losses[2] = ce;
}

// The spans of a row that a block keeps in shared memory.
template <class T>
int64_t copied_spans(const Job& job, const Scratch& scratch, int device) {
  if (job.known_max || scratch.states) return 0;  // they are read once
  constexpr int64_t span_bytes = wide_columns * static_cast<int64_t>(sizeof(T));
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return smaller(spans_of<wide_threads>(job.logits.columns), (most / blocks_at_once<T> - 1536) / span_bytes);  // what else a block takes is less
}

Job job_of(const AlignmentLoss& op) {
  return {.logits = op.logits,
          .labels = op.labels,
          .ignore_index = op.ignore_index,
          .teacher = op.teacher,
          .beta = static_cast<float>(op.beta),
          .reduction = op.reduction,
          .known_max = nullptr,
          .known_sum = nullptr,
          .max = static_cast<float*>(op.max),
          .sum = static_cast<float*>(op.sum),
          .losses = {static_cast<float*>(op.total), static_cast<float*>(op.kl), static_cast<float*>(op.ce)},
          .grad = op.grad,
          .grad_weight = static_cast<const float*>(op.grad_weight),
          .grad_weight_stride = 0};
}

Job job_of(const AlignmentGradient& op) {
  return {.logits = op.logits,
          .labels = op.labels,
          .ignore_index = op.ignore_index,
          .teacher = op.teacher,
          .beta = static_cast<float>(op.beta),
          .reduction = op.reduction,
          .known_max = static_cast<const float*>(op.max),
          .known_sum = static_cast<const float*>(op.sum),
          .max = nullptr,
          .sum = nullptr,
          .losses = {},
          .grad = op.grad,
          .grad_weight = static_cast<const float*>(op.grad_total),
          .grad_weight_stride = op.reduction == Reduction::none ? 1 : 0};
}

int64_t bytes_of(const Job& job) {
  Parts parts(nullptr);
  scratch_of(job, parts);
  return parts.bytes();
}

Status run(const Job& job, const Launch& where) {
  return on_device(where, job.logits.dtype, "logits", [&]<class T>(T, cudaStream_t stream) {
    Parts parts(where.workspace);
    const Scratch scratch = scratch_of(job, parts);
    const int64_t rows = job.logits.count;
    if (scratch.kept) launch(count_kept, 1, wide_threads, 0, stream, job, scratch);
    if (rows > 0) {
      if (scratch.states) launch_split_softmax<T>(job.logits, scratch.states, stream);
      const int64_t copied = copied_spans<T>(job, scratch, where.device), shared_bytes = Copy<T>::bytes(copied);
      cudaFuncSetAttribute(align_rows<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
      launch(align_rows<T>, rows, wide_threads, static_cast<size_t>(shared_bytes), stream, job, scratch, copied);
      if (scratch.slopes)
        launch(write_gradient_of_spans<T>, rows * spans_of<wide_threads>(job.logits.columns + width_of<T>), wide_threads, 0, stream, job,
               scratch);
    }
    if (job.losses[0] && job.reduction != Reduction::none) launch(reduce_losses, 1, wide_threads, 0, stream, job, scratch);
  });
}

}  // namespace

int64_t workspace_bytes(const AlignmentLoss& op) { return bytes_of(job_of(op)); }
int64_t workspace_bytes(const AlignmentGradient& op) { return bytes_of(job_of(op)); }

Status alignment_loss(const AlignmentLoss& op, const Launch& where) { return run(job_of(op), where); }
Status alignment_gradient(const AlignmentGradient& op, const Launch& where) { return run(job_of(op), where); }

}  // namespace memdec::cuda
