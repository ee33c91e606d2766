// How a product of packed weights with few tokens can be cut into blocks; cost.h says how it is. Plain C++.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/device.h"
#include "cuda/sm90/fragments.h"

namespace qbert::cuda {

// A product as the choice sees it. Bytes of a block of 64 channels x 128 columns (fragments.h).
struct StreamProblem {
    int64_t t, n, k;
    int weight_bytes;  // of a block's codes
    int token_bytes;   // of a token's 128 columns
    int table_bytes;   // that every CTA keeps in shared memory besides
};

// A CTA has `groups` panels of 64 channels, a warpgroup each, which share `tokens` tokens; a cluster of `cluster`
// CTAs shares the columns. A weight is read from memory once for every `tokens` tokens.
struct StreamPlan {
    int tokens;   // 16, 32, 64, 128
    int warpgroups;   // 1, 2, 4
    int cluster;  // 1, 2, 4, 8
};

// Warpgroups of a CTA, and of an SM: the sums of 128 tokens leave registers for two.
constexpr int most_warpgroups(int tokens) { return tokens > 64 ? 2 : 4; }

// Blocks of columns that the busiest CTA of a cluster has.
int64_t cta_blocks(const StreamPlan& plan, const StreamProblem& problem);
// CTAs of an SM with so many bytes: they fill it with warpgroups, unless their pipelines would be short of memory.
int resident_ctas(const StreamPlan& plan, const StreamProblem& problem, int shared_memory);

// "tokens x channels / cluster", as in "16x64/4".
std::string name_of(const StreamPlan& plan);
// The plan of that name, one of those that fit. Throws Error.
StreamPlan stream_plan_named(const char* name, const StreamProblem& problem, int most_tokens, const Device& device);

// Shared memory of a CTA: two barriers a stage, the product's table, then stages of tokens and weights, whose place
// the sums take in the end.
inline constexpr int kMaxStages = 32;
inline constexpr int kStreamTableAt = 1024;
static_assert(kMaxStages * 2 * 8 <= kStreamTableAt);
// Sums lie (tokens, channels), a token's so many numbers apart: two tokens' eight banks further, so that the 32 lanes that
// write four tokens of eight channels meet no bank twice.
constexpr int sums_pitch(int warpgroups) { return warpgroups * kBlockRows + 4; }

struct StreamMemory {
    int stages;
    int bytes;
};
// `stages` is 0 where the plan does not fit the device.
StreamMemory stream_memory(const StreamPlan& plan, const StreamProblem& problem, const Device& device);

}  // namespace qbert::cuda
