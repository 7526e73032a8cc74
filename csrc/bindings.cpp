// Python bindings of the extension.
#include <torch/csrc/utils/pybind.h>

#include "api.h"

extern "C" const char fastattn_build_info[];

namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of fastattn; call them through fastattn's own functions.";
  m.attr("build_info") = py::str(fastattn_build_info);

  m.def("attention_forward", &fastattn::attention_forward, release_gil(), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("key_lengths") = py::none(), py::arg("top_left") = false, py::arg("window_left") = -1,
        py::arg("window_right") = -1, py::arg("softcap") = 0.0, py::arg("scale"), py::arg("clusters") = true);
  m.def("varlen_forward", &fastattn::varlen_forward, release_gil(), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("top_left") = false, py::arg("window_left") = -1,
        py::arg("window_right") = -1, py::arg("softcap") = 0.0, py::arg("scale"));
  m.def("attention_backward", &fastattn::attention_backward, release_gil(), py::arg("dout"), py::arg("query"),
        py::arg("key"), py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("dlse") = py::none(),
        py::arg("key_lengths") = py::none(), py::arg("top_left") = false, py::arg("window_left") = -1,
        py::arg("window_right") = -1, py::arg("softcap") = 0.0, py::arg("scale"), py::arg("query_grad") = true,
        py::arg("key_grads") = true, py::arg("one_pass") = false);
  m.def("varlen_backward", &fastattn::varlen_backward, release_gil(), py::arg("dout"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("dlse") = py::none(), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("top_left") = false, py::arg("window_left") = -1, py::arg("window_right") = -1,
        py::arg("softcap") = 0.0, py::arg("scale"), py::arg("query_grad") = true, py::arg("key_grads") = true,
        py::arg("one_pass") = false);
  m.def("attention_backward_tiles", &fastattn::attention_backward_tiles, py::arg("head_dim"),
        py::arg("softcap") = false);
  m.def("attention_forward_cluster", &fastattn::attention_forward_cluster, py::arg("head_dim"));
  m.def("attention_forward_tile", &fastattn::attention_forward_tile, py::arg("head_dim"), py::arg("windowed") = false,
        py::arg("softcap") = false);

  m.def("softmax_forward", &fastattn::softmax_forward, release_gil(), py::arg("x"), py::arg("mask"), py::arg("dim"),
        py::arg("scale"), py::arg("causal"), py::arg("log"), py::arg("dtype"));
  m.def("softmax_backward", &fastattn::softmax_backward, release_gil(), py::arg("dout"), py::arg("out"), py::arg("dim"),
        py::arg("scale"), py::arg("log"), py::arg("dtype"));
  m.def("softmax_plan", &fastattn::softmax_plan, py::arg("columns"), py::arg("element_size"),
        py::arg("backward") = false, py::arg("clusters") = false);

  m.def("cross_entropy_forward", &fastattn::cross_entropy_forward, release_gil(), py::arg("logits"), py::arg("target"),
        py::arg("ignore_index") = -100, py::arg("label_smoothing") = 0.0, py::arg("class_weight") = py::none(),
        py::arg("z_loss") = 0.0);
  m.def("cross_entropy_backward", &fastattn::cross_entropy_backward, release_gil(), py::arg("dlosses"),
        py::arg("norms"), py::arg("logits"), py::arg("target"), py::arg("ignore_index") = -100,
        py::arg("label_smoothing") = 0.0, py::arg("class_weight") = py::none(), py::arg("z_loss") = 0.0,
        py::arg("out") = py::none());
}
