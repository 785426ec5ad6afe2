#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace memdec {

void prefer_large_pages([[maybe_unused]] const Rows& rows) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t large = uintptr_t{2} << 20;
  const bool contiguous = rows.inner_stride == rows.columns && rows.inner >= rows.count;
  const uintptr_t element = rows.dtype == DType::float64 ? 8 : rows.dtype == DType::float32 ? 4 : 2;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(rows.data);
  const uintptr_t bytes = static_cast<uintptr_t>(rows.count) * static_cast<uintptr_t>(rows.columns) * element;
  if (!contiguous || bytes < 4 * large) return;
  const uintptr_t first = (begin + large - 1) / large * large;
  const uintptr_t last = (begin + bytes) / large * large;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

}  // namespace memdec
