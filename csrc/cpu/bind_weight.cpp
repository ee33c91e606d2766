// Weights as the kernels read them, and the enums that Python has too.
#include "cpu/bind.h"

#include "bind_enums.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace qbert {
namespace {

Weight make_weight(int format, int64_t n, int64_t k, uintptr_t codes, uintptr_t codebook, int64_t matrices, uintptr_t group_scale,
                   int64_t groups, uintptr_t scale, uintptr_t outlier_rowptr, uintptr_t outlier_col, bool outlier_col_wide,
                   uintptr_t outlier_delta, int64_t outliers) {
    Weight weight{};
    weight.format = static_cast<WeightFormat>(format);
    weight.n = n;
    weight.k = k;
    weight.codes = at<const void>(codes);
    weight.codebook = at<const void>(codebook);
    weight.matrices = matrices;
    weight.group_scale = at<const void>(group_scale);
    weight.groups = groups;
    weight.scale = at<const float>(scale);
    weight.outliers.rowptr = at<const int32_t>(outlier_rowptr);
    weight.outliers.col = at<const void>(outlier_col);
    weight.outliers.wide = outlier_col_wide;
    weight.outliers.delta = at<const float>(outlier_delta);
    weight.outliers.count = outliers;
    return weight;
}

Weight float_rows(int64_t rows, int64_t k, uintptr_t address, int float_type) {
    Weight weight{};
    weight.format = WeightFormat::float_rows;
    weight.n = rows;
    weight.k = k;
    weight.codes = at<const void>(address);
    weight.float_type = static_cast<FloatType>(float_type);
    return weight;
}

}  // namespace

void bind_weight(py::module_& m) {
    py::class_<Weight>(m, "Weight", "See Weight in csrc/cpu/kernels.h. Whoever makes one holds the tensors whose addresses it has.")
        .def(py::init(&make_weight), py::kw_only(), py::arg("format"), py::arg("n"), py::arg("k"), py::arg("codes"),
             py::arg("codebook"), py::arg("matrices"), py::arg("group_scale"), py::arg("groups"), py::arg("scale"),
             py::arg("outlier_rowptr"), py::arg("outlier_col"), py::arg("outlier_col_wide"), py::arg("outlier_delta"),
             py::arg("outliers"));
    m.def("float_rows", &float_rows, py::arg("rows"), py::arg("k"), py::arg("address"), py::arg("float_type"),
          "The Weight that a table of floats is.");
    m.attr("ENUMS") = enums();
}

}  // namespace qbert
