// memdec._C: unpacks Python's arguments, releases the GIL, runs an op, turns its status into an exception.
//
// A pointer travels as an int (0 is null). Logits travel as the tuple that memdec.ops.rows.rows() makes of a tensor:
//   (data_ptr, dtype code, count, inner, outer_stride, inner_stride, columns)
// Every op's last argument says where it runs: the number of CPU threads, or (device, stream, workspace, workspace bytes) for
// CUDA. An op that is given too little workspace does nothing but return how much it wants; otherwise it runs and returns 0.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "cuda/dispatch.h"
#include "memdec.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<memdec::Rows> {
  PYBIND11_TYPE_CASTER(memdec::Rows, const_name("tuple[int, int, int, int, int, int, int]"));
  bool load(handle source, bool) {
    if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 7) return false;
    const auto item = [&](Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i)); };
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<memdec::DType>(item(1));
    value.count = item(2);
    value.inner = item(3);
    value.outer_stride = item(4);
    value.inner_stride = item(5);
    value.columns = item(6);
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

// A teacher travels as (indptr, token_ids, probs, nnz); three null pointers stand for no teacher.
template <>
struct type_caster<memdec::SparseRows> {
  PYBIND11_TYPE_CASTER(memdec::SparseRows, const_name("tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto address = [&](Py_ssize_t i) { return PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), i)); };
    value.indptr = static_cast<const int64_t*>(address(0));
    value.ids = static_cast<const int32_t*>(address(1));
    value.probs = static_cast<const float*>(address(2));
    value.nnz = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 3));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

template <>
struct type_caster<memdec::Launch> {
  PYBIND11_TYPE_CASTER(memdec::Launch, const_name("int | tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    if (PyLong_Check(source.ptr())) {
      const long threads = PyLong_AsLong(source.ptr());
      value.threads = threads > 0 ? static_cast<int>(threads) : 1;
    } else {
      if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
      value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
      value.stream = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1));
      value.workspace = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 2));
      value.workspace_bytes = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 3));
    }
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};
}  // namespace pybind11::detail

namespace {

using memdec::Launch;
using memdec::Reduction;
using memdec::Rows;
using memdec::SparseRows;
using memdec::Status;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(const char* op, const Status& status) {
  const std::string where = std::string(op) + ": " + status.argument;
  const auto number = [](int64_t n) { return std::to_string(n); };
  switch (status.code) {
    case Status::ok: return;
    case Status::bad_dtype:
      throw py::value_error(where + " has dtype code " + number(status.got) +
                            ", wanted 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
    case Status::bad_index:
      throw py::value_error(where + " holds " + number(status.got) + " at position " + number(status.at) +
                            ", wanted an index from 0 to " + number(status.wanted - 1));
    case Status::bad_number: throw py::value_error(where + " holds NaN or -inf at position " + number(status.at) + ", wanted numbers");
    case Status::bad_structure:
      throw py::value_error(where + " holds " + number(status.got) + " at position " + number(status.at) + ", wanted " +
                            number(status.wanted) + " or more: CSR row pointers start at 0, never fall and end at the number of ids");
    case Status::bad_fraction:
      throw py::value_error(where + " holds " + std::to_string(status.number) + " at position " + number(status.at) + ", wanted 0 to 1");
    case Status::out_of_memory: throw std::bad_alloc();
    case Status::cuda_error:
      throw std::runtime_error(std::string(op) + ": CUDA error " + number(status.got) + ": " + status.argument);
  }
}

// Runs one op with the GIL released; on_cpu is null for an op of CUDA only. Returns 0, or the bytes of workspace that are wanted before it can run.
template <class Op>
int64_t run(const char* name, Status (*on_cpu)(const Op&, const Launch&), const Op& op, const Launch& launch) {
  Status (*function)(const Op&, const Launch&) = on_cpu;
  if (launch.device >= 0) {
    const memdec::cuda::Kernels<Op> kernels = memdec::cuda::kernels<Op>;
    if (!kernels.run) {
      PyErr_Format(PyExc_NotImplementedError, "%s: this build of memdec has no CUDA kernels; move its tensors to the CPU with .cpu()", name);
      throw py::error_already_set();
    }
    const int64_t wanted = kernels.workspace_bytes ? kernels.workspace_bytes(op) : 0;
    if (wanted > launch.workspace_bytes) return wanted;
    function = kernels.run;
  }
  if (!function) {
    PyErr_Format(PyExc_NotImplementedError, "%s: there is no kernel for the CPU", name);
    throw py::error_already_set();
  }
  Status status;
  {
    const py::gil_scoped_release released;
    status = function(op, launch);
  }
  raise_unless_ok(name, status);
  return 0;
}

// layers, hidden, heads, key heads, width of a head, of the MLP, vocabulary: of memdec::DecodeStep
using StepShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

// keys, counts, thresholds, capacity, keep: memdec::TopkBuffers
using Buffers = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

memdec::TopkBuffers topk_buffers(const Buffers& buffers) {
  const auto& [keys, counts, thresholds, capacity, keep] = buffers;
  return {.keys = pointer<uint64_t>(keys), .counts = pointer<int32_t>(counts), .thresholds = pointer<float>(thresholds),
          .capacity = capacity, .keep = keep};
}

memdec::Mixture mixture(const Rows& base, const Rows& memory, double alpha, uintptr_t alphas) {
  return {.base = base, .memory = memory, .alpha = alpha, .alphas = pointer<const double>(alphas)};
}

py::dict build_info() {
  py::dict info;
  py::list levels;
  for (const char* const* level = memdec::simd_levels_built(); *level; ++level) levels.append(*level);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if MEMDEC_HAS_CUDA
  info["cuda"] = MEMDEC_CUDA;
  info["arches"] = py::str(MEMDEC_CUDA_ARCHES).attr("split")();
  info["nvcc"] = MEMDEC_NVCC;
#else
  info["cuda"] = "off";
  info["arches"] = py::list();
  info["nvcc"] = py::none();
#endif
  info["simd_levels"] = levels;
  info["simd"] = memdec::simd_level();
  return info;
}

void set_simd_level(const std::string& name) {
  if (!memdec::simd_level_available(name.c_str()))
    throw py::value_error("set_simd_level: name is '" + name + "', wanted a level that was built and that this machine has");
  memdec::set_simd_level(name.c_str());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "memdec's kernels. Private: use memdec.ops.";

  m.def("build_info", &build_info);
  m.def("set_simd_level", &set_simd_level, py::arg("name"));

  m.def("token_log_prob", [](const Rows& logits, uintptr_t targets, uintptr_t log_prob, uintptr_t max, uintptr_t sum, const Launch& launch) {
    return run("token_log_prob", memdec::token_log_prob,
        {.logits = logits, .targets = pointer<const int64_t>(targets), .log_prob = pointer(log_prob), .max = pointer(max), .sum = pointer(sum)},
        launch);
  });

  m.def("alignment_loss", [](const Rows& logits, uintptr_t labels, int64_t ignore_index, const SparseRows& teacher, double beta,
                             int reduction, uintptr_t total, uintptr_t kl, uintptr_t ce, uintptr_t max, uintptr_t sum,
                             const Rows& grad, uintptr_t grad_weight, const Launch& launch) {
    return run("alignment_loss", memdec::alignment_loss,
        {.logits = logits,
         .labels = pointer<const int64_t>(labels),
         .ignore_index = ignore_index,
         .teacher = teacher,
         .beta = beta,
         .reduction = static_cast<Reduction>(reduction),
         .total = pointer(total),
         .kl = pointer(kl),
         .ce = pointer(ce),
         .max = pointer(max),
         .sum = pointer(sum),
         .grad = grad,
         .grad_weight = pointer(grad_weight)},
        launch);
  });

  m.def("alignment_gradient", [](const Rows& logits, uintptr_t labels, int64_t ignore_index, const SparseRows& teacher, double beta,
                                 int reduction, uintptr_t max, uintptr_t sum, uintptr_t grad_total, const Rows& grad, const Launch& launch) {
    return run("alignment_gradient", memdec::alignment_gradient,
        {.logits = logits,
         .labels = pointer<const int64_t>(labels),
         .ignore_index = ignore_index,
         .teacher = teacher,
         .beta = beta,
         .reduction = static_cast<Reduction>(reduction),
         .max = pointer(max),
         .sum = pointer(sum),
         .grad_total = pointer(grad_total),
         .grad = grad},
        launch);
  });

  m.def("scale_rows", [](const Rows& rows, uintptr_t factors, int64_t factors_stride, const Launch& launch) {
    return run("scale_rows", memdec::scale_rows, {.rows = rows, .factors = pointer(factors), .factors_stride = factors_stride}, launch);
  });

  m.def("linear_of_rows", [](int dtype, int64_t rows, int64_t width, int64_t outputs, bool gated, uintptr_t x, int64_t x_stride, uintptr_t norm,
                             double epsilon, uintptr_t weight, uintptr_t bias, uintptr_t residual, int64_t residual_stride, uintptr_t result,
                             const Launch& launch) {
    return run<memdec::LinearOfRows>("linear_of_rows", nullptr,
        {.dtype = static_cast<memdec::DType>(dtype), .rows = rows, .width = width, .outputs = outputs, .gated = gated, .x = pointer(x),
         .x_stride = x_stride, .norm = pointer(norm), .epsilon = epsilon, .weight = pointer(weight), .bias = pointer(bias),
         .residual = pointer(residual), .residual_stride = residual_stride, .result = pointer(result)},
        launch);
  });

  m.def("aggregate_neighbors", [](const Rows& distances, uintptr_t token_ids, int64_t token_ids_stride, bool wide_ids, double temperature,
                                  int64_t vocab_size, double min_prob, int64_t max_tokens, uintptr_t out_indptr, uintptr_t out_ids,
                                  uintptr_t out_probs, uintptr_t residual, uintptr_t pairs, const Launch& launch) {
    const memdec::AggregateNeighbors op{
        .distances = distances, .token_ids = pointer(token_ids), .token_ids_stride = token_ids_stride, .wide_ids = wide_ids,
        .temperature = temperature, .vocab_size = vocab_size, .min_prob = min_prob, .max_tokens = max_tokens,
        .out_indptr = pointer<int64_t>(out_indptr), .out_ids = pointer<int32_t>(out_ids), .out_probs = pointer<float>(out_probs),
        .residual = pointer<float>(residual), .pairs = pointer<int64_t>(pairs)};
    const int64_t wanted = run("aggregate_neighbors", memdec::aggregate_neighbors, op, launch);
    if (launch.device < 0) *op.pairs = op.out_indptr[distances.count];
    return wanted;
  });
  m.def("topk_filter_prepare", [](uintptr_t stored, int64_t stored_stride, uintptr_t mean, int64_t rows, int64_t dim, uintptr_t centred,
                                  uintptr_t norms, const Launch& launch) {
    return run("topk_filter_prepare", memdec::topk_filter_prepare,
        {.stored = pointer(stored), .stored_stride = stored_stride, .mean = pointer<const float>(mean), .rows = rows, .dim = dim,
         .centred = pointer<float>(centred), .norms = pointer<float>(norms)},
        launch);
  });
  m.def("topk_filter_update", [](const Buffers& buffers, uintptr_t products, int64_t products_stride, int64_t rows, int64_t columns,
                                 uintptr_t norms, int64_t first_id, uintptr_t excluded, const Launch& launch) {
    return run("topk_filter_update", memdec::topk_filter_update,
        {.buffers = topk_buffers(buffers), .products = pointer<const float>(products), .products_stride = products_stride, .rows = rows,
         .columns = columns, .norms = pointer<const float>(norms), .first_id = first_id, .excluded = pointer<const int64_t>(excluded)},
        launch);
  });
  m.def("topk_filter_refine", [](const Buffers& buffers, uintptr_t queries, uintptr_t stored, int64_t stored_stride, int64_t rows,
                                 int64_t stored_rows, int64_t dim, int64_t first_id, const Launch& launch) {
    return run("topk_filter_refine", memdec::topk_filter_refine,
        {.buffers = topk_buffers(buffers), .queries = pointer<const float>(queries), .stored = pointer(stored),
         .stored_stride = stored_stride, .rows = rows, .stored_rows = stored_rows, .dim = dim, .first_id = first_id},
        launch);
  });
  m.def("topk_filter_select", [](const Buffers& buffers, int64_t rows, int64_t k, uintptr_t distances, uintptr_t ids, const Launch& launch) {
    return run("topk_filter_select", memdec::topk_filter_select,
        {.buffers = topk_buffers(buffers), .rows = rows, .k = k, .distances = pointer<float>(distances), .ids = pointer<int64_t>(ids)},
        launch);
  });

  m.def("interpolate", [](const Rows& base, const Rows& memory, double alpha, uintptr_t alphas, uintptr_t log_probs, const Launch& launch) {
    return run("interpolate", memdec::interpolate, {.mixture = mixture(base, memory, alpha, alphas), .log_probs = pointer(log_probs)}, launch);
  });
  m.def("interpolate_log_prob", [](const Rows& base, const Rows& memory, double alpha, uintptr_t alphas, uintptr_t targets,
                                   uintptr_t log_prob, const Launch& launch) {
    return run("interpolate_log_prob", memdec::interpolate_log_prob,
        {.mixture = mixture(base, memory, alpha, alphas), .targets = pointer<const int64_t>(targets), .log_prob = pointer(log_prob)},
        launch);
  });
  m.def("interpolate_argmax", [](const Rows& base, const Rows& memory, double alpha, uintptr_t alphas, uintptr_t tokens, const Launch& launch) {
    return run("interpolate_argmax", memdec::interpolate_argmax,
        {.mixture = mixture(base, memory, alpha, alphas), .tokens = pointer<int64_t>(tokens)}, launch);
  });
  m.def("interpolate_sample", [](const Rows& base, const Rows& memory, double alpha, uintptr_t alphas, double temperature, int64_t top_k,
                                 double top_p, double min_p, int64_t seed, uintptr_t seeds, int64_t seeds_stride,
                                 int64_t offset, uintptr_t offsets, int64_t offsets_stride, uintptr_t tokens, const Launch& launch) {
    return run("interpolate_sample", memdec::interpolate_sample,
        {.mixture = mixture(base, memory, alpha, alphas),
         .temperature = temperature,
         .top_k = top_k,
         .top_p = top_p,
         .min_p = min_p,
         .seed = static_cast<uint64_t>(seed),
         .seeds = pointer<const int64_t>(seeds),
         .seeds_stride = seeds_stride,
         .offset = static_cast<uint64_t>(offset),
         .offsets = pointer<const int64_t>(offsets),
         .offsets_stride = offsets_stride,
         .tokens = pointer<int64_t>(tokens)},
        launch);
  });
  m.def("verify_draft", [](const Rows& base, const Rows& memory, double alpha, uintptr_t alphas, int64_t texts, int64_t drafted,
                           uintptr_t draft_ids, uintptr_t lengths, bool greedy, double temperature, int64_t top_k, double top_p,
                           double min_p, int64_t seed, uintptr_t seeds, int64_t seeds_stride, int64_t offset, uintptr_t offsets,
                           int64_t offsets_stride, uintptr_t accepted, uintptr_t next, const Launch& launch) {
    return run("verify_draft", memdec::verify_draft,
        {.mixture = mixture(base, memory, alpha, alphas),
         .texts = texts,
         .drafted = drafted,
         .draft_ids = pointer<const int64_t>(draft_ids),
         .lengths = pointer<const int64_t>(lengths),
         .greedy = greedy,
         .temperature = temperature,
         .top_k = top_k,
         .top_p = top_p,
         .min_p = min_p,
         .seed = static_cast<uint64_t>(seed),
         .seeds = pointer<const int64_t>(seeds),
         .seeds_stride = seeds_stride,
         .offset = static_cast<uint64_t>(offset),
         .offsets = pointer<const int64_t>(offsets),
         .offsets_stride = offsets_stride,
         .accepted = pointer<int64_t>(accepted),
         .next = pointer<int64_t>(next)},
        launch);
  });
  m.def("decode_step", [](int dtype, int64_t texts, int64_t tokens, const StepShape& shape, int64_t room, int64_t filled,
                          uintptr_t layer, double epsilon, double scale, uintptr_t embedded, uintptr_t cos, uintptr_t sin, int64_t turns_stride,
                          uintptr_t mask, int64_t mask_stride, uintptr_t norm, uintptr_t head, uintptr_t head_bias, uintptr_t logits, int64_t logits_stride,
                          const Launch& launch) {
    const auto [layers, hidden, heads, key_heads, dim, inner, vocab] = shape;
    return run("decode_step", memdec::decode_step,
        {.dtype = static_cast<memdec::DType>(dtype),
         .texts = texts,
         .tokens = tokens,
         .layers = layers,
         .hidden = hidden,
         .heads = heads,
         .key_heads = key_heads,
         .dim = dim,
         .inner = inner,
         .vocab = vocab,
         .room = room,
         .filled = filled,
         .layer = pointer<const memdec::StepLayer>(layer),
         .epsilon = epsilon,
         .scale = scale,
         .embedded = pointer(embedded),
         .cos = pointer(cos),
         .sin = pointer(sin), .turns_stride = turns_stride,
         .mask = pointer<const int64_t>(mask),
         .mask_stride = mask_stride,
         .norm = pointer(norm),
         .head = pointer(head),
         .head_bias = pointer(head_bias),
         .logits = pointer(logits),
         .logits_stride = logits_stride},
        launch);
  });
  m.def("interpolate_sparse", [](const Rows& base, const SparseRows& teacher, double alpha, uintptr_t alphas, uintptr_t log_probs,
                                 const Launch& launch) {
    return run("interpolate_sparse", memdec::interpolate_sparse,
        {.base = base, .teacher = teacher, .alpha = alpha, .alphas = pointer<const double>(alphas), .log_probs = pointer(log_probs)},
        launch);
  });
}
