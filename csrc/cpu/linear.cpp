#include "cpu/linear.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/outliers.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace qbert {
namespace {

constexpr int64_t kInlineProducts = 1 << 17;  // below this a second thread costs more than it brings
constexpr int64_t kMinStripsPerTask = 8;      // a task expands its weights anew: over fewer tokens that would show
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kTokensBoundByMemory = 64;  // with so few, reading a weight takes longer than multiplying with it

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The packed activations belong to the caller, the expanded weights to each worker.
thread_local Scratch packed_activations;
thread_local Scratch worker_scratch;

void pack(const Kernels& kernels, const LinearArgs& args, int threads, uint8_t* strips) {
    const int64_t k = args.weight.k, count = ceil_div(args.t, kStripTokens), bytes = kernels.strip_bytes(k);
    const int64_t per_task = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(bytes, 1));
    parallel_for(ceil_div(count, per_task), threads, [&](int64_t task, int) {
        for (int64_t i = task * per_task; i < std::min(count, (task + 1) * per_task); ++i) {
            const int64_t first = i * kStripTokens, rows = std::min<int64_t>(kStripTokens, args.t - first);
            kernels.pack_strip(args.q + first * k, rows, k, strips + i * bytes);
        }
    });
}

}  // namespace

void linear(const LinearArgs& wanted_args, int threads) {
    LinearArgs args = wanted_args;
    const int64_t t = args.t, n = args.weight.n, k = args.weight.k;
    if (t == 0 || n == 0) return;
    check_outliers(args.weight);
    const Kernels& of_isa = kernels();
    if (t * n * k <= kInlineProducts) threads = 1;
    args.blocks_ahead = t <= kTokensBoundByMemory ? threads : 0;
    const int64_t strips = ceil_div(t, kStripTokens), blocks = args.gated ? ceil_div(n / 2, kGatedChannels) : ceil_div(n, kBlockChannels);
    const auto compute = args.gated ? of_isa.gated_block : of_isa.linear_block;
    uint8_t* packed = static_cast<uint8_t*>(packed_activations.get(strips * of_isa.strip_bytes(k)));
    pack(of_isa, args, threads, packed);

    const int64_t wanted = threads > 1 ? ceil_div(kTasksPerThread * threads, blocks) : 1;
    int64_t per_task = std::max(kMinStripsPerTask, ceil_div(strips, wanted));
    per_task += per_task % 2;  // some instruction sets take strips in pairs
    const int64_t splits = ceil_div(strips, per_task), scratch = of_isa.linear_scratch_bytes(args);
    parallel_for(blocks * splits, threads, [&](int64_t task, int) {
        const int64_t block = task / splits, first = task % splits * per_task;
        compute(args, block, packed, first, std::min(strips, first + per_task), worker_scratch.get(scratch));
    });
}

double peak_products_per_second(int threads, double seconds) {
    using Clock = std::chrono::steady_clock;
    const Kernels& k = kernels();
    std::vector<double> rate(static_cast<size_t>(std::max(threads, 1)));
    parallel_for(static_cast<int64_t>(rate.size()), threads, [&](int64_t task, int) {
        const auto begin = Clock::now();
        double products = 0, elapsed = 0;
        while (elapsed < seconds) {
            products += static_cast<double>(k.peak_products(20000));
            elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        rate[static_cast<size_t>(task)] = products / elapsed;
    });
    double total = 0;
    for (double each : rate) total += each;
    return total;
}

}  // namespace qbert
