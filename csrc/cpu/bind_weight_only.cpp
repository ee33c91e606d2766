// Bindings of the weight-only linears. Everything is checked on the Python side (qbert/ops), before addresses are taken.
#include <pybind11/pybind11.h>

#include "cpu/weight_only.h"

namespace py = pybind11;

namespace qbert {
namespace {

template <class T>
const T* at(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

void call_weight_only(int64_t t, int64_t n, int64_t k, uintptr_t x, int64_t x_stride, int float_type, int format,
                      uintptr_t weight, uintptr_t codebook, uintptr_t group_scale, int64_t groups, uintptr_t scale,
                      uintptr_t outlier_rowptr, uintptr_t outlier_col, bool outlier_col_wide, uintptr_t outlier_delta,
                      int64_t outliers, uintptr_t bias, int bias_type, int activation, uintptr_t out, int threads) {
    WeightOnlyArgs args{};
    args.t = t;
    args.n = n;
    args.k = k;
    args.x = at<void>(x);
    args.x_stride = x_stride;
    args.float_type = static_cast<FloatType>(float_type);
    args.format = static_cast<WeightFormat>(format);
    args.weight = at<void>(weight);
    args.codebook = at<float>(codebook);
    args.group_scale = at<uint16_t>(group_scale);
    args.groups = groups;
    args.scale = at<float>(scale);
    args.outlier_rowptr = at<int32_t>(outlier_rowptr);
    args.outlier_col = at<void>(outlier_col);
    args.outlier_col_wide = outlier_col_wide;
    args.outlier_delta = at<float>(outlier_delta);
    args.outliers = outliers;
    args.bias = at<void>(bias);
    args.bias_type = static_cast<FloatType>(bias_type);
    args.activation = static_cast<Activation>(activation);
    args.out = reinterpret_cast<void*>(out);
    py::gil_scoped_release release;
    weight_only(args, threads);
}

}  // namespace

void bind_weight_only(py::module_& m) {
    m.def("weight_only", &call_weight_only,
          "A weight-only linear: see WeightOnlyArgs in csrc/cpu/kernels.h; pointers are integers, 0 for none.");
}

}  // namespace qbert
