#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace memdec {

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t large = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(4 * large)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + large - 1) / large * large;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / large * large;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

void prefer_large_pages(const Rows& rows) {
  const bool contiguous = rows.inner_stride == rows.columns && rows.inner >= rows.count;
  const int64_t element = rows.dtype == DType::float64 ? 8 : rows.dtype == DType::float32 ? 4 : 2;
  if (contiguous) prefer_large_pages(rows.data, rows.count * rows.columns * element);
}

}  // namespace memdec
