// Bindings of the W8A8 linear and of the choice of its tiles.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/common/bind.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/launch.h"

namespace py = pybind11;

namespace qbert::cuda {
namespace {

constexpr int kRequantize = -1;  // in place of a float type of the result

void check_on_device(const W8a8Linear& a, const Device& device) {
    check_on_device("q", a.q, device);
    check_on_device("s", a.s, device);
    check_on_device("weight", a.weight, device);
    check_on_device("scale", a.scale, device);
    check_on_device("out", a.out, device);
    if (a.bias != nullptr) check_on_device("bias", a.bias, device);
}

void run(const W8a8Linear& linear, const std::string& tile_name, uintptr_t stream) {
    check_arguments(linear);
    const bool gelu = linear.finish.activation == Activation::gelu;
    // A wrong name is wrong on every machine: before the device is asked for.
    TileIndex tile = tile_name.empty() ? kTileCount : tile_named(tile_name.c_str());
    const Launch launch{current_device(), at<void>(stream)};
    require_hopper(launch.device, "w8a8_linear");
    check_on_device(linear, launch.device);
    if (tile == kTileCount) tile = w8a8_choose({linear.t, linear.n, linear.k, gelu}, launch.device.sm_count);
    if (kTiles[tile].schedule == Schedule::small) return launch_w8a8_small(linear, kTiles[tile], launch);
    constexpr decltype(&launch_w8a8<k128x256>) launchers[kFirstSmall] = {launch_w8a8<k128x256>, launch_w8a8<k128x192>,
                                                                         launch_w8a8<k128x128>, launch_w8a8<k64x128>};
    launchers[tile](linear, launch);
}

void w8a8_linear(int64_t t, int64_t n, int64_t k, uintptr_t q, int64_t q_pitch, uintptr_t s, uintptr_t weight,
                 int64_t weight_pitch, uintptr_t scale, uintptr_t bias, int bias_type, int activation, uintptr_t out,
                 int64_t out_pitch, int out_type, float inverse_out_scale, int zero, uintptr_t stream, const std::string& tile) {
    W8a8Linear a{};
    a.t = t;
    a.n = n;
    a.k = k;
    a.q = at<const int8_t>(q);
    a.q_pitch = q_pitch;
    a.s = at<const float>(s);
    a.weight = at<const int8_t>(weight);
    a.weight_pitch = weight_pitch;
    a.scale = at<const float>(scale);
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

const char* choose_name(int64_t t, int64_t n, int64_t k, bool gelu, int sm_count) {
    check_problem(t, n, k, sm_count);
    return kTiles[w8a8_choose({t, n, k, gelu}, sm_count)].name;
}

double cycles_of(const std::string& tile, int64_t t, int64_t n, int64_t k, bool gelu, int sm_count) {
    check_problem(t, n, k, sm_count);
    return w8a8_cycles(kTiles[tile_named(tile.c_str())], {t, n, k, gelu}, sm_count);
}

std::vector<std::string> tile_names() {
    std::vector<std::string> names;
    for (const Tile& tile : kTiles) names.emplace_back(tile.name);
    return names;
}

}  // namespace

void bind_w8a8(py::module_& module) {
    module.attr("REQUANTIZE") = kRequantize;
    module.def("tiles", &tile_names, "Names of the tiles that the W8A8 kernels are compiled for.");
    module.def("choose", &choose_name, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("gelu") = false,
               py::arg("multiprocessors") = kH100.sm_count, "The tile that a W8A8 linear gets.");
    module.def("model_cycles", &cycles_of, py::arg("tile"), py::arg("t"), py::arg("n"), py::arg("k"),
               py::arg("gelu") = false, py::arg("multiprocessors") = kH100.sm_count,
               "What `choose` compares: cycles by a model, not measured.");
    module.def("w8a8_linear", &w8a8_linear, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("q"), py::arg("q_pitch"),
               py::arg("s"), py::arg("weight"), py::arg("weight_pitch"), py::arg("scale"), py::arg("bias"),
               py::arg("bias_type"), py::arg("activation"), py::arg("out"), py::arg("out_pitch"), py::arg("out_type"),
               py::arg("inverse_out_scale"), py::arg("zero"), py::arg("stream"), py::arg("tile") = "",
               "See W8a8Linear in csrc/cuda/common/w8a8.h. Pointers and the stream are integers, 0 for no bias; `out_type` is "
               "a float type or REQUANTIZE; `tile` is one of tiles(), by default what choose says.");
}

}  // namespace qbert::cuda
