#include "cpu/weight_only.h"

#include <algorithm>

#include "cpu/outliers.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace qbert {
namespace {

constexpr int64_t kInlineWork = 1 << 19;  // weights plus products, below which a second thread costs more than it brings
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskPanels = 4;  // panels that are computed together; a task takes a multiple

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The widened activations belong to the caller, the sums to each worker.
thread_local Scratch widened_activations;
thread_local Scratch worker_scratch;

void widen(const Kernels& kernels, WeightOnlyArgs& args, int threads) {
    const int64_t k = args.weight.k, padded = ceil_div(k, kPanelInputs) * kPanelInputs;
    if (args.float_type == FloatType::f32 && padded == k) {
        args.wide_x = static_cast<const float*>(args.x);
        args.wide_stride = args.x_stride;
        return;
    }
    float* wide = static_cast<float*>(widened_activations.get(args.t * padded * static_cast<int64_t>(sizeof(float))));
    const int64_t rows = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(padded, 1));
    parallel_for(ceil_div(args.t, rows), threads, [&](int64_t task, int) {
        kernels.weight_only_widen(args, task * rows, std::min(args.t, (task + 1) * rows), wide);
    });
    args.wide_x = wide;
    args.wide_stride = padded;
}

}  // namespace

void weight_only(WeightOnlyArgs args, int threads) {
    const int64_t t = args.t, n = args.weight.n, k = args.weight.k;
    if (t == 0 || n == 0) return;
    check_outliers(args.weight);
    const Kernels& of_isa = kernels();
    if (n * k * (t + 1) <= kInlineWork) threads = 1;
    widen(of_isa, args, threads);

    const int64_t panels = ceil_div(n, kPanelLanes), token_blocks = ceil_div(t, kWeightOnlyTokens);
    const int64_t tokens = ceil_div(t, token_blocks);  // blocks of equal size
    const int64_t wanted = ceil_div(kTasksPerThread * threads, token_blocks);
    const int64_t per_task = ceil_div(panels, wanted * kTaskPanels) * kTaskPanels;
    const int64_t ranges = ceil_div(panels, per_task), scratch = of_isa.weight_only_scratch_bytes(args);
    parallel_for(token_blocks * ranges, threads, [&](int64_t task, int) {
        const int64_t panel = task % ranges * per_task, token = task / ranges * tokens;
        of_isa.weight_only_panels(args, panel, std::min(panels, panel + per_task), token, std::min(t, token + tokens),
                                  worker_scratch.get(scratch));
    });
}

}  // namespace qbert
