// The whole C++ surface of memdec: plain pointers, sizes and strides in, a status out. No torch headers.
//
// Conventions
//   - An op is a struct of arguments and a function of the same name in lower case: TokenLogProb and token_log_prob. The
//     function reads the struct, writes through its output pointers and returns a Status. It never allocates an output.
//   - Logits come as Rows: any leading dimensions, folded to at most two strides, last dimension contiguous. Nothing is copied
//     to make rows contiguous or to convert bf16: kernels load the elements as they are.
//   - Everything that is small beside the logits (labels, targets, alpha, CSR arrays, outputs of one value a row) is contiguous;
//     what may be one value for all rows has a stride of 0 or 1 elements and says so.
//   - float32, bf16 and fp16 logits accumulate in float32 and give float32 outputs; float64 accumulates in and gives float64.
//     Output pointers that follow this rule are void*.
//   - Rows are independent, and a row that is split over threads is split at fixed columns and merged in order: results do
//     not depend on the thread count. On CUDA they depend neither on the other rows of a call nor on a row's alignment.
//   - On the CPU, index arguments are checked before anything is written. On CUDA they cannot be (the host would have to wait
//     for the device): a row whose label or target is out of range gets NaN, a teacher's entry out of range counts as NaN in
//     its row's losses and is dropped from its gradient, a draft or a draft's length out of range ends its round without a token.
//     On neither does an op read or write out of bounds.
//
// Adding an op to the CPU backend: the struct and function here; csrc/cpu/<op>.cpp, which defines
// memdec::MEMDEC_LEVEL::<op> and is listed in MEMDEC_CPU_OPS (CMakeLists.txt); one line in csrc/cpu/dispatch.cpp; a binding.
// csrc/cpu/token_log_prob.cpp is the model; csrc/cpu/simd.h and csrc/cpu/rows.h are what kernels are written with.
//
// Adding an op to the CUDA backend: its functions in namespace cuda at the end of this file; csrc/cuda/<op>.cu, listed in
// MEMDEC_CUDA_OPS (CMakeLists.txt); one line in csrc/cuda/dispatch.h. csrc/cuda/token_log_prob.cu is the model.
#pragma once

#include <cstdint>

namespace memdec {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A stack of rows of `columns` contiguous elements. Row r starts at element
//   (r / inner) · outer_stride + (r % inner) · inner_stride      (strides in elements; 0 and negative are fine)
struct Rows {
  void* data;
  DType dtype;
  int64_t count;
  int64_t inner;  // ≥ 1
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t columns;

  int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// A sparse matrix in CSR form, as memdec.SparseDistributions: ids sorted and unique in a row.
struct SparseRows {
  const int64_t* indptr;  // (N + 1,)
  const int32_t* ids;     // (nnz,)
  const float* probs;     // (nnz,)
  int64_t nnz;
};

// Where and how an op runs: on so many threads of the CPU, or on a stream of a CUDA device.
struct Launch {
  int threads = 1;              // CPU: the most that may be used, ≥ 1; the kernels are done when they return
  int device = -1;              // CUDA: the device's index; −1: the CPU
  void* stream = nullptr;       // CUDA: the caller's stream; the kernels are queued there
  void* workspace = nullptr;    // CUDA: device memory that is the op's own until what it queued is done, 256-byte aligned
  int64_t workspace_bytes = 0;  // at least cuda::workspace_bytes(op)
};

struct Status {
  enum Code {
    ok,
    bad_dtype,      // `argument` has a dtype that the op does not take
    bad_index,      // argument[at] is `got`, wanted 0 ≤ index < wanted
    bad_number,     // `argument`[at] is NaN or −inf
    bad_structure,  // argument[at] is `got`: not a CSR row pointer (wanted: the least value it may have)
    bad_fraction,   // argument[at] is `number`, wanted 0 to 1
    out_of_memory,
    cuda_error,  // `argument` is CUDA's own text, `got` its number
  };
  Code code = ok;
  const char* argument = "";
  int64_t at = 0;
  int64_t got = 0;
  int64_t wanted = 0;
  double number = 0;
};

// log softmax(logits[r])[targets[r]], for every row r.
struct TokenLogProb {
  Rows logits;             // (N, V)
  const int64_t* targets;  // (N,) in [0, V)
  void* log_prob;          // (N,) out
  void* max;               // (N,) out, or null: max and sum of exp(z − max) of each row, which the gradient needs
  void* sum;               // (N,) out, or null
};
Status token_log_prob(const TokenLogProb& op, const Launch& launch);

enum class Reduction : int { none = 0, sum = 1, mean = 2 };  // mean: over the rows that are not ignored; 0 if there are none

// Against a sparse teacher q and a label y, for every row (formulas in csrc/cpu/alignment_loss.cpp):
//   kl = KL(q‖softmax(z)), ce = −log softmax(z)[y], total = β·kl + (1−β)·ce.
// A row whose label is ignore_index counts for nothing and has a gradient of 0.
struct AlignmentLoss {
  Rows logits;            // (N, V)
  const int64_t* labels;  // (N,) in [0, V), or ignore_index
  int64_t ignore_index;
  SparseRows teacher;  // N rows; ids in [0, V)
  double beta;
  Reduction reduction;
  void* total;  // out: (N,) for Reduction::none, else (1,)
  void* kl;     // out, as total
  void* ce;     // out, as total
  void* max;    // (N,) out, or null: max and sum of exp(z − max) of each row, which alignment_gradient needs
  void* sum;    // (N,) out, or null
  Rows grad;    // (N, V) out, of the logits' dtype, or data null: grad_weight · d total / d logits; may be the logits themselves
  const void* grad_weight;  // (1,) a factor of the gradient, or null: 1
};
Status alignment_loss(const AlignmentLoss& op, const Launch& launch);

// The gradient of `total` above, from what its forward pass left in max and sum.
struct AlignmentGradient {
  Rows logits;            // (N, V)
  const int64_t* labels;  // (N,)
  int64_t ignore_index;
  SparseRows teacher;  // indptr null: no teacher, every row is empty
  double beta;
  Reduction reduction;
  const void* max;         // (N,)
  const void* sum;         // (N,)
  const void* grad_total;  // (N,) for Reduction::none, else (1,): the incoming gradient
  Rows grad;               // (N, V) out, of the logits' dtype
};
Status alignment_gradient(const AlignmentGradient& op, const Launch& launch);

// rows[r] *= factors[r · factors_stride], in place. A row whose factor is 1 is neither read nor written.
struct ScaleRows {
  Rows rows;
  const void* factors;     // of the rows' accumulator
  int64_t factors_stride;  // elements: 0 or 1
};
Status scale_rows(const ScaleRows& op, const Launch& launch);

// q(v) ∝ Σ 1[v = token]·exp(−distance / temperature) over the k neighbours of each row, as sorted sparse rows. Token −1 or
// distance +inf: no neighbour. The pairs of all rows are written one row after the other, out_indptr[N] in all.
struct AggregateNeighbors {
  Rows distances;            // (N, k)
  const void* token_ids;     // (N, k) rows of int64 (wide_ids) or int32
  int64_t token_ids_stride;  // elements between rows; 0 is fine
  bool wide_ids;
  double temperature;        // finite, above 0
  int64_t vocab_size;        // below 2^31
  double min_prob;
  int64_t max_tokens;        // 0: no limit
  int64_t* out_indptr;       // (N + 1,)
  int32_t* out_ids;          // room for N · min(k, vocab_size, max_tokens if any)
  float* out_probs;          // the same
  float* residual;           // (N,) the mass that was cut
  int64_t* pairs;            // (1,) out, in the host's memory: out_indptr[N]. Left alone by the CPU's kernel, whose caller can read that
};
Status aggregate_neighbors(const AggregateNeighbors& op, const Launch& launch);

// The candidates of `rows` queries between the calls of the functions below. Start with counts 0, thresholds +inf.
struct TopkBuffers {
  uint64_t* keys;     // (rows, capacity) candidates, in no order
  int32_t* counts;    // (rows,)
  float* thresholds;  // (rows,) what a further candidate must stay below
  int64_t capacity;   // at least keep + 32; on CUDA at least 2 · keep and keep + 1024
  int64_t keep;       // how many candidates outlive a cut
};

// A block of stored rows as float32, without what they have in common, and their norms: the second factor of the products.
struct TopkFilterPrepare {
  const void* stored;  // (rows, dim) float16
  int64_t stored_stride;
  const float* mean;  // (dim,)
  int64_t rows;
  int64_t dim;
  float* centred;  // (rows, dim) out
  float* norms;    // (rows,) out: ‖x‖² of each centred row
};
Status topk_filter_prepare(const TopkFilterPrepare& op, const Launch& launch);

// Pushes every row of a block of stored rows that may be among a query's nearest, by ‖x‖² − 2·q·x. Blocks come in ascending order.
struct TopkFilterUpdate {
  TopkBuffers buffers;
  const float* products;  // (rows, columns) q·x
  int64_t products_stride;
  int64_t rows;
  int64_t columns;
  const float* norms;       // (columns,) ‖x‖²
  int64_t first_id;         // of column 0; first_id + columns ≤ 2^32
  const int64_t* excluded;  // (rows, 2) ids [from, to) that are not this query's to find, or null
};
Status topk_filter_update(const TopkFilterUpdate& op, const Launch& launch);

// Cuts to `keep`, and gives the candidates with ids [first_id, first_id + stored_rows) their distance Σ (q − x)².
struct TopkFilterRefine {
  TopkBuffers buffers;
  const float* queries;  // (rows, dim)
  const void* stored;    // (stored_rows, dim) float16
  int64_t stored_stride;
  int64_t rows;
  int64_t stored_rows;
  int64_t dim;
  int64_t first_id;
};
Status topk_filter_refine(const TopkFilterRefine& op, const Launch& launch);

// The k least distances of each query, ascending, equal ones by id; +inf and −1 where there are fewer.
struct TopkFilterSelect {
  TopkBuffers buffers;
  int64_t rows;
  int64_t k;         // at most keep
  float* distances;  // (rows, k)
  int64_t* ids;      // (rows, k)
};
Status topk_filter_select(const TopkFilterSelect& op, const Launch& launch);
// The mixture α·softmax(memory) + (1−α)·softmax(base), row by row. Both are (N, V) of one dtype; α is in [0, 1]. At α of
// exactly 0 or 1 the rows of the component without weight are never read.
struct Mixture {
  Rows base;
  Rows memory;
  double alpha;          // of every row, where alphas is null
  const double* alphas;  // (N,)
};

// log p_mix of every token.
struct Interpolate {
  Mixture mixture;
  void* log_probs;  // (N, V) out, contiguous
};
Status interpolate(const Interpolate& op, const Launch& launch);

// log p_mix(targets[r]).
struct InterpolateLogProb {
  Mixture mixture;
  const int64_t* targets;  // (N,) in [0, V)
  void* log_prob;          // (N,) out
};
Status interpolate_log_prob(const InterpolateLogProb& op, const Launch& launch);

// The likeliest token under p_mix, the lowest of equals; −1 where p_mix is NaN.
struct InterpolateArgmax {
  Mixture mixture;
  int64_t* tokens;  // (N,) out
};
Status interpolate_argmax(const InterpolateArgmax& op, const Launch& launch);

// A token drawn from p_mix, after temperature, top_k, top_p and min_p; −1 where there is none to draw.
struct InterpolateSample {
  Mixture mixture;
  double temperature;      // > 0
  int64_t top_k;           // 0: all
  double top_p;            // 1: all
  double min_p;            // 0: all
  uint64_t seed;           // where seeds is null
  const int64_t* seeds;    // (N,), or one
  int64_t seeds_stride;    // elements: 1, or 0 for one seed of all rows: row r draws with seed + r · 2⁶⁴/φ
  uint64_t offset;         // where offsets is null
  const int64_t* offsets;  // (N,), or one
  int64_t offsets_stride;  // elements: 0 or 1
  int64_t* tokens;         // (N,) out
};
Status interpolate_sample(const InterpolateSample& op, const Launch& launch);

// How many of the γ drafted tokens of each of B texts stand, and the token that follows them: together drawn from p_mix where
// the drafts were drawn from the memory's own distribution, or (greedy) the likeliest tokens under p_mix. Position i of text b
// is row b·(γ+1) + i of the mixture; it draws with the text's seed and its offset + i.
struct VerifyDraft {
  Mixture mixture;             // B·(γ+1) rows
  int64_t texts;               // B
  int64_t drafted;             // γ
  const int64_t* draft_ids;    // (B, γ) in [0, V), as far as the text's length goes
  const int64_t* lengths;      // (B,) in [0, γ], or null: γ
  bool greedy;                 // warpers and seeds have no part in it
  double temperature;          // > 0; warps mixture and memory alike, as top_k, top_p and min_p do
  int64_t top_k;               // 0: all
  double top_p;                // 1: all
  double min_p;                // 0: all
  uint64_t seed;               // as for InterpolateSample, one a text
  const int64_t* seeds;        // (B,), or one
  int64_t seeds_stride;        // elements: 0 or 1
  uint64_t offset;
  const int64_t* offsets;      // (B,), or one
  int64_t offsets_stride;      // elements: 0 or 1
  int64_t* accepted;           // (B,) out
  int64_t* next;               // (B,) out; −1 where there is none to draw
};
Status verify_draft(const VerifyDraft& op, const Launch& launch);

// The weights of a layer of a model of Llama's kind, (outputs, inputs) each, contiguous and of one dtype, and its cache.
// It comes from Python as a table of addresses.
struct StepLayer {
  const void *input_norm, *query, *query_bias, *key, *key_bias, *value, *value_bias;  // biases: or null
  const void *query_norm, *key_norm;                                                  // (dim,) of each head, or null
  const void *output, *output_bias, *attended_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
  void *keys, *values;  // (texts, key heads, room, dim)
  void* mlp_input;      // (texts, tokens, hidden) out, what the MLP reads, or null
};

// Logits after each of a few new tokens of each text, whose keys and values go into the cache behind the `filled` that it holds.
// CPU only; a GPU's steps are made of linear_of_rows and of the kernels in python/memdec/decoding/triton_kernels.py.
struct DecodeStep {
  DType dtype;  // float32, bfloat16 or float16
  int64_t texts, tokens;
  int64_t layers, hidden, heads, key_heads, dim, inner, vocab;
  int64_t room, filled;  // filled + tokens ≤ room
  const StepLayer* layer;
  double epsilon;          // of all norms
  double scale;            // of the scores
  const void* embedded;    // (texts, tokens, hidden)
  const void *cos, *sin;   // (texts, tokens, dim)
  int64_t turns_stride;    // elements between their tokens
  const int64_t* mask;     // (texts, filled + tokens), 0 where nobody looks, or null
  int64_t mask_stride;     // elements between texts
  const void* norm;        // (hidden,)
  const void* head;        // (vocab, hidden)
  const void* head_bias;   // (vocab,), or null
  void* logits;            // (texts, tokens, vocab) out
  int64_t logits_stride;   // elements between texts
};
Status decode_step(const DecodeStep& op, const Launch& launch);

// A linear layer of a few rows, in half precision, and what a model's step does before and after it: y = x̂ · Wᵀ + b + r, where x̂ is x
// or its RMS norm; gated, y = g / (1 + exp(−g)) · u of the layer's first outputs g and its last ones u. CUDA only. Weights and norm are
// read while the kernel that was queued before it may still run, so that one must not be what writes them.
struct LinearOfRows {
  DType dtype;  // bfloat16 or float16
  int64_t rows, width, outputs;  // rows in [1, 8], width a multiple of 8
  bool gated;
  const void* x;            // (rows, width), 16-byte aligned rows
  int64_t x_stride;         // elements between rows
  const void* norm;         // (width,), 16-byte aligned, or null: as it is
  double epsilon;           // of the norm
  const void* weight;       // (outputs, width), or gated (2·outputs, width); contiguous, 16-byte aligned
  const void* bias;         // (outputs,) or (2·outputs,), or null
  const void* residual;     // (rows, outputs), or null
  int64_t residual_stride;  // elements between rows
  void* result;             // (rows, outputs) out, contiguous
};

// log(α·(q + (1−m)·p) + (1−α)·p), p = softmax(base), q the teacher's row and m its mass: the kNN-LM.
struct InterpolateSparse {
  Rows base;             // (N, V)
  SparseRows teacher;    // N rows; ids in [0, V)
  double alpha;          // of every row, where alphas is null; in [0, 1]
  const double* alphas;  // (N,)
  void* log_probs;       // (N, V) out, contiguous
};
Status interpolate_sparse(const InterpolateSparse& op, const Launch& launch);

// What was built, what runs. A level is "portable", "avx2" (AVX2, FMA, F16C) or "avx512" (F, BW, VL, DQ).
const char* simd_level();                     // in use: the best that the machine has, or MEMDEC_SIMD from the environment
bool simd_level_available(const char* name);  // compiled in, and the machine has it
void set_simd_level(const char* name);        // must be available
const char* const* simd_levels_built();       // null-terminated

// The CUDA kernels of the same ops, for tensors in the device's memory. An op allocates nothing: what it needs beside its
// outputs is the launch's workspace, of the size that workspace_bytes gives.
namespace cuda {
Status token_log_prob(const TokenLogProb& op, const Launch& launch);
int64_t workspace_bytes(const TokenLogProb& op);
Status aggregate_neighbors(const AggregateNeighbors& op, const Launch& launch);  // waits for its kernels: indices are checked as on the CPU
int64_t workspace_bytes(const AggregateNeighbors& op);
Status topk_filter_prepare(const TopkFilterPrepare& op, const Launch& launch);
Status topk_filter_update(const TopkFilterUpdate& op, const Launch& launch);
Status topk_filter_refine(const TopkFilterRefine& op, const Launch& launch);
Status topk_filter_select(const TopkFilterSelect& op, const Launch& launch);
Status alignment_loss(const AlignmentLoss& op, const Launch& launch);
int64_t workspace_bytes(const AlignmentLoss& op);
Status alignment_gradient(const AlignmentGradient& op, const Launch& launch);
int64_t workspace_bytes(const AlignmentGradient& op);
Status scale_rows(const ScaleRows& op, const Launch& launch);
Status linear_of_rows(const LinearOfRows& op, const Launch& launch);
Status interpolate(const Interpolate& op, const Launch& launch);
int64_t workspace_bytes(const Interpolate& op);
Status interpolate_argmax(const InterpolateArgmax& op, const Launch& launch);
int64_t workspace_bytes(const InterpolateArgmax& op);
Status interpolate_log_prob(const InterpolateLogProb& op, const Launch& launch);
int64_t workspace_bytes(const InterpolateLogProb& op);
Status interpolate_sample(const InterpolateSample& op, const Launch& launch);
int64_t workspace_bytes(const InterpolateSample& op);
Status interpolate_sparse(const InterpolateSparse& op, const Launch& launch);
int64_t workspace_bytes(const InterpolateSparse& op);
Status verify_draft(const VerifyDraft& op, const Launch& launch);
int64_t workspace_bytes(const VerifyDraft& op);
}  // namespace cuda

}  // namespace memdec
