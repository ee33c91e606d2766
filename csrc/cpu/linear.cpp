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
constexpr int64_t kStripsWorthAWeight = 16;   // a thread that has so many reads the whole weight for itself
constexpr int64_t kCachedActivations = 1 << 20;  // bytes that a task reads again and again, of a second cache of two megabytes
constexpr int64_t kTasksPerThread = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Activations that all threads read belong to the caller; those that one thread reads, and expanded weights, to each worker.
thread_local Scratch packed_activations;
thread_local Scratch worker_scratch;

int64_t blocks_of(const LinearArgs& args) {
    const int64_t n = args.weight.n;
    return args.gated ? ceil_div(n / 2, kGatedChannels) : ceil_div(n, kBlockChannels);
}

// What computes one of them.
auto block_kernel(const Kernels& kernels, const LinearArgs& args) { return args.gated ? kernels.gated_block : kernels.linear_block; }

void pack(const Kernels& kernels, const LinearArgs& args, int64_t first, int64_t end, uint8_t* strips) {
    const int64_t k = args.weight.k, bytes = kernels.strip_bytes(k);
    for (int64_t i = first; i < end; ++i, strips += bytes) {
        const int64_t token = i * kStripTokens, rows = std::min<int64_t>(kStripTokens, args.t - token);
        kernels.pack_strip(args.q + token * k, rows, k, strips);
    }
}

// Each task takes a range of tokens through all blocks of channels: what it packs and what it writes stays in its core's cache.
void linear_by_tokens(const Kernels& kernels, const LinearArgs& args, int64_t strips, int64_t most, int threads) {
    const int64_t blocks = blocks_of(args), bytes = kernels.strip_bytes(args.weight.k);
    int64_t per_task = ceil_div(strips, ceil_div(strips, most * threads) * threads);
    per_task += per_task % 2;  // some instruction sets take strips in pairs
    const int64_t scratch = kernels.linear_scratch_bytes(args);
    const auto compute = block_kernel(kernels, args);
    parallel_for(ceil_div(strips, per_task), threads, [&](int64_t task, int) {
        const int64_t first = task * per_task, end = std::min(strips, first + per_task);
        uint8_t* packed = static_cast<uint8_t*>(worker_scratch.get(per_task * bytes + scratch));
        pack(kernels, args, first, end, packed);
        for (int64_t block = 0; block < blocks; ++block) {
            compute(args, block, packed, first, end, packed + per_task * bytes);
        }
    });
}

// Each task takes a block of channels and as many tokens as leave enough tasks for all threads.
void linear_by_blocks(const Kernels& kernels, const LinearArgs& args, int64_t strips, int64_t most, int threads) {
    const int64_t blocks = blocks_of(args), bytes = kernels.strip_bytes(args.weight.k);
    uint8_t* packed = static_cast<uint8_t*>(packed_activations.get(strips * bytes));
    const int64_t per_packing = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(bytes, 1));
    parallel_for(ceil_div(strips, per_packing), threads, [&](int64_t task, int) {
        const int64_t first = task * per_packing;
        pack(kernels, args, first, std::min(strips, first + per_packing), packed + first * bytes);
    });
    const int64_t wanted = threads > 1 ? ceil_div(kTasksPerThread * threads, blocks) : 1;
    int64_t per_task = std::clamp(ceil_div(strips, std::max(wanted, ceil_div(strips, most))), kMinStripsPerTask, most);
    per_task += per_task % 2;
    const int64_t scratch = kernels.linear_scratch_bytes(args);
    const auto compute = block_kernel(kernels, args);
    parallel_for(blocks * ceil_div(strips, per_task), threads, [&](int64_t task, int) {
        const int64_t block = task % blocks, first = task / blocks * per_task, end = std::min(strips, first + per_task);
        compute(args, block, packed + first * bytes, first, end, worker_scratch.get(scratch));
    });
}

}  // namespace

void linear(const LinearArgs& wanted_args, int threads) {
    LinearArgs args = wanted_args;
    const int64_t t = args.t, n = args.weight.n, k = args.weight.k;
    if (t == 0 || n == 0) return;
    check_outliers(args.weight);
    const Kernels& of_isa = kernels();
    threads = t * n * k <= kInlineProducts ? 1 : std::max(threads, 1);
    const int64_t strips = ceil_div(t, kStripTokens);
    const int64_t most = std::clamp<int64_t>(kCachedActivations / std::max<int64_t>(of_isa.strip_bytes(k), 1), kMinStripsPerTask, kMaxStripsPerTask);
    const bool by_tokens = strips >= threads * kStripsWorthAWeight;
    args.blocks_ahead = by_tokens ? 1 : threads;
    (by_tokens ? linear_by_tokens : linear_by_blocks)(of_isa, args, strips, most, threads);
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
