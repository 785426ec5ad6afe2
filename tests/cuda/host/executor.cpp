// Runs kernels on the CPU with CUDA's thread model; see cuda_runtime.h.
//
// A fiber is a stack of its own and a stack pointer. A warp runs as far as it can, to a barrier of the block or its end, before
// the next one starts: the most that one warp can be ahead of another, so what a barrier should have kept apart meets. When none
// can run, either all stand at one barrier, which then opens, or the kernel is wrong, and the report says who waits where.
// A copy to shared memory in the background is made when its thread waits for it, no sooner; whoever reads it before reads poison.
// Errors leave the fibers where they are. Addresses and undefined behaviour are the sanitizers' business.
#include "cuda_runtime.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the executor of the tests switches stacks in x86-64 assembly"
#endif

// memdec_switch(void** save, void* to): leaves this stack, its pointer in *save, and goes on where `to` was left.
asm(R"(
.text
.hidden memdec_switch
.globl memdec_switch
.type memdec_switch, @function
memdec_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size memdec_switch, .-memdec_switch
)");
extern "C" void memdec_switch(void** save, void* to);

namespace memdec::cuda::host {
namespace {

constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4 << 10;
constexpr unsigned warp = 32;

// A copy that waits to be made.
struct Late {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  char* stack = nullptr;  // kept from launch to launch
  void* pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  enum { ready, at_barrier, in_exchange, done } state = done;
  Where where;
  unsigned mask = 0;
  uint64_t value = 0;
  int source = 0;
  std::deque<std::vector<Late>> copies;  // groups, the last one open
};

struct Executor {
  std::mutex one_launch;
  std::vector<Fiber> fibers;
  unsigned count = 0, current = 0;
  void* pointer = nullptr;  // of the scheduler's stack
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  const std::function<void()>* thread = nullptr;
  size_t dynamic_bytes = 0;
  uint64_t block = 0;  // counts all blocks ever run
  std::string error;   // of the launch that is running, or ran last
  bool failed = false;
};
Executor executor;

std::string text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

void leave_fiber(bool for_good) {
  Fiber& fiber = executor.fibers[executor.current];
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, executor.bottom, executor.size);
  memdec_switch(&fiber.pointer, executor.pointer);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &executor.bottom, &executor.size);
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &executor.bottom, &executor.size);
  (*executor.thread)();
  executor.fibers[executor.current].state = Fiber::done;
  leave_fiber(true);
}

void enter_fiber(unsigned i) {
  executor.current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  __sanitizer_start_switch_fiber(&executor.fake_stack, executor.fibers[i].stack, stack_bytes);
  memdec_switch(&executor.pointer, executor.fibers[i].pointer);
  __sanitizer_finish_switch_fiber(executor.fake_stack, nullptr, nullptr);
}

void prepare_fiber(Fiber& fiber) {
  if (!fiber.stack) {
    void* const pages = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    mprotect(pages, guard_bytes, PROT_NONE);
    fiber.stack = static_cast<char*>(pages) + guard_bytes;
  }
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 2;
  *top = reinterpret_cast<void*>(&run_fiber);  // what memdec_switch returns to, below six registers
  fiber.pointer = top - 6;
  fiber.state = Fiber::ready;
  fiber.copies.assign(1, {});
}

// Who waits where, for a block in which nobody can go on.
std::string standstill() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned i = 0; i < executor.count; ++i) {
    const Fiber& fiber = executor.fibers[i];
    if (fiber.state == Fiber::done) groups["have ended"].push_back(i);
    else groups[(fiber.state == Fiber::at_barrier ? "wait at the barrier " : "wait for their warp at ") + text(fiber.where)].push_back(i);
  }
  std::string report = "diverging barriers:";
  for (const auto& [what, threads] : groups)
    report += " " + std::to_string(threads.size()) + " threads (the first is " + std::to_string(threads[0]) + ") " + what + ";";
  return report;
}

bool all_at_one_barrier() {
  const Fiber& first = executor.fibers[0];
  return std::all_of(executor.fibers.begin(), executor.fibers.begin() + executor.count, [&](const Fiber& fiber) {
    return fiber.state == Fiber::at_barrier && same(fiber.where, first.where);
  });
}

// Runs a warp until none of its threads can go on.
void run_warp(unsigned number, const std::vector<unsigned>& lanes) {
  for (bool moved = true; moved && !executor.failed;) {
    moved = false;
    for (const unsigned lane : lanes) {
      const unsigned i = number * warp + lane;
      if (i >= executor.count || executor.fibers[i].state != Fiber::ready) continue;
      enter_fiber(i);
      if (executor.failed) return;
      moved = true;
    }
  }
}

void run_block(const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
  ++executor.block;
  for (unsigned i = 0; i < executor.count; ++i) prepare_fiber(executor.fibers[i]);
  for (;;) {
    for (const unsigned number : warps) {
      run_warp(number, lanes);
      if (executor.failed) return;
    }
    const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::done; };
    if (std::all_of(executor.fibers.begin(), executor.fibers.begin() + executor.count, done)) return;
    if (!all_at_one_barrier()) {
      executor.failed = true;
      executor.error = standstill();
      return;
    }
    for (unsigned i = 0; i < executor.count; ++i) executor.fibers[i].state = Fiber::ready;
  }
}

std::vector<unsigned> ordered(unsigned count, const std::string& order) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == "reverse") std::reverse(numbers.begin(), numbers.end());
  else if (order != "forward") std::shuffle(numbers.begin(), numbers.end(), std::mt19937_64(std::stoull(order)));
  return numbers;
}

}  // namespace

int lane() { return static_cast<int>(executor.current % warp); }

void fail(const char* what, Where where) {
  executor.failed = true;
  executor.error = std::string(what) + " (" + text(where) + ", thread " + std::to_string(executor.current) + ")";
  leave_fiber(false);
  std::abort();  // a failed block's fibers are never entered again
}

void wait_for_block(Where where) {
  Fiber& me = executor.fibers[executor.current];
  me.state = Fiber::at_barrier;
  me.where = where;
  leave_fiber(false);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Where where) {
  const unsigned self = executor.current, first = self - self % warp;
  Fiber& me = executor.fibers[self];
  if (!(mask >> self % warp & 1)) fail("a lane is not in its own mask", where);
  if (source >= 0 && !(mask >> source & 1)) fail("a shuffle from a lane that is not in the mask", where);
  me.state = Fiber::in_exchange;
  me.where = where, me.mask = mask, me.value = value, me.source = source;
  bool complete = true;
  for (unsigned i = 0; i < warp && complete; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= executor.count) fail("a mask names lanes beyond the end of the block", where);
    const Fiber& other = executor.fibers[first + i];
    complete = other.state == Fiber::in_exchange && other.mask == mask && same(other.where, where);
  }
  if (!complete) {
    leave_fiber(false);
    return me.value;
  }
  uint64_t brought[warp] = {}, votes = 0;
  for (unsigned i = 0; i < warp; ++i) {
    if (!(mask >> i & 1)) continue;
    brought[i] = executor.fibers[first + i].value;
    votes |= uint64_t{brought[i] != 0} << i;
  }
  for (unsigned i = 0; i < warp; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& other = executor.fibers[first + i];
    other.value = other.source < 0 ? votes : brought[other.source];
    other.state = Fiber::ready;
  }
  return me.value;
}

void copy_behind(void* to, const void* from, size_t bytes) {
  memset(to, 0xff, bytes);
  executor.fibers[executor.current].copies.back().push_back({to, from, bytes});
}

void end_group() { executor.fibers[executor.current].copies.emplace_back(); }

void wait_for_groups(int on_the_way) {
  auto& copies = executor.fibers[executor.current].copies;
  for (; copies.size() > static_cast<size_t>(on_the_way) + 1; copies.pop_front())
    for (const auto& [to, from, bytes] : copies.front()) memcpy(to, from, bytes);
}

void* Shared::of_this_block() {
  if (block_ != executor.block) {
    std::free(data_);
    if (posix_memalign(&data_, 128, std::max<size_t>(bytes_, 1)) != 0) std::abort();
    memset(data_, 0xff, bytes_);
    block_ = executor.block;
  }
  return data_;
}

void* dynamic_shared() {
  static uint64_t block = 0;
  static void* data = nullptr;
  if (block != executor.block) {
    std::free(data);
    if (posix_memalign(&data, 128, std::max<size_t>(executor.dynamic_bytes, 1)) != 0) std::abort();
    memset(data, 0xff, executor.dynamic_bytes);
    block = executor.block;
  }
  return data;
}

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(executor.one_launch);
  if (executor.failed) return;  // as on a device: after an error nothing runs until it has been asked for
  const unsigned threads = block.x * block.y * block.z;
  const char* const order = std::getenv("MEMDEC_EXECUTOR_ORDER");
  if (grid.x == 0 || threads == 0 || threads > 1024 || shared_bytes > 227 << 10) {
    executor.failed = true;
    executor.error = "invalid configuration: " + std::to_string(grid.x) + " blocks of " + std::to_string(threads) + " threads";
    return;
  }
  if (executor.fibers.size() < threads) executor.fibers.resize(threads);
  executor.count = threads;
  executor.thread = &thread;
  executor.dynamic_bytes = shared_bytes;
  gridDim = grid, blockDim = block;
  const std::vector<unsigned> warps = ordered((threads + warp - 1) / warp, order ? order : "forward");
  const std::vector<unsigned> lanes = ordered(warp, order ? order : "forward");
  for (const unsigned b : ordered(grid.x, order ? order : "forward")) {
    blockIdx = dim3(b, 0, 0);
    run_block(warps, lanes);
    if (!executor.failed) continue;
    char name[1024] = "";
    // One byte on: the symboliser takes a return address, and looks before it.
    __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(kernel)) + 1, "%f", name, sizeof name);
    executor.error = std::string(name) + ", block " + std::to_string(b) + ": " + executor.error;
    for (const Fiber& fiber : executor.fibers) __asan_unpoison_memory_region(fiber.stack, stack_bytes);
    return;
  }
}

}  // namespace memdec::cuda::host

cudaError_t cudaGetLastError() { return std::exchange(memdec::cuda::host::executor.failed, false) ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return memdec::cuda::host::executor.error.c_str(); }
