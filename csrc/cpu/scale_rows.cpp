// scale_rows: rows[r] *= factors[r], in place; rows whose factor is 1 are left alone.
#include "cpu/rows.h"

namespace memdec::MEMDEC_LEVEL {

Status scale_rows(const ScaleRows& op, const Launch& launch) {
  return with_dtype(op.rows.dtype, "rows", [&]<class T>(T) {
    using A = accumulator_t<T>;
    for_each_block(op.rows, launch.threads, [&](int64_t r, int64_t begin, int64_t end) {
      const A factor = static_cast<const A*>(op.factors)[r * op.factors_stride];
      if (factor == 1) return;
      T* const row = row_of<T>(op.rows, r);
      for (int64_t i = begin; i < end; ++i) row[i] = narrow<T>(static_cast<A>(to_float(row[i])) * factor);
    });
  });
}

}  // namespace memdec::MEMDEC_LEVEL
