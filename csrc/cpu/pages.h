// Asking the operating system for large pages.
#pragma once

#include "memdec.h"

namespace memdec {

// Says that this memory is about to be written from end to end. Fresh memory of the size of a batch of logits costs more in
// page faults, 4 KiB at a time, than the kernel that fills it: with 2 MiB pages a backward pass took a third of the time.
// Does nothing for small or strided memory, and where the system has no such pages.
void prefer_large_pages(void* data, int64_t bytes);
void prefer_large_pages(const Rows& rows);

}  // namespace memdec
