#include "cuda/sm90/stream.h"

#include <algorithm>

#include "cuda/common/error.h"
#include "cuda/sm90/arch.h"

namespace qbert::cuda {
namespace {

constexpr int kReserved = kH100.cta_reserved;
constexpr int kWantedStages = 4;  // before CTAs share an SM

StreamMemory memory_within(const StreamPlan& plan, const StreamProblem& problem, int budget) {
    const int fixed = kStreamTableAt + problem.table_bytes, sums = plan.tokens * sums_pitch(plan.warpgroups) * 4;
    const int stage = plan.tokens * problem.token_bytes + plan.warpgroups * problem.weight_bytes;
    const auto blocks = static_cast<int>(std::min<int64_t>(cta_blocks(plan, problem), kMaxStages));
    const int stages = std::min(blocks, (budget - fixed) / stage);
    const int bytes = fixed + std::max(stages * stage, sums);
    // A stage is given back when the next one is here.
    return {bytes <= budget && stages >= std::min(blocks, 2) ? stages : 0, bytes};
}

}  // namespace

int64_t cta_blocks(const StreamPlan& plan, const StreamProblem& problem) {
    return (blocks_of(problem.k) + plan.cluster - 1) / plan.cluster;
}

int resident_ctas(const StreamPlan& plan, const StreamProblem& problem, int shared_memory) {
    int resident = most_warpgroups(plan.tokens) / plan.warpgroups;
    const auto wanted = static_cast<int>(std::min<int64_t>(cta_blocks(plan, problem), kWantedStages));
    const int all = shared_memory + kReserved;
    while (resident > 1 && memory_within(plan, problem, all / resident - kReserved).stages < wanted) resident /= 2;
    return resident;
}

std::string name_of(const StreamPlan& plan) {
    const int channels = plan.warpgroups * kBlockRows;
    return std::to_string(plan.tokens) + "x" + std::to_string(channels) + "/" + std::to_string(plan.cluster);
}

StreamPlan stream_plan_named(const char* name, const StreamProblem& problem, int most_tokens, const Device& device) {
    std::string allowed;
    for (int tokens = 16; tokens <= most_tokens; tokens *= 2) {
        for (int warpgroups = 1; warpgroups <= most_warpgroups(tokens); warpgroups *= 2) {
            for (int cluster = 1; cluster <= 8; cluster *= 2) {
                const StreamPlan plan{tokens, warpgroups, cluster};
                if (stream_memory(plan, problem, device).stages == 0) continue;
                if (name_of(plan) == name) return plan;
                allowed += (allowed.empty() ? "" : ", ") + name_of(plan);
            }
        }
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}

StreamMemory stream_memory(const StreamPlan& plan, const StreamProblem& problem, const Device& device) {
    const int resident = resident_ctas(plan, problem, device.shared_memory);
    return memory_within(plan, problem, (device.shared_memory + kReserved) / resident - kReserved);
}

}  // namespace qbert::cuda
