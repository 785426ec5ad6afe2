// memdec._C: unpacks Python's arguments, releases the GIL, runs an op, turns its status into an exception.
//
// A pointer travels as an int (0 is null). Logits travel as the tuple that memdec.ops.rows.rows() makes of a tensor:
//   (data_ptr, dtype code, count, inner, outer_stride, inner_stride, columns)
#include <pybind11/pybind11.h>

#include <string>

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
    case Status::bad_structure:
      throw py::value_error(where + " holds " + number(status.got) + " at position " + number(status.at) + ", wanted " +
                            number(status.wanted) + " or more: CSR row pointers start at 0, never fall and end at the number of ids");
    case Status::out_of_memory: throw std::bad_alloc();
  }
}

// Runs one op with the GIL released.
template <class Op>
void run(const char* name, Status (*function)(const Op&, const Launch&), const Op& op, int threads) {
  Status status;
  {
    const py::gil_scoped_release released;
    status = function(op, Launch{.threads = threads > 0 ? threads : 1});
  }
  raise_unless_ok(name, status);
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
  info["cuda"] = "off";
  info["arches"] = py::list();
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

  m.def("token_log_prob", [](const Rows& logits, uintptr_t targets, uintptr_t log_prob, uintptr_t max, uintptr_t sum, int threads) {
    run("token_log_prob", memdec::token_log_prob,
        {.logits = logits, .targets = pointer<const int64_t>(targets), .log_prob = pointer(log_prob), .max = pointer(max), .sum = pointer(sum)},
        threads);
  });

  m.def("alignment_loss", [](const Rows& logits, uintptr_t labels, int64_t ignore_index, const SparseRows& teacher, double beta,
                             int reduction, uintptr_t total, uintptr_t kl, uintptr_t ce, uintptr_t max, uintptr_t sum,
                             const Rows& grad, double grad_scale, int threads) {
    run("alignment_loss", memdec::alignment_loss,
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
         .grad_scale = grad_scale},
        threads);
  });

  m.def("alignment_gradient", [](const Rows& logits, uintptr_t labels, int64_t ignore_index, const SparseRows& teacher, double beta,
                                 int reduction, uintptr_t max, uintptr_t sum, uintptr_t grad_total, const Rows& grad, int threads) {
    run("alignment_gradient", memdec::alignment_gradient,
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
        threads);
  });
}
