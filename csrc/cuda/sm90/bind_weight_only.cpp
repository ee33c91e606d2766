// Bindings of the weight-only linears of few tokens, and of a packed weight as a dense matrix.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/common/bind.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/lowbit_few.h"
#include "cuda/sm90/weight_only.h"

namespace py = pybind11;

namespace qbert::cuda {
namespace {

void check_on_device(const PackedWeight& a, const Device& device) {
    check_on_device("codes", a.codes, device);
    if (a.code == Code::int8 || a.code == Code::int4) {
        check_on_device("scale", a.scale, device);
    } else {
        check_on_device("codebook", a.codebook, device);
    }
    if (a.outliers.count == 0) return;
    check_on_device("rowptr", a.outliers.rowptr, device);
    check_on_device("col", a.outliers.col, device);
    check_on_device("delta", a.outliers.delta, device);
}

PackedWeight weight_of(int64_t n, int64_t k, const std::string& code, uintptr_t codes, uintptr_t scale, int64_t groups,
                       uintptr_t codebook, uintptr_t rowptr, uintptr_t col, int col_bytes, uintptr_t delta, int64_t outliers) {
    PackedWeight a{};
    a.n = n;
    a.k = k;
    a.code = code_named(code.c_str());
    a.codes = at<const uint8_t>(codes);
    a.scale = at<const void>(scale);
    a.groups = groups;
    a.codebook = at<const float>(codebook);
    a.outliers = {at<const int32_t>(rowptr), at<const void>(col), col_bytes, at<const float>(delta), outliers};
    return a;
}

void run(const WeightOnlyLinear& a, const std::string& tile, uintptr_t stream) {
    check_arguments(a);
    const Launch launch{current_device(), at<void>(stream)};
    require_hopper(launch.device, "weight_only_linear");
    check_on_device(a.weight, launch.device);
    check_on_device("x", a.x, launch.device);
    check_on_device("out", a.out, launch.device);
    if (a.bias != nullptr) check_on_device("bias", a.bias, launch.device);
    launch_weight_only(a, launch, tile.c_str());
}

void weight_only_linear(int64_t t, int64_t n, int64_t k, uintptr_t x, int64_t x_pitch, int x_type, const std::string& code,
                        uintptr_t codes, uintptr_t scale, int64_t groups, uintptr_t codebook, uintptr_t rowptr, uintptr_t col,
                        int col_bytes, uintptr_t delta, int64_t outliers, uintptr_t bias, int bias_type, int activation,
                        uintptr_t out, int64_t out_pitch, uintptr_t stream, const std::string& tile) {
    WeightOnlyLinear a{};
    a.t = t;
    a.x = at<const void>(x);
    a.x_pitch = x_pitch;
    a.x_type = static_cast<FloatType>(x_type);
    a.weight = weight_of(n, k, code, codes, scale, groups, codebook, rowptr, col, col_bytes, delta, outliers);
    a.bias = at<const void>(bias);
    a.bias_type = static_cast<FloatType>(bias_type);
    a.activation = static_cast<Activation>(activation);
    a.out = at<void>(out);
    a.out_pitch = out_pitch;
    py::gil_scoped_release release;
    run(a, tile, stream);
}

void expand_weight(int64_t n, int64_t k, const std::string& code, uintptr_t codes, uintptr_t scale, int64_t groups,
                   uintptr_t codebook, uintptr_t rowptr, uintptr_t col, int col_bytes, uintptr_t delta, int64_t outliers,
                   uintptr_t out, int out_type, uintptr_t stream) {
    ExpandedWeight a{};
    a.weight = weight_of(n, k, code, codes, scale, groups, codebook, rowptr, col, col_bytes, delta, outliers);
    a.out = at<void>(out);
    a.out_type = static_cast<FloatType>(out_type);
    py::gil_scoped_release release;
    check_arguments(a);
    const Launch launch{current_device(), at<void>(stream)};
    require_hopper(launch.device, "expand_weight");
    check_on_device(a.weight, launch.device);
    check_on_device("out", a.out, launch.device);
    launch_expand_weight(a, launch);
}

// A problem of no tensors, for the choice alone. Without int8 activations the tokens are of 16 bits.
StreamPlan plan_of(int64_t t, int64_t n, int64_t k, const std::string& code, bool int8_activations, int sm_count) {
    check_problem(t, n, k, sm_count);
    const Code of = code_named(code.c_str());
    if (int8_activations) return stream_choose(few_problem(t, n, k, of), kMostFewTokens, false, sm_count);
    return stream_choose(weight_only_problem(t, n, k, of), kMostWeightOnlyTokens, true, sm_count);
}

}  // namespace

void bind_weight_only(py::module_& module) {
    module.def(
        "few_choose",
        [](int64_t t, int64_t n, int64_t k, const std::string& code, bool int8_activations, int sm_count) {
            return name_of(plan_of(t, n, k, code, int8_activations, sm_count));
        },
        py::arg("t"), py::arg("n"), py::arg("k"), py::arg("code"), py::arg("int8_activations"),
        py::arg("multiprocessors") = kH100.sm_count,
        "How a product of few tokens is cut: tokens x channels of a thread block / thread blocks that share the columns.");
    module.def("weight_only_linear", &weight_only_linear, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("x"),
               py::arg("x_pitch"), py::arg("x_type"), py::arg("code"), py::arg("codes"), py::arg("scale"), py::arg("groups"),
               py::arg("codebook"), py::arg("rowptr"), py::arg("col"), py::arg("col_bytes"), py::arg("delta"),
               py::arg("outliers"), py::arg("bias"), py::arg("bias_type"), py::arg("activation"), py::arg("out"),
               py::arg("out_pitch"), py::arg("stream"), py::arg("tile") = "",
               "See WeightOnlyLinear in csrc/cuda/sm90/weight_only.h. Pointers and the stream are integers, 0 for what is not "
               "there; `code` is int8, int4, dict4 or dict3, `tile` as few_choose names it.");
    module.def("expand_weight", &expand_weight, py::arg("n"), py::arg("k"), py::arg("code"), py::arg("codes"),
               py::arg("scale"), py::arg("groups"), py::arg("codebook"), py::arg("rowptr"), py::arg("col"),
               py::arg("col_bytes"), py::arg("delta"), py::arg("outliers"), py::arg("out"), py::arg("out_type"),
               py::arg("stream"), "See ExpandedWeight in csrc/cuda/sm90/weight_only.h.");
}

}  // namespace qbert::cuda
