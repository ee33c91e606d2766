// How a product of packed weights with few tokens is cut into blocks: a pure choice, the same for every GPU that is not here.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/device.h"
#include "cuda/fragments.h"

namespace qbert::cuda {

// A product as the choice sees it. Bytes of a block of 64 channels x 128 columns (fragments.h).
struct StreamProblem {
    int64_t t, n, k;
    int weight_bytes;  // of a block's codes
    int token_bytes;   // of a token's 128 columns
    int table_bytes;   // that every thread block keeps in shared memory besides
};

// A thread block has `groups` strips of 64 channels, a warp group each, which share `tokens` tokens; a cluster of `cluster`
// thread blocks shares the columns. A weight is read from memory once for every `tokens` tokens.
struct StreamPlan {
    int tokens;   // 16, 32, 64, 128
    int groups;   // 1, 2, 4
    int cluster;  // 1, 2, 4, 8
};

// Warp groups of a thread block, and of a multiprocessor: the sums of 128 tokens leave registers for two.
constexpr int most_groups(int tokens) { return tokens > 64 ? 2 : 4; }

// "tokens x channels / cluster", as in "16x64/4".
std::string name_of(const StreamPlan& plan);
// The plan of that name, one of those that fit. Throws Error.
StreamPlan stream_plan_named(const char* name, const StreamProblem& problem, int most_tokens, const Device& device);

// Cycles by a model, for comparing plans only.
double stream_model_cycles(const StreamPlan& plan, const StreamProblem& problem, int multiprocessors);
// The plan with the fewest model cycles, of at most so many tokens a block. With `same_sums` the cluster does not depend on t:
// sums of floats depend on how the columns are shared, and so a token's result does not depend on how many others there are.
StreamPlan choose_stream(const StreamProblem& problem, int most_tokens, bool same_sums, int multiprocessors);

// Shared memory of a thread block: two barriers a stage, the product's table, then stages of tokens and weights, whose place
// the sums take in the end.
inline constexpr int kMaxStages = 32;
inline constexpr int kStreamTableAt = 1024;
static_assert(kMaxStages * 2 * 8 <= kStreamTableAt);
// Sums lie (tokens, channels), a token's so many numbers apart: two tokens' eight banks further, so that the 32 lanes that
// write four tokens of eight channels meet no bank twice.
constexpr int sums_pitch(int groups) { return groups * kBlockRows + 4; }

struct StreamMemory {
    int stages;
    int bytes;
};
// `stages` is 0 where the plan does not fit the device.
StreamMemory stream_memory(const StreamPlan& plan, const StreamProblem& problem, const Device& device);

}  // namespace qbert::cuda
