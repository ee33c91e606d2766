#include <cstdio>

#include "cuda/common/grid.h"
#include "cuda/common/rows_kernel.cuh"

namespace qbert::cuda {
namespace {

template <int kSteps, int kYBytes, int kResidualBytes>
void launch_kernel(const AddLayerNormQuantize& a, const Launch& launch) {
    Grid grid{};
    grid.x = static_cast<unsigned>((a.t + kRowWarps - 1) / kRowWarps);
    grid.y = 1;
    grid.threads = kRowWarps * 32;
    grid.overlap = true;
    char what[96];
    std::snprintf(what, sizeof(what), "add_layer_norm_quantize, t = %lld, k = %lld", static_cast<long long>(a.t),
                  static_cast<long long>(a.k));
    launch_grid<add_layer_norm_quantize_kernel<kSteps, kYBytes, kResidualBytes>>(grid, launch, a, what);
}

template <int kSteps>
void launch_steps(const AddLayerNormQuantize& a, const Launch& launch) {
    const bool wide_y = a.y.type == FloatType::f32, wide_residual = a.residual.type == FloatType::f32;
    if (wide_y && wide_residual) return launch_kernel<kSteps, 4, 4>(a, launch);
    if (wide_y) return launch_kernel<kSteps, 4, 2>(a, launch);
    if (wide_residual) return launch_kernel<kSteps, 2, 4>(a, launch);
    return launch_kernel<kSteps, 2, 2>(a, launch);
}

}  // namespace

// Encoders are 256, 384, 512, 768 and 1024 wide; few are wider, and take the widest kernel.
void launch_add_layer_norm_quantize(const AddLayerNormQuantize& a, const Launch& launch) {
    const int64_t steps = (a.k + kRowStepColumns - 1) / kRowStepColumns;
    if (steps <= 2) return launch_steps<2>(a, launch);
    if (steps == 3) return launch_steps<3>(a, launch);
    if (steps == 4) return launch_steps<4>(a, launch);
    return launch_steps<kMaxSteps>(a, launch);
}

}  // namespace qbert::cuda
