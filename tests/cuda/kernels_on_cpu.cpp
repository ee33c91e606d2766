// Kernels' own source run on the CPU, for tests/cuda/test_cuda_rows.py, which calls this through ctypes.
#include "warp.h"

#include "cuda/gelu.cuh"
#include "cuda/rows_kernel.cuh"

using namespace qbert::cuda;

namespace {

template <int kSteps>
void one_row(const AddLayerNormQuantize& a) {
    const bool wide_y = a.y.type == FloatType::f32, wide_residual = a.residual.type == FloatType::f32;
    if (wide_y && wide_residual) return add_layer_norm_quantize_kernel<kSteps, 4, 4>(a);
    if (wide_y) return add_layer_norm_quantize_kernel<kSteps, 4, 2>(a);
    if (wide_residual) return add_layer_norm_quantize_kernel<kSteps, 2, 4>(a);
    return add_layer_norm_quantize_kernel<kSteps, 2, 2>(a);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void gelu(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = qbert::cuda::gelu(x[i]);
}

EXPORTED void add_layer_norm_quantize(int64_t t, int64_t k, const void* y, int y_type, const void* residual,
                                        int residual_type, const void* gamma, int gamma_type, const void* beta,
                                        int beta_type, float eps, void* normed, void* codes, void* scale) {
    AddLayerNormQuantize a{t, k, {y, FloatType(y_type)}, {residual, FloatType(residual_type)},
                           {gamma, FloatType(gamma_type)}, {beta, FloatType(beta_type)}, eps, normed,
                           static_cast<int8_t*>(codes), static_cast<float*>(scale)};
    const auto warps = static_cast<unsigned>((t + kRowWarps - 1) / kRowWarps * kRowWarps);  // of whole blocks, as launched
    for (unsigned number = 0; number < warps; ++number) {
        warp::run(number, kRowWarps, [&] {
            if (k <= 2 * kStepColumns) return one_row<2>(a);
            if (k <= 3 * kStepColumns) return one_row<3>(a);
            if (k <= 4 * kStepColumns) return one_row<4>(a);
            one_row<kMaxSteps>(a);
        });
    }
}
