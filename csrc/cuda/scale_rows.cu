// scale_rows: rows[r] *= factors[r], in place; rows whose factor is 1 are left alone.
//
// Only the device knows whether a factor is 1 (that of a loss's backward pass nearly always is): then a block ends at once.
#include "cuda/rows.cuh"

namespace memdec::cuda {
namespace {

// A block a span.
template <class T>
__global__ void __launch_bounds__(block_threads) scale_spans(ScaleRows op) {
  const int64_t columns = op.rows.columns, spans = spans_of(columns + width_of<T> - 1), r = blockIdx.x / spans;
  const float factor = static_cast<const float*>(op.factors)[r * op.factors_stride];
  if (factor == 1) return;
  T* const row = row_of<T>(op.rows, r);
  const int64_t lead = lead_of(row);
  float value[share_size];
  load_share(row, columns, blockIdx.x % spans, value, lead);
#pragma unroll
  for (int i = 0; i < share_size; ++i) value[i] *= factor;
  store_share(row, columns, blockIdx.x % spans, value, lead);
}

}  // namespace

Status scale_rows(const ScaleRows& op, const Launch& where) {
  return on_device(where, op.rows.dtype, "rows", [&]<class T>(T, cudaStream_t stream) {
    const int64_t blocks = op.rows.count * spans_of(op.rows.columns + width_of<T> - 1);
    if (blocks > 0) launch(scale_spans<T>, blocks, block_threads, 0, stream, op);
  });
}

}  // namespace memdec::cuda
