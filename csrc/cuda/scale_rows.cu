// scale_rows: rows[r] *= factors[r], in place; rows whose factor is 1 are left alone.
//
// Only the device knows whether a factor is 1 (that of a loss's backward pass nearly always is), and then there is nothing to do: the
// blocks are as many as the device holds at once, not one a span, of which starting alone took a tenth of a loss's time.
#include "cuda/rows.cuh"

namespace memdec::cuda {
namespace {

constexpr int blocks_at_once = 12;  // of a multiprocessor

// Every gridDim.x-th span of all rows is a block's.
template <class T>
__global__ void __launch_bounds__(block_threads) scale_spans(ScaleRows op) {
  const auto* const factors = static_cast<const float*>(op.factors);
  if (op.factors_stride == 0 && *factors == 1) return;
  const int64_t columns = op.rows.columns, spans = spans_of(columns + width_of<T> - 1);
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < op.rows.count * spans; i += gridDim.x) {
    const int64_t r = i / spans, span = i % spans;
    const float factor = factors[r * op.factors_stride];
    if (factor == 1) continue;
    T* const row = row_of<T>(op.rows, r);
    const int64_t lead = lead_of(row);
    float value[share_size];
    load_share(row, columns, span, value, lead);
#pragma unroll
    for (int e = 0; e < share_size; ++e) value[e] *= factor;
    store_share(row, columns, span, value, lead);
  }
}

}  // namespace

Status scale_rows(const ScaleRows& op, const Launch& where) {
  return on_device(where, op.rows.dtype, "rows", [&]<class T>(T, cudaStream_t stream) {
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, where.device);
    const int64_t items = op.rows.count * spans_of(op.rows.columns + width_of<T> - 1);
    if (items > 0) launch(scale_spans<T>, smaller(items, int64_t{processors} * blocks_at_once), block_threads, 0, stream, op);
  });
}

}  // namespace memdec::cuda
