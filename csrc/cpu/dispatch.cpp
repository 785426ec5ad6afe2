// Chooses the SIMD level, once, and sends each op to the kernels of that level.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "memdec.h"

namespace memdec {
namespace {

enum class Level : int { portable, avx2, avx512 };
constexpr const char* level_names[] = {"portable", "avx2", "avx512"};

bool machine_has(Level level) {
  switch (level) {
    case Level::portable: return true;
#if MEMDEC_HAS_avx2
    case Level::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if MEMDEC_HAS_avx512
    case Level::avx512:
      return machine_has(Level::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default: return false;
  }
}

// The level called `name`, or `otherwise` where there is none of that name here.
Level level_named(const char* name, Level otherwise) {
  for (const Level level : {Level::portable, Level::avx2, Level::avx512})
    if (name && std::strcmp(name, level_names[static_cast<int>(level)]) == 0 && machine_has(level)) return level;
  return otherwise;
}

Level best_level() { return machine_has(Level::avx512) ? Level::avx512 : machine_has(Level::avx2) ? Level::avx2 : Level::portable; }

std::atomic<Level>& current_level() {
  static std::atomic<Level> level{level_named(std::getenv("MEMDEC_SIMD"), best_level())};
  return level;
}

template <class F>
Status guarded(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return {.code = Status::out_of_memory};
  }
}

}  // namespace

const char* simd_level() { return level_names[static_cast<int>(current_level().load(std::memory_order_relaxed))]; }
bool simd_level_available(const char* name) { return std::strcmp(level_names[static_cast<int>(level_named(name, Level::portable))], name) == 0; }
void set_simd_level(const char* name) { current_level() = level_named(name, Level::portable); }
const char* const* simd_levels_built() {
  static const char* const built[] = {"portable",
#if MEMDEC_HAS_avx2
                                      "avx2",
#endif
#if MEMDEC_HAS_avx512
                                      "avx512",
#endif
                                      nullptr};
  return built;
}

#if MEMDEC_HAS_avx2
#define MEMDEC_AVX2(...) __VA_ARGS__
#else
#define MEMDEC_AVX2(...)
#endif
#if MEMDEC_HAS_avx512
#define MEMDEC_AVX512(...) __VA_ARGS__
#else
#define MEMDEC_AVX512(...)
#endif

// Defines memdec::function as the kernel of the current level.
#define MEMDEC_CPU_OP(function, Arguments)                                                                       \
  namespace portable {                                                                                           \
  Status function(const Arguments&, const Launch&);                                                              \
  }                                                                                                              \
  MEMDEC_AVX2(namespace avx2 { Status function(const Arguments&, const Launch&); })                              \
  MEMDEC_AVX512(namespace avx512 { Status function(const Arguments&, const Launch&); })                          \
  Status function(const Arguments& op, const Launch& launch) {                                                   \
    return guarded([&] {                                                                                         \
      switch (current_level().load(std::memory_order_relaxed)) {                                                 \
        MEMDEC_AVX512(case Level::avx512 : return avx512::function(op, launch);)                                 \
        MEMDEC_AVX2(case Level::avx2 : return avx2::function(op, launch);)                                       \
        default: return portable::function(op, launch);                                                          \
      }                                                                                                          \
    });                                                                                                          \
  }

MEMDEC_CPU_OP(aggregate_neighbors, AggregateNeighbors)
MEMDEC_CPU_OP(token_log_prob, TokenLogProb)
MEMDEC_CPU_OP(alignment_loss, AlignmentLoss)
MEMDEC_CPU_OP(alignment_gradient, AlignmentGradient)
MEMDEC_CPU_OP(scale_rows, ScaleRows)
MEMDEC_CPU_OP(topk_filter_prepare, TopkFilterPrepare)
MEMDEC_CPU_OP(topk_filter_refine, TopkFilterRefine)
MEMDEC_CPU_OP(topk_filter_select, TopkFilterSelect)
MEMDEC_CPU_OP(topk_filter_update, TopkFilterUpdate)
MEMDEC_CPU_OP(interpolate, Interpolate)
MEMDEC_CPU_OP(interpolate_log_prob, InterpolateLogProb)
MEMDEC_CPU_OP(interpolate_argmax, InterpolateArgmax)
MEMDEC_CPU_OP(interpolate_sample, InterpolateSample)
MEMDEC_CPU_OP(interpolate_sparse, InterpolateSparse)
MEMDEC_CPU_OP(verify_draft, VerifyDraft)
MEMDEC_CPU_OP(decode_step, DecodeStep)

}  // namespace memdec
