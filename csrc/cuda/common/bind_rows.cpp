// Bindings of the row kernels.
#include <pybind11/pybind11.h>

#include "cuda/common/bind.h"
#include "cuda/common/rows.h"

namespace py = pybind11;

namespace qbert::cuda {
namespace {

Floats floats(uintptr_t address, int type) { return {at<const void>(address), static_cast<FloatType>(type)}; }

void run(const AddLayerNormQuantize& a, uintptr_t stream) {
    check_arguments(a);
    const Launch launch{current_device(), at<void>(stream)};
    check_on_device("y", a.y.data, launch.device);
    check_on_device("residual", a.residual.data, launch.device);
    check_on_device("gamma", a.gamma.data, launch.device);
    check_on_device("beta", a.beta.data, launch.device);
    check_on_device("normed", a.normed, launch.device);
    check_on_device("codes", a.codes, launch.device);
    check_on_device("scale", a.scale, launch.device);
    launch_add_layer_norm_quantize(a, launch);
}

void add_layer_norm_quantize(int64_t t, int64_t k, uintptr_t y, int y_type, uintptr_t residual, int residual_type,
                             uintptr_t gamma, int gamma_type, uintptr_t beta, int beta_type, float eps, uintptr_t normed,
                             uintptr_t codes, uintptr_t scale, uintptr_t stream) {
    AddLayerNormQuantize a{};
    a.t = t;
    a.k = k;
    a.y = floats(y, y_type);
    a.residual = floats(residual, residual_type);
    a.gamma = floats(gamma, gamma_type);
    a.beta = floats(beta, beta_type);
    a.eps = eps;
    a.normed = at<void>(normed);
    a.codes = at<int8_t>(codes);
    a.scale = at<float>(scale);
    py::gil_scoped_release release;
    run(a, stream);
}

}  // namespace

void bind_rows(py::module_& module) {
    module.attr("ROW_COLUMNS") = kLaneColumns;
    module.attr("MAX_ROW_COLUMNS") = kMaxRowColumns;
    module.def("add_layer_norm_quantize", &add_layer_norm_quantize, py::arg("t"), py::arg("k"), py::arg("y"),
               py::arg("y_type"), py::arg("residual"), py::arg("residual_type"), py::arg("gamma"), py::arg("gamma_type"),
               py::arg("beta"), py::arg("beta_type"), py::arg("eps"), py::arg("normed"), py::arg("codes"), py::arg("scale"),
               py::arg("stream"), "See AddLayerNormQuantize in csrc/cuda/common/rows.h. Pointers and the stream are integers.");
}

}  // namespace qbert::cuda
