// How many cycles of an SM a problem takes, cut in each of the ways that kernels are compiled for: one model for all of them,
// which consists of counts, and is good for comparing only. And the choices by it: the fewest cycles, of equals the first.
// Plain C++, a pure function of the problem and the number of SMs, tested without a GPU.
#pragma once

#include <cstdint>

#include "cuda/sm90/layer.h"
#include "cuda/sm90/lowbit.h"
#include "cuda/sm90/stream.h"
#include "cuda/sm90/tiles.h"

namespace qbert::cuda {

struct W8a8Problem {
    int64_t t, n, k;
    bool gelu;
};
double w8a8_cycles(const Tile& tile, const W8a8Problem& problem, int sm_count);
TileIndex w8a8_choose(const W8a8Problem& problem, int sm_count);

// One launch for a linear and the norm after it, infinite where the tile does not fit; and the two launches for it.
double add_norm_cycles(AddNormTileIndex tile, int64_t t, int64_t n, int64_t k, int sm_count);
double two_launches_cycles(int64_t t, int64_t n, int64_t k, int sm_count);
// kAddNormTileCount where two launches take fewer cycles.
AddNormTileIndex add_norm_choose(int64_t t, int64_t n, int64_t k, int sm_count);

double stream_cycles(const StreamPlan& plan, const StreamProblem& problem, int sm_count);
// Of plans of at most so many tokens a CTA. With `same_sums` the cluster does not depend on t: sums of floats depend on how the
// columns are shared, and so a token's result does not depend on how many others there are.
StreamPlan stream_choose(const StreamProblem& problem, int most_tokens, bool same_sums, int sm_count);

struct LowbitProblem {
    int64_t t, n, k;
    Code code;
    bool gelu;
};
// Of few tokens by the best of its plans.
double lowbit_cycles(LowbitTileIndex tile, const LowbitProblem& problem, int sm_count);
LowbitTileIndex lowbit_choose(const LowbitProblem& problem, int sm_count);

}  // namespace qbert::cuda
