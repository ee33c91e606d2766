// Bindings of the weight-only linears. Everything is checked on the Python side (qbert/ops), before addresses are taken.
#include "cpu/bind.h"

#include "cpu/weight_only.h"

namespace py = pybind11;

namespace qbert {
namespace {

void call_weight_only(const Weight& weight, uintptr_t x, int64_t x_stride, int x_type, int64_t t, uintptr_t bias, int bias_type,
                      int activation, uintptr_t out, int threads) {
    WeightOnlyArgs args{};
    args.weight = weight;
    args.t = t;
    args.x = at<const void>(x);
    args.x_stride = x_stride;
    args.float_type = static_cast<FloatType>(x_type);
    args.bias = at<const void>(bias);
    args.bias_type = static_cast<FloatType>(bias_type);
    args.activation = static_cast<Activation>(activation);
    args.out = at<void>(out);
    weight_only(args, threads);
}

}  // namespace

void bind_weight_only(py::module_& m) {
    m.def("weight_only", &call_weight_only, py::call_guard<py::gil_scoped_release>(),
          "A weight-only linear: see WeightOnlyArgs in csrc/cpu/kernels.h.");
}

}  // namespace qbert
