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
// Traffic: the loss reads a row once. With the gradient it reads it again, in shared memory where it fits, the rest in the second-level
// cache, and writes it. The separate backward pass reads once and writes once. Beside that 4 bytes an entry go through the workspace.
//
// Many rows: as many blocks as the device holds at once, each of which goes through its rows from end to end. While it writes a
// span of one row's gradient, the same span of its next row comes to the place in shared memory that has just been read, so
// memory is read all the time. Few rows: their spans are reduced first (softmax.cuh), then a block a row makes the
// losses and the corrections, then a block a span writes the gradient.
#include "cuda/softmax.cuh"

namespace memdec::cuda {
namespace {

// Blocks that a multiprocessor must hold at once. More is the compiler's own aim, and it spills registers for it.
template <class T, int threads>
constexpr int blocks_at_once = (sizeof(T) == 4 ? 512 : threads == wide_threads ? 768 : 1024) / threads;

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

// A thread's first entry of a row, kept in shared memory, for that thread alone: asked of memory again and again, each time while all
// others wait, it took a third of a row's time. The value is q, and then the gradient there.
struct Entry {
  int32_t id;
  float value;
};

// Calls f(i, id, q) for this thread's entries, every threads-th of a row's; before the first one's value is replaced.
template <int threads, class F>
__device__ inline void for_each_entry(const Job& job, const Target& target, const Entry& first, const F& f) {
  int64_t i = target.begin + threadIdx.x;
  if (i < target.end) f(i, first.id, first.value);
  for (i += threads; i < target.end; i += threads) f(i, job.teacher.ids[i], job.teacher.probs[i]);
}

// `logit`: of a column, as a float.
template <int threads, class Logit>
__device__ inline Sums sums_of_row(const Job& job, const Logit& logit, const Target& target, const Entry& first, Softmax<float> state) {
  Sums sums{};
  const float log_sum = logarithm(state.sum);
  for_each_entry<threads>(job, target, first, [&](int64_t, int32_t id, float q) {
    if (!is_token(job, id)) {
      sums.kl = NAN;
      return;
    }
    sums.mass += q;
    if (q != 0) sums.kl += q * (logarithm(q) - ((logit(id) - state.max) - log_sum));
    sums.has_label |= id == target.label;
  });
  return reduce_block<threads>(sums, Sums::merge);
}

// The row's slope, and its gradient at the teacher's entries; reads all logits that write_entries will overwrite.
template <int threads, class Logit>
__device__ inline Slope corrections(const Job& job, const Scratch& scratch, const Logit& logit, const Target& target, Entry& first,
                                    Softmax<float> state, const Sums& sums, float weight) {
  const float pull = weight * job.beta, label_pull = weight * (1 - job.beta);
  Slope slope{state.max, weight * (job.beta * sums.mass + (1 - job.beta)) / state.sum, 0, sums.has_label != 0, false};
  if (!target.label_is_known) slope.scale = NAN;
  for_each_entry<threads>(job, target, first, [&](int64_t i, int32_t id, float q) {
    if (!is_token(job, id)) return;
    const float p = exponential(logit(id) - slope.max) * slope.scale;
    const float corrected = (p - pull * q) - (id == target.label ? label_pull : 0);
    if (i < target.begin + threads && !scratch.slopes) first.value = corrected;
    else scratch.corrected[i] = corrected;
  });
  if (target.label_is_known) slope.at_label = exponential(logit(target.label) - slope.max) * slope.scale - label_pull;
  return slope;
}

// Span `span` of a row's gradient, but for the corrections.
template <int threads, class T>
__device__ inline void write_slope(const T* z, T* grad, int64_t columns, int64_t span, const Slope& slope, uint64_t policy) {
  constexpr int w = width_of<T>;
  const int64_t lead = lead_of(grad);
  const int64_t begin = span * columns_in_span<threads> - lead, end = begin + columns_in_span<threads>;
  // Calls whole(c) for the thread's vectors at columns c that lie from `margin` up to `margin` short of the end, one(c) for other columns.
  const auto for_each_column = [&](int64_t margin, const auto& whole, const auto& one) {
#pragma unroll 1
    for (int64_t c = column_of<T, threads>(span, 0) - lead; c < smaller(end, columns); c += threads * w) {
      if (c >= margin && c + w + margin <= columns) {
        whole(c);
      } else {
#pragma unroll 1
        for (int64_t i = larger(c, 0); i < smaller(c + w, columns); ++i) one(i);
      }
    }
  };
  if (slope.is_zero) {
    for_each_column(0, [&](int64_t c) { store_aligned(grad + c, uint4{}, policy); }, [&](int64_t i) { grad[i] = T{}; });
    return;
  }
  const auto sloped = [&](float x) { return decay(x - slope.max) * slope.scale; };
  const auto write_all = [&]<int at_once>(const auto& load, int64_t margin) {
    const auto write = [&](int64_t c, uint4 raw) {
      float value[w];
      unpack(T{}, raw, value);
#pragma unroll
      for (int i = 0; i < w; ++i) value[i] = sloped(value[i]);
      store_aligned(grad + c, pack(T{}, value), policy);
    };
    if (begin >= margin && end + margin <= columns) {
#pragma unroll
      for (int v = 0; v < share_size / w; v += at_once) {
        uint4 raw[at_once];  // so many loads are under way before the first value is used
        const int64_t c = column_of<T, threads>(span, v * w) - lead;
#pragma unroll
        for (int i = 0; i < at_once; ++i) raw[i] = load(z + c + i * threads * w);
#pragma unroll
        for (int i = 0; i < at_once; ++i) write(c + i * threads * w, raw[i]);
      }
    } else {
      for_each_column(margin, [&](int64_t c) { write(c, load(z + c)); }, [&](int64_t i) { grad[i] = narrowed<T>(sloped(widened(z[i]))); });
    }
  };
  if (is_aligned(z - lead)) {
    write_all.template operator()<share_size / w>([](const T* address) { return load_aligned(address); }, 0);
  } else {
    write_all.template operator()<2>([](const T* address) { return load_across(address); }, w);  // more wants more registers than there are
  }
}

// The corrections in columns [from, to), over what write_slope wrote there: a barrier lies between the two. `first`: null, or where
// the thread's first entry is.
template <int threads, class T>
__device__ inline void write_entries(const Job& job, const Scratch& scratch, T* grad, const Target& target, const Entry* first,
                                     const Slope& slope, int64_t from, int64_t to) {
  int64_t i = target.begin + threadIdx.x;
  const auto write = [&](int32_t id, const float& corrected) {
    if (is_token(job, id) && id >= from && id < to) grad[id] = narrowed<T>(corrected);
  };
  if (first) {
    if (i < target.end) write(first->id, first->value);
    i += threads;
  }
  for (; i < target.end; i += threads) write(job.teacher.ids[i], scratch.corrected[i]);
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

// Asks for what will be read of a row from memory later: what is not in shared memory, as far as the cache has room for that of
// every block.
template <int threads, class T>
__device__ inline void fetch_row(const T* z, int64_t columns, int64_t from) {
  constexpr int64_t step = 32 / static_cast<int64_t>(sizeof(T)), most = (int64_t{128} << 10) / static_cast<int64_t>(sizeof(T));
#pragma unroll 1
  for (int64_t c = from + threadIdx.x * step; c < smaller(columns, from + most); c += threads * step) fetch_to_cache(z + c);
}

// What the threads of a block need to know of a row, kept for them in shared memory: registers are scarce.
template <class T>
struct Known {
  int64_t r;
  const T* z;
  T* grad;  // or null
  Target target;
  bool is_ignored;
  float weight;
  Slope slope;
};

// Every gridDim.x-th row is a block's: its losses, and its gradient, or (where rows are split) what write_gradient_of_spans needs for
// it. Its first `copied` spans are in shared memory, from where each thread takes its own share for the gradient, and at once
// begins to copy the same share of the next row to the same place.
template <class T, int threads>
__global__ void __launch_bounds__(threads, blocks_at_once<T, threads>) align_rows(Job job, Scratch scratch, int64_t copied) {
  const int64_t rows = job.logits.count, columns = job.logits.columns;
  const uint64_t policy = cache_policy(copied < spans_of<threads>(columns));  // what is read once goes, what is read again stays
  // Of four rows of the block, the last in the place of the first: while a warp looks up the next but one, no thread can be
  // further back than the one before.
  struct Four {
    Known<T> row[4];
  };
  const auto known_of = [&](unsigned i) -> Known<T>& { return shared<Four>().row[i % 4]; };
  const auto know = [&](unsigned i, int64_t r) {
    known_of(i).r = r;
    if (r >= rows) return;
    const Target target = target_of_row(job, r);
    T* const grad = job.grad.data ? row_of<T>(job.grad, r) : nullptr;
    const float weight = grad ? weight_of_row(job, scratch, r) : 0;
    known_of(i) = {r, row_of<const T>(job.logits, r), grad, target, target.label == job.ignore_index, weight, {}};
  };
  // This thread's first entry of a row, and of the next one.
  struct Two {
    Entry entry[2][threads];
  };
  const auto first_of = [&](unsigned i) -> Entry& { return shared<Two>().entry[i % 2][threadIdx.x]; };
  const auto begin_entry = [&](const Target& target, Entry& entry) {  // in the group of copies that is open
    const int64_t at = target.begin + threadIdx.x;
    if (at >= target.end) return;
    copy_number_behind(&entry.id, job.teacher.ids + at);
    copy_number_behind(&entry.value, job.teacher.probs + at);
  };
  if (threadIdx.x == 0) {
    know(0, blockIdx.x);
    know(1, int64_t{blockIdx.x} + gridDim.x);
  }
  __syncthreads();

  bool is_copied = false;  // the row before has seen to it
  for (unsigned i = 0; known_of(i).r < rows; ++i) {
    Known<T>& known = known_of(i);
    const int64_t r = known.r;
    const Known<T>& known_of_next = known_of(i + 1);

    const T* const z = in_global_memory(known.z);
    const Copy<T, threads> copy(z, copied);
    Entry& first = first_of(i);
    if (!is_copied && !known.is_ignored) {
      begin_entry(known.target, first);
      if (copied == 0) end_group();
      for (int64_t span = 0; span < copied; ++span) copy.begin(z, columns, span, policy);
      if (const int64_t c = copy.edge(z, columns); c >= 0) copy.column[c] = z[c];
    }
    const auto logit = [&](int64_t c) { return widened(c < copy.columns() ? copy.column[c] : z[c]); };
    Softmax<float> state{0, 0};
    Slope slope{0, 0, 0, false, true};
    if (known.is_ignored) {
      if (threadIdx.x == 0) write_losses(job, scratch, r, 0, 0);
    } else {
      if (copied > 0) fetch_row<threads>(z, columns, copy.columns());
      state = job.known_max ? Softmax<float>{job.known_max[r], job.known_sum[r]}
                            : softmax_of_row<T, threads>(job.logits, r, z, scratch.states, copy);
      if (copied == 0) wait_for_groups(0);
      const Target& target = known.target;
      const Sums sums = sums_of_row<threads>(job, logit, target, first, state);
      if (threadIdx.x == 0) write_losses(job, scratch, r, sums.kl, target.label_is_known ? -state.log_prob(logit(target.label)) : NAN);
      if (job.grad.data) slope = corrections<threads>(job, scratch, logit, target, first, state, sums, known.weight);
    }
    if (threadIdx.x == 0) {
      if (job.max) job.max[r] = state.max;
      if (job.sum) job.sum[r] = state.sum;
      if (scratch.slopes) scratch.slopes[r] = slope;
      known.slope = slope;
    }
    if (scratch.slopes) return;  // split rows have a block each

    T* const grad = in_global_memory(known.grad);
    __syncthreads();  // every thread has read the logits that it needs from others' columns
    if (threadIdx.x == threads - warp_size) know(i + 2, r + 2 * int64_t{gridDim.x});
    // A gradient at another alignment is read from others' places of the copy, too: then the next row must wait.
    is_copied = copied > 0 && known_of_next.r < rows && grad && lead_of(grad) == lead_of(z);
    const bool follows = is_copied && !known_of_next.is_ignored;
    const T* const next_z = follows ? in_global_memory(known_of_next.z) : z;
    const Copy<T, threads> next(next_z, copied);
    const int64_t edge = follows ? next.edge(next_z, columns) : -1;
    const T at_edge = edge >= 0 ? next_z[edge] : T{};
    if (follows) begin_entry(known_of_next.target, first_of(i + 1));
    if (grad) {
      // What was read last is the likeliest to be in the cache.
      const uint64_t end = static_cast<uint64_t>(columns + lead_of(grad));
      for (int64_t span = static_cast<int64_t>(end / columns_in_span<threads>); span >= copied; --span)
        write_slope<threads>(z, grad, columns, span, slope, policy);
      for (int64_t span = 0; span < copied; ++span) {
        write_slope<threads>(copy.column, grad, columns, span, slope, policy);
        if (follows) next.begin(next_z, columns, span, policy);
      }
    }
    __syncthreads();  // the slope is written, and can be written over; so can all of the copy
    if (follows)
      if (const int64_t c = next.edge(known_of_next.z, columns); c >= 0) next.column[c] = at_edge;
    if (grad && !known.is_ignored) write_entries<threads>(job, scratch, grad, known.target, &first_of(i), known.slope, 0, columns);
  }
}

// A block a span of the split rows' gradients.
template <class T>
__global__ void __launch_bounds__(wide_threads, blocks_at_once<T, wide_threads>) write_gradient_of_spans(Job job, Scratch scratch) {
  const int64_t columns = job.logits.columns, spans = spans_of<wide_threads>(columns + width_of<T>);
  const int64_t r = blockIdx.x / spans, span = blockIdx.x % spans;
  const Slope slope = scratch.slopes[r];
  T* const grad = row_of<T>(job.grad, r);
  write_slope<wide_threads>(row_of<const T>(job.logits, r), grad, columns, span, slope, cache_policy(false));
  __syncthreads();  // the slope is written, and can be written over
  const int64_t from = span * columns_in_span<wide_threads> - lead_of(grad);
  if (!slope.is_zero) write_entries<wide_threads>(job, scratch, grad, target_of_row(job, r), nullptr, slope, from,
                                                     from + columns_in_span<wide_threads>);
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

// The blocks of align_rows, and how many of a row's spans each keeps in shared memory.
struct Blocks {
  int64_t count;
  int64_t copied;
};

// As many a multiprocessor as leave no more of their rows out of shared memory than the second-level cache holds until they come
// back for it, with what passes through it meanwhile.
template <class T, int threads>
Blocks blocks_of(const Job& job, const Scratch& scratch, int device) {
  if (job.known_max || scratch.states || !job.grad.data) return {job.logits.count, 0};  // rows are read once, or not at all
  int shared_bytes = 0, cache_bytes = 0, processors = 0;
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t columns = job.logits.columns, spans = spans_of<threads>(columns);
  for (int blocks = blocks_at_once<T, threads>;; --blocks) {
    const int64_t room = shared_bytes / blocks - 1536 - 2 * threads * static_cast<int64_t>(sizeof(Entry));  // what else a block takes is less
    int64_t copied = spans;
    while (Copy<T, threads>::bytes(columns, copied) > room) --copied;
    const int64_t left = larger(0, columns - copied * columns_in_span<threads>) * static_cast<int64_t>(sizeof(T));
    if (blocks == 1 || left * blocks * processors <= cache_bytes / 4)
      return {copied > 0 ? smaller(job.logits.count, int64_t{blocks} * processors) : job.logits.count, copied};
  }
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

template <class T, int threads>
void run_rows(const Job& job, const Scratch& scratch, int device, cudaStream_t stream) {
  if (scratch.states) launch_split_softmax<T, threads>(job.logits, scratch.states, stream);
  const Blocks blocks = blocks_of<T, threads>(job, scratch, device);
  const int64_t shared_bytes = Copy<T, threads>::bytes(job.logits.columns, blocks.copied);
  cudaFuncSetAttribute(align_rows<T, threads>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  launch(align_rows<T, threads>, blocks.count, threads, static_cast<size_t>(shared_bytes), stream, job, scratch, blocks.copied);
  if (scratch.slopes)
    launch(write_gradient_of_spans<T>, job.logits.count * spans_of<wide_threads>(job.logits.columns + width_of<T>), wide_threads, 0, stream,
           job, scratch);
}

Status run(const Job& job, const Launch& where) {
  return on_device(where, job.logits.dtype, "logits", [&]<class T>(T, cudaStream_t stream) {
    Parts parts(where.workspace);
    const Scratch scratch = scratch_of(job, parts);
    if (scratch.kept) launch(count_kept, 1, wide_threads, 0, stream, job, scratch);
    if (job.logits.count > 0) {
      if (threads_for(job.logits) == wide_threads) run_rows<T, wide_threads>(job, scratch, where.device, stream);
      else run_rows<T, widest_threads>(job, scratch, where.device, stream);
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
