// The CUDA kernels of each op: one line an op. A build without CUDA has none, and raises NotImplementedError for tensors on the device.
#pragma once

#include "memdec.h"

namespace memdec::cuda {

template <class Op>
struct Kernels {
  Status (*run)(const Op&, const Launch&) = nullptr;
  int64_t (*workspace_bytes)(const Op&) = nullptr;  // null: none, whatever the arguments
};

template <class Op>
inline constexpr Kernels<Op> kernels{};

#if MEMDEC_HAS_CUDA
template <>
inline constexpr Kernels<AggregateNeighbors> kernels<AggregateNeighbors>{aggregate_neighbors, workspace_bytes};
template <>
inline constexpr Kernels<TokenLogProb> kernels<TokenLogProb>{token_log_prob, workspace_bytes};
template <>
inline constexpr Kernels<TopkFilterPrepare> kernels<TopkFilterPrepare>{topk_filter_prepare};
template <>
inline constexpr Kernels<TopkFilterUpdate> kernels<TopkFilterUpdate>{topk_filter_update};
template <>
inline constexpr Kernels<TopkFilterRefine> kernels<TopkFilterRefine>{topk_filter_refine};
template <>
inline constexpr Kernels<TopkFilterSelect> kernels<TopkFilterSelect>{topk_filter_select};
template <>
inline constexpr Kernels<AlignmentLoss> kernels<AlignmentLoss>{alignment_loss, workspace_bytes};
template <>
inline constexpr Kernels<AlignmentGradient> kernels<AlignmentGradient>{alignment_gradient, workspace_bytes};
template <>
inline constexpr Kernels<ScaleRows> kernels<ScaleRows>{scale_rows};
template <>
inline constexpr Kernels<LinearOfRows> kernels<LinearOfRows>{linear_of_rows};
template <>
inline constexpr Kernels<Interpolate> kernels<Interpolate>{interpolate, workspace_bytes};
template <>
inline constexpr Kernels<InterpolateArgmax> kernels<InterpolateArgmax>{interpolate_argmax, workspace_bytes};
template <>
inline constexpr Kernels<InterpolateLogProb> kernels<InterpolateLogProb>{interpolate_log_prob, workspace_bytes};
template <>
inline constexpr Kernels<InterpolateSample> kernels<InterpolateSample>{interpolate_sample, workspace_bytes};
template <>
inline constexpr Kernels<InterpolateSparse> kernels<InterpolateSparse>{interpolate_sparse, workspace_bytes};
template <>
inline constexpr Kernels<VerifyDraft> kernels<VerifyDraft>{verify_draft, workspace_bytes};
#endif

}  // namespace memdec::cuda
