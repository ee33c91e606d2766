// Bindings of the linears of 3- and 4-bit weights with int8 tokens.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/common/bind.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/lowbit.h"

namespace py = pybind11;

namespace qbert::cuda {
namespace {

constexpr int kRequantize = -1;  // in place of a float type of the result

void check_on_device(const LowbitLinear& a, const Device& device) {
    const auto check = [&](const char* name, const void* address) {
        if (address != nullptr) check_on_device(name, address, device);
    };
    check("q", a.q), check("s", a.s), check("codes", a.codes), check("scale", a.scale), check("out", a.out);
    check("bias", a.bias);
    check(a.code == Code::int4 ? "group_scale" : "codebook",
          a.code == Code::int4 ? static_cast<const void*>(a.group_scale) : a.codebook);
    if (a.outliers.count == 0) return;
    check("rowptr", a.outliers.rowptr), check("col", a.outliers.col), check("delta", a.outliers.delta);
    check("columns", a.columns);
}

LowbitTileIndex tile_of(const LowbitProblem& problem, const std::string& name, int sm_count) {
    return name.empty() ? lowbit_choose(problem, sm_count) : lowbit_tile_named(name.c_str());
}

void run(const LowbitLinear& linear, const std::string& tile_name, uintptr_t stream) {
    check_arguments(linear);
    if (!tile_name.empty()) lowbit_tile_named(tile_name.c_str());  // a wrong name is wrong on every machine
    const Launch launch{current_device(), at<void>(stream)};
    require_hopper(launch.device, "lowbit_linear");
    check_on_device(linear, launch.device);
    const bool gelu = linear.finish.activation == Activation::gelu;
    const LowbitProblem problem{linear.t, linear.n, linear.k, linear.code, gelu};
    const LowbitTileIndex tile = tile_of(problem, tile_name, launch.device.sm_count);
    if (tile == kLowbitFew) return launch_lowbit_few(linear, launch, tile_name.size() > 4 ? tile_name.c_str() + 4 : "");
    const int64_t needed = lowbit_columns_bytes(tile, linear.t, linear.k, linear.outliers.count);
    if (needed > 0) check_vector("columns", linear.columns, kAlignment);
    launch_lowbit_many(linear, tile, launch);
}

void lowbit_linear(int64_t t, int64_t n, int64_t k, uintptr_t q, int64_t q_pitch, uintptr_t s, const std::string& code,
                   uintptr_t codes, uintptr_t group_scale, int64_t groups, uintptr_t codebook, uintptr_t scale,
                   int64_t matrices, uintptr_t rowptr, uintptr_t col, int col_bytes, uintptr_t delta, int64_t outliers,
                   uintptr_t columns, uintptr_t bias, int bias_type, int activation, uintptr_t out, int64_t out_pitch,
                   int out_type, float inverse_out_scale, int zero, uintptr_t stream, const std::string& tile) {
    LowbitLinear a{};
    a.t = t;
    a.n = n;
    a.k = k;
    a.q = at<const int8_t>(q);
    a.q_pitch = q_pitch;
    a.s = at<const float>(s);
    a.code = code_named(code.c_str());
    a.codes = at<const uint8_t>(codes);
    a.group_scale = at<const uint8_t>(group_scale);
    a.groups = groups;
    a.codebook = at<const int8_t>(codebook);
    a.scale = at<const float>(scale);
    a.matrices = matrices;
    a.outliers = {at<const int32_t>(rowptr), at<const void>(col), col_bytes, at<const float>(delta), outliers};
    a.columns = at<int8_t>(columns);
    a.bias = at<const void>(bias);
    a.bias_type = static_cast<FloatType>(bias_type);
    a.out = at<void>(out);
    a.out_pitch = out_pitch;
    a.requantize = out_type == kRequantize;
    a.finish.activation = static_cast<Activation>(activation);
    a.finish.float_type = a.requantize ? FloatType::f32 : static_cast<FloatType>(out_type);
    a.finish.inverse_out_scale = inverse_out_scale;
    a.finish.zero = zero;
    py::gil_scoped_release release;
    run(a, tile, stream);
}

LowbitProblem problem_of(int64_t t, int64_t n, int64_t k, const std::string& code, bool gelu, int sm_count) {
    check_problem(t, n, k, sm_count);
    return {t, n, k, code_named(code.c_str()), gelu};
}

const char* choose(int64_t t, int64_t n, int64_t k, const std::string& code, bool gelu, int sm_count) {
    return kLowbitTiles[lowbit_choose(problem_of(t, n, k, code, gelu, sm_count), sm_count)].name;
}

int64_t columns_bytes(int64_t t, int64_t n, int64_t k, int64_t outliers, int sm_count, const std::string& tile) {
    problem_of(t, n, k, "dict4", false, sm_count);
    if (tile.empty()) return lowbit_columns_bytes(t, n, k, outliers, sm_count);
    return lowbit_columns_bytes(lowbit_tile_named(tile.c_str()), t, k, outliers);
}

std::vector<std::string> tile_names() {
    std::vector<std::string> names;
    for (const LowbitTile& tile : kLowbitTiles) names.emplace_back(tile.name);
    return names;
}

}  // namespace

void bind_lowbit(py::module_& module) {
    module.def("lowbit_tiles", &tile_names, "Names of the tiles that lowbit_linear is compiled for.");
    module.def("lowbit_choose", &choose, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("code"),
               py::arg("gelu") = false, py::arg("multiprocessors") = kH100.sm_count, "The tile that lowbit_linear gets.");
    module.def("lowbit_columns_bytes", &columns_bytes, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("outliers"),
               py::arg("multiprocessors") = kH100.sm_count, py::arg("tile") = "",
               "Bytes that lowbit_linear needs as `columns`.");
    module.def("lowbit_linear", &lowbit_linear, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("q"), py::arg("q_pitch"),
               py::arg("s"), py::arg("code"), py::arg("codes"), py::arg("group_scale"), py::arg("groups"),
               py::arg("codebook"), py::arg("scale"), py::arg("matrices"), py::arg("rowptr"), py::arg("col"),
               py::arg("col_bytes"), py::arg("delta"), py::arg("outliers"), py::arg("columns"), py::arg("bias"),
               py::arg("bias_type"), py::arg("activation"), py::arg("out"), py::arg("out_pitch"), py::arg("out_type"),
               py::arg("inverse_out_scale"), py::arg("zero"), py::arg("stream"), py::arg("tile") = "",
               "See LowbitLinear in csrc/cuda/sm90/lowbit.h. Pointers and the stream are integers, 0 for what is not there; "
               "`code` is int4, dict4 or dict3, `out_type` a float type or REQUANTIZE, `tile` one of lowbit_tiles().");
}

}  // namespace qbert::cuda
