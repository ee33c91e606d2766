#include "cuda/stream.h"

#include <algorithm>

#include "cuda/error.h"

namespace qbert::cuda {
namespace {

// An H100's multiprocessor, a cycle: its share of memory and of L2, and products of int8 (half as many of 16 bits).
constexpr double kMemoryBytes = 14.5, kL2Bytes = 32, kInt8Products = 4096;
// What a warp group takes for a block of a strip when it has a multiprocessor to itself: its instructions, and what it waits
// for.
constexpr double kAlone = 400;
// A thread block's launch and the first bytes' way from memory; what a cluster's exchange of sums adds.
constexpr double kStart = 2000, kExchange = 600;
// Instructions that finish a value: summed over the cluster, scaled, rounded, stored. On 128 lanes.
constexpr double kFinish = 14, kLanes = 128;

constexpr int kSharedMemory = 232448;  // of an H100's thread block
constexpr int kReserved = 1024;        // that a thread block costs a multiprocessor besides
constexpr int kWantedStages = 4;       // before thread blocks share a multiprocessor

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of columns that the busiest thread block of a cluster has.
int64_t share_of(const StreamPlan& plan, const StreamProblem& problem) {
    return ceil_div(blocks_of(problem.k), plan.cluster);
}

StreamMemory memory_within(const StreamPlan& plan, const StreamProblem& problem, int budget) {
    const int fixed = kStreamTableAt + problem.table_bytes, sums = plan.tokens * sums_pitch(plan.groups) * 4;
    const int stage = plan.tokens * problem.token_bytes + plan.groups * problem.weight_bytes;
    const auto blocks = static_cast<int>(std::min<int64_t>(share_of(plan, problem), kMaxStages));
    const int stages = std::min(blocks, (budget - fixed) / stage);
    const int bytes = fixed + std::max(stages * stage, sums);
    // A stage is given back when the next one is here.
    return {bytes <= budget && stages >= std::min(blocks, 2) ? stages : 0, bytes};
}

// Thread blocks of a multiprocessor: they fill it with warp groups, unless their pipelines would be short of memory.
int resident_of(const StreamPlan& plan, const StreamProblem& problem, int shared_memory) {
    int resident = most_groups(plan.tokens) / plan.groups;
    const auto wanted = static_cast<int>(std::min<int64_t>(share_of(plan, problem), kWantedStages));
    const int all = shared_memory + kReserved;
    while (resident > 1 && memory_within(plan, problem, all / resident - kReserved).stages < wanted) resident /= 2;
    return resident;
}

// The smallest tile for all tokens, or the largest.
int tokens_of(int64_t t, int most_tokens) {
    int tokens = 16;
    while (tokens < t && tokens < most_tokens) tokens *= 2;
    return tokens;
}

}  // namespace

std::string name_of(const StreamPlan& plan) {
    return std::to_string(plan.tokens) + "x" + std::to_string(plan.groups * kBlockRows) + "/" + std::to_string(plan.cluster);
}

StreamPlan stream_plan_named(const char* name, const StreamProblem& problem, int most_tokens, const Device& device) {
    std::string allowed;
    for (int tokens = 16; tokens <= most_tokens; tokens *= 2) {
        for (int groups = 1; groups <= most_groups(tokens); groups *= 2) {
            for (int cluster = 1; cluster <= 8; cluster *= 2) {
                const StreamPlan plan{tokens, groups, cluster};
                if (stream_memory(plan, problem, device).stages == 0) continue;
                if (name_of(plan) == name) return plan;
                allowed += (allowed.empty() ? "" : ", ") + name_of(plan);
            }
        }
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}

StreamMemory stream_memory(const StreamPlan& plan, const StreamProblem& problem, const Device& device) {
    const int resident = resident_of(plan, problem, device.shared_memory);
    return memory_within(plan, problem, (device.shared_memory + kReserved) / resident - kReserved);
}

double stream_model_cycles(const StreamPlan& plan, const StreamProblem& problem, int multiprocessors) {
    const int64_t tiles = ceil_div(strips_of(problem.n), plan.groups) * ceil_div(problem.t, plan.tokens);
    const int64_t each = ceil_div(tiles * plan.cluster, multiprocessors);  // thread blocks of the busiest multiprocessor
    const auto rounds = static_cast<double>(ceil_div(each, resident_of(plan, problem, kSharedMemory)));

    const auto tokens = static_cast<double>(std::min<int64_t>(problem.t, plan.tokens));
    const double weights = plan.groups * problem.weight_bytes, channels = plan.groups * kBlockRows;
    const double products = channels * plan.tokens * problem.token_bytes / kInt8Products;
    const double step = std::max({weights / kMemoryBytes, (weights + tokens * problem.token_bytes) / kL2Bytes, products});
    const auto blocks = static_cast<double>(share_of(plan, problem));
    const double finish = channels * tokens / plan.cluster * kFinish / kLanes + (plan.cluster > 1 ? kExchange : 0);
    // Thread blocks of a multiprocessor hide each other's starts and ends, but what each of them waits for takes its time.
    return std::max(kStart + static_cast<double>(each) * blocks * step + finish, rounds * (kStart + blocks * kAlone + finish));
}

StreamPlan choose_stream(const StreamProblem& problem, int most_tokens, bool same_sums, int multiprocessors) {
    const auto best_of = [&](const StreamProblem& of, int least_cluster, int most_cluster) {
        const int tokens = tokens_of(of.t, most_tokens);
        StreamPlan best{};
        double fewest = 0;
        for (int cluster = least_cluster; cluster <= most_cluster; cluster *= 2) {
            for (int groups = 1; groups <= most_groups(tokens); groups *= 2) {
                const StreamPlan plan{tokens, groups, cluster};
                const double cycles = stream_model_cycles(plan, of, multiprocessors);
                if (best.tokens == 0 || cycles < fewest) best = plan, fewest = cycles;
            }
        }
        return best;
    };
    if (!same_sums) return best_of(problem, 1, 8);
    StreamProblem one = problem;
    one.t = 1;
    const int cluster = best_of(one, 1, 8).cluster;
    return best_of(problem, cluster, cluster);
}

}  // namespace qbert::cuda
