// The thread pool: a few workers that sleep on a condition variable whenever there is nothing to do.
#pragma once

#include <cstdint>

namespace memdec {

// Calls work(context, begin, end) until every index in [0, count) has been covered once, in ranges of at most `grain`, on at
// most `threads` threads, the calling one included. Returns when all is done; the first exception thrown by work is
// rethrown here. Safe to call from several threads at once, from inside work (runs serially there), and after fork().
void parallel_ranges(int64_t count, int64_t grain, int threads, void (*work)(const void* context, int64_t begin, int64_t end),
                     const void* context);

// Lets another thread run on this core.
void yield_thread();

namespace {

// Returns when done() says so, which another thread brings about: soon, or this one lets others run on its core.
template <class F>
inline void wait_until(const F& done) {
  for (int patience = 1000; !done();) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (patience > 0) {
      --patience;
    } else {
      yield_thread();
    }
  }
}

// parallel_ranges for a callable f(begin, end).
template <class F>
inline void parallel(int64_t count, int64_t grain, int threads, const F& f) {
  parallel_ranges(
      count, grain, threads,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

}  // namespace
}  // namespace memdec
