// Bindings of the integer linears. Everything is checked on the Python side (qbert/ops), before addresses are taken.
#include "cpu/bind.h"

#include "cpu/linear.h"

namespace py = pybind11;

namespace qbert {
namespace {

// out_type is a FloatType, or -1 for int8 with one static scale.
void call_linear(const Weight& weight, uintptr_t q, uintptr_t s, int64_t t, uintptr_t bias, int activation, bool gated, uintptr_t out,
                 int out_type, float inverse_out_scale, int zero, int threads) {
    LinearArgs args{};
    args.weight = weight;
    args.t = t;
    args.q = at<const int8_t>(q);
    args.s = at<const float>(s);
    args.bias = at<const float>(bias);
    args.activation = static_cast<Activation>(activation);
    args.gated = gated;
    args.out = at<void>(out);
    args.requantize = out_type < 0;
    args.float_type = args.requantize ? FloatType::f32 : static_cast<FloatType>(out_type);
    args.inverse_out_scale = inverse_out_scale;
    args.zero = zero;
    linear(args, threads);
}

}  // namespace

void bind_linear(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    m.def("linear", &call_linear, Free(), "An integer linear: see LinearArgs in csrc/cpu/kernels.h.");
    m.def("peak_products_per_second", &peak_products_per_second, py::arg("threads"), py::arg("seconds") = 0.2, Free(),
          "Products per second that the matrix instructions in use reach from registers, over all threads together.");
}

}  // namespace qbert
