// Bindings of the integer linears. Everything is checked on the Python side (qbert/ops), before addresses are taken.
#include <pybind11/pybind11.h>

#include "cpu/linear.h"

namespace py = pybind11;

namespace qbert {
namespace {

template <class T>
const T* at(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

// out_type is a FloatType, or -1 for int8 with one static scale.
void call_linear(int64_t t, int64_t n, int64_t k, uintptr_t q, uintptr_t s, int format, uintptr_t weight, uintptr_t codebook,
                 int64_t matrices, uintptr_t group_scale, int64_t groups, uintptr_t scale, uintptr_t outlier_rowptr,
                 uintptr_t outlier_col, bool outlier_col_wide, uintptr_t outlier_delta, int64_t outliers,
                 uintptr_t bias, int activation,
                 uintptr_t out, int out_type, float inverse_out_scale, int threads) {
    LinearArgs args{};
    args.t = t;
    args.n = n;
    args.k = k;
    args.q = at<int8_t>(q);
    args.s = at<float>(s);
    args.format = static_cast<WeightFormat>(format);
    args.weight = at<void>(weight);
    args.codebook = at<int8_t>(codebook);
    args.matrices = matrices;
    args.group_scale = at<uint8_t>(group_scale);
    args.groups = groups;
    args.scale = at<float>(scale);
    args.outlier_rowptr = at<int32_t>(outlier_rowptr);
    args.outlier_col = at<void>(outlier_col);
    args.outlier_col_wide = outlier_col_wide;
    args.outlier_delta = at<float>(outlier_delta);
    args.outliers = outliers;
    args.bias = at<float>(bias);
    args.activation = static_cast<Activation>(activation);
    args.out = reinterpret_cast<void*>(out);
    args.requantize = out_type < 0;
    args.float_type = args.requantize ? FloatType::f32 : static_cast<FloatType>(out_type);
    args.inverse_out_scale = inverse_out_scale;
    py::gil_scoped_release release;
    linear(args, threads);
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("linear", &call_linear, "An integer linear: see LinearArgs in csrc/cpu/kernels.h; pointers are integers, 0 for none.");
    m.def("peak_products_per_second", &peak_products_per_second, py::arg("threads"), py::arg("seconds") = 0.2,
          py::call_guard<py::gil_scoped_release>(),
          "Products per second that the matrix instructions in use reach from registers, over all threads together.");
}

}  // namespace qbert
