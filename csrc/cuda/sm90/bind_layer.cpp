// Bindings of what a layer of few tokens does in one launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/common/bind.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/layer.h"

namespace py = pybind11;

namespace qbert::cuda {
namespace {

void check_on_device(const W8a8LinearAddNorm& a, const Device& device) {
    check_on_device("q", a.linear.q, device);
    check_on_device("s", a.linear.s, device);
    check_on_device("weight", a.linear.weight, device);
    check_on_device("scale", a.linear.scale, device);
    if (a.linear.bias != nullptr) check_on_device("bias", a.linear.bias, device);
    check_on_device("residual", a.norm.residual.data, device);
    check_on_device("gamma", a.norm.gamma.data, device);
    check_on_device("beta", a.norm.beta.data, device);
    check_on_device("normed", a.norm.normed, device);
    check_on_device("codes", a.norm.codes, device);
    check_on_device("out_scale", a.norm.scale, device);
}

void run(const W8a8LinearAddNorm& a, const std::string& tile_name, uintptr_t stream) {
    const AddNormTileIndex tile = static_cast<AddNormTileIndex>(index_named(kAddNormTiles, tile_name.c_str()));
    check_arguments(a, tile);
    const Launch launch{current_device(), at<void>(stream)};
    require_hopper(launch.device, "w8a8_linear_add_norm");
    check_on_device(a, launch.device);
    launch_w8a8_linear_add_norm(a, tile, launch);
}

void w8a8_linear_add_norm(int64_t t, int64_t n, int64_t k, uintptr_t q, int64_t q_pitch, uintptr_t s, uintptr_t weight,
                          int64_t weight_pitch, uintptr_t scale, uintptr_t bias, int bias_type, uintptr_t residual,
                          int residual_type, uintptr_t gamma, int gamma_type, uintptr_t beta, int beta_type, float eps,
                          uintptr_t normed, uintptr_t codes, uintptr_t out_scale, uintptr_t stream, const std::string& tile) {
    W8a8LinearAddNorm a{};
    a.linear.t = a.norm.t = t;
    a.linear.n = a.norm.k = n;
    a.linear.k = k;
    a.linear.q = at<const int8_t>(q);
    a.linear.q_pitch = q_pitch;
    a.linear.s = at<const float>(s);
    a.linear.weight = at<const int8_t>(weight);
    a.linear.weight_pitch = weight_pitch;
    a.linear.scale = at<const float>(scale);
    a.linear.bias = at<const void>(bias);
    a.linear.bias_type = static_cast<FloatType>(bias_type);
    a.norm.residual = {at<const void>(residual), static_cast<FloatType>(residual_type)};
    a.norm.gamma = {at<const void>(gamma), static_cast<FloatType>(gamma_type)};
    a.norm.beta = {at<const void>(beta), static_cast<FloatType>(beta_type)};
    a.norm.eps = eps;
    a.norm.normed = at<void>(normed);
    a.norm.codes = at<int8_t>(codes);
    a.norm.scale = at<float>(out_scale);
    py::gil_scoped_release release;
    run(a, tile, stream);
}

std::string choose_name(int64_t t, int64_t n, int64_t k, int sm_count) {
    check_problem(t, n, k, sm_count);
    const AddNormTileIndex best = add_norm_choose(t, n, k, sm_count);
    return best == kAddNormTileCount ? "" : kAddNormTiles[best].name;
}

double cycles_of(const std::string& tile, int64_t t, int64_t n, int64_t k, int sm_count) {
    check_problem(t, n, k, sm_count);
    if (tile.empty()) return two_launches_cycles(t, n, k, sm_count);
    return add_norm_cycles(static_cast<AddNormTileIndex>(index_named(kAddNormTiles, tile.c_str())), t, n, k, sm_count);
}

std::vector<std::string> tile_names() {
    std::vector<std::string> names;
    for (const AddNormTile& tile : kAddNormTiles) names.emplace_back(tile.name);
    return names;
}

}  // namespace

void bind_layer(py::module_& module) {
    module.def("add_norm_tiles", &tile_names, "Names of the tiles of w8a8_linear_add_norm.");
    module.def("add_norm_choose", &choose_name, py::arg("t"), py::arg("n"), py::arg("k"),
               py::arg("multiprocessors") = kH100.sm_count,
               "The fastest tile for a linear and the norm after it, empty where two launches are faster: by a model.");
    module.def("add_norm_cycles", &cycles_of, py::arg("tile"), py::arg("t"), py::arg("n"), py::arg("k"),
               py::arg("multiprocessors") = kH100.sm_count,
               "What `add_norm_choose` compares; of the two launches where the tile is empty. By a model, not measured.");
    module.def("w8a8_linear_add_norm", &w8a8_linear_add_norm, py::arg("t"), py::arg("n"), py::arg("k"), py::arg("q"),
               py::arg("q_pitch"), py::arg("s"), py::arg("weight"), py::arg("weight_pitch"), py::arg("scale"),
               py::arg("bias"), py::arg("bias_type"), py::arg("residual"), py::arg("residual_type"), py::arg("gamma"),
               py::arg("gamma_type"), py::arg("beta"), py::arg("beta_type"), py::arg("eps"), py::arg("normed"),
               py::arg("codes"), py::arg("out_scale"), py::arg("stream"), py::arg("tile"),
               "See W8a8LinearAddNorm in csrc/cuda/sm90/layer.h. Pointers and the stream are integers, 0 for no bias; `tile` "
               "is one of add_norm_tiles().");
}

}  // namespace qbert::cuda
