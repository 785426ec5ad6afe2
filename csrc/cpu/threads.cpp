#include "cpu/threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace memdec {
namespace {

struct Job {
  int64_t count;
  int64_t grain;
  void (*work)(const void*, int64_t, int64_t);
  const void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  int places = 0;   // workers that may still join; guarded by the pool's mutex
  int running = 0;  // workers inside; guarded by the pool's mutex
  std::exception_ptr error{};

  void run() {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= count || failed.load(std::memory_order_relaxed)) return;
        work(context, begin, std::min(begin + grain, count));
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

thread_local bool inside_work = false;

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(workers_) < job.places) {
        try {
          std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
          break;  // no more threads to be had: those there are, and the caller, do the work
        }
        ++workers_;
      }
      jobs_.push_back(&job);
    }
    if (job.places == 1) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    inside_work = true;
    job.run();
    inside_work = false;
    std::unique_lock lock(mutex_);
    jobs_.remove(&job);
    done_.wait(lock, [&] { return job.running == 0; });
  }

 private:
  void serve() {
    inside_work = true;
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] {
        const auto open = std::find_if(jobs_.begin(), jobs_.end(), [](const Job* j) { return j->places > 0; });
        if (open != jobs_.end()) job = *open;
        return job != nullptr;
      });
      --job->places;
      ++job->running;
      lock.unlock();
      job->run();
      lock.lock();
      if (--job->running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::list<Job*> jobs_;
  int workers_ = 0;
};

// Never destroyed: workers sleep in it until the process ends. A forked child has none of its parent's threads, and perhaps a
// locked mutex, so it starts a pool of its own and leaves the old one be.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
  static const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
    current_pool.store(nullptr);
    inside_work = false;
  });
  static_cast<void>(fork_handler);
  auto fresh = std::make_unique<Pool>();
  if (current_pool.compare_exchange_strong(existing, fresh.get())) return *fresh.release();
  return *existing;
}

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, int threads, void (*work)(const void*, int64_t, int64_t), const void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t ranges = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, ranges)) - 1;
  if (helpers <= 0 || inside_work) {
    for (int64_t begin = 0; begin < count; begin += grain) work(context, begin, std::min(begin + grain, count));
    return;
  }
  Job job{.count = count, .grain = grain, .work = work, .context = context, .places = helpers};
  pool().run(job);
  if (job.error) std::rethrow_exception(job.error);
}

void yield_thread() { std::this_thread::yield(); }

}  // namespace memdec
