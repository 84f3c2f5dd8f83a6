#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"

namespace py = pybind11;
using namespace longvita;
using namespace longvita::cuda;

namespace {

using Sizes = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 2>;

Rows3 rows(uintptr_t address, DType dtype, const Rows3& like, Strides stride, const char* name) {
  return rows3(address, dtype, like.tokens, like.heads, like.dim, stride[0], stride[1], name);
}

// A dense result, or nothing where there is no address.
Rows3 dense(uintptr_t address, const AttentionProblem& p, const Rows3& like, const char* name) {
  if (address == 0) return {};
  return rows(address, p.result, like, {like.heads * like.dim, like.dim}, name);
}

AttentionProblem problem(int dtype, int result, uintptr_t q, Sizes q_size, Strides q_stride, uintptr_t k, Sizes k_size, Strides k_stride,
                         uintptr_t v, Strides v_stride, uintptr_t cu_q, uintptr_t cu_k, int64_t entries, double scale, double softcap,
                         int64_t left, int64_t right) {
  check(dtype >= 0 && dtype <= 2, "varlen_attention: expected float32, bfloat16 or float16");
  check(result == dtype || DType(result) == DType::f32, "varlen_attention: results come in the dtype of q or in float32");
  check(entries > 0, "cu_seqlens: at least one entry");
  AttentionProblem p;
  p.dtype = DType(dtype), p.result = DType(result);
  p.q = rows3(q, p.dtype, q_size[0], q_size[1], q_size[2], q_stride[0], q_stride[1], "q");
  p.k = rows3(k, p.dtype, k_size[0], k_size[1], k_size[2], k_stride[0], k_stride[1], "k");
  p.v = rows(v, p.dtype, p.k, v_stride, "v");
  p.cu_q = pointer<const int32_t>(cu_q, entries, "cu_seqlens_q"), p.cu_k = pointer<const int32_t>(cu_k, entries, "cu_seqlens_k");
  p.docs = entries - 1, p.scale = scale, p.softcap = softcap, p.left = left, p.right = right;
  return p;
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<AttentionProblem>(m, "VarlenProblem").def(py::init(&problem));
  m.def("varlen_attention_cannot", [](const AttentionProblem& p) { return attention_cannot(p); }, "why these kernels do not take it, or \"\"");
  m.def("varlen_attention_scratch", &attention_scratch, py::arg("problem"), py::arg("backward"), py::arg("single_pass") = false,
        "bytes of scratch; single_pass: of a backward that makes dq in the same pass as dk and dv");
  m.def("varlen_attention_forward",
        [](const AttentionProblem& p, uintptr_t out, uintptr_t lse, uintptr_t lse_rest, uintptr_t scratch, int64_t scratch_bytes,
           uintptr_t stream) {
          AttentionForward f;
          const int64_t rows = p.q.tokens * p.q.heads;
          f.p = p, f.out = dense(out, p, p.q, "out");
          check(rows == 0 || out != 0, "varlen_attention: out is null");
          f.lse = pointer<float>(lse, rows, "lse"), f.lse_rest = pointer<float>(lse_rest, rows, "lse_rest");
          f.scratch = reinterpret_cast<void*>(scratch), f.scratch_bytes = scratch_bytes;
          py::gil_scoped_release release;
          if (rows > 0) attention_forward(f, reinterpret_cast<void*>(stream));
        });
  m.def("varlen_attention_backward",
        [](const AttentionProblem& p, uintptr_t out, Strides out_stride, uintptr_t lse, uintptr_t lse_rest, Strides lse_stride,
           uintptr_t grad_out, Strides grad_out_stride, uintptr_t grad_lse, Strides grad_lse_stride, std::array<uintptr_t, 3> grads, bool add,
           bool single_pass, uintptr_t scratch, int64_t scratch_bytes, uintptr_t stream) {
          AttentionBackward b;
          const int64_t rows_of_lse = p.q.tokens * p.q.heads;
          b.p = p;
          b.out = rows(out, p.dtype, p.q, out_stride, "out"), b.grad_out = rows(grad_out, p.dtype, p.q, grad_out_stride, "grad_out");
          for (const Strides& x : {lse_stride, grad_lse_stride}) check(x[0] >= 0 && x[1] >= 0, "lse: strides must not be negative");
          b.lse = pointer<const float>(lse, rows_of_lse, "lse"), b.lse_rest = pointer<const float>(lse_rest, rows_of_lse, "lse_rest");
          b.lse_stride_head = lse_stride[0], b.lse_stride_token = lse_stride[1];
          b.grad_lse = pointer<const float>(grad_lse, 0, "grad_lse");
          b.grad_lse_stride_head = grad_lse_stride[0], b.grad_lse_stride_token = grad_lse_stride[1];
          b.grad_q = dense(grads[0], p, p.q, "grad_q"), b.grad_k = dense(grads[1], p, p.k, "grad_k"), b.grad_v = dense(grads[2], p, p.k, "grad_v");
          b.add = add, b.single_pass = single_pass, b.scratch = reinterpret_cast<void*>(scratch), b.scratch_bytes = scratch_bytes;
          py::gil_scoped_release release;
          attention_backward(b, reinterpret_cast<void*>(stream));
        });
}
