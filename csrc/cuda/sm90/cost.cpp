#include "cuda/sm90/cost.h"

#include <algorithm>
#include <limits>

#include "cuda/sm90/arch.h"
#include "cuda/sm90/lowbit_few.h"
#include "cuda/sm90/lowbit_plan.h"

namespace qbert::cuda {
namespace {

constexpr ArchSpec kArch = kH100;

// Instructions that finish one value, counted in the machine code: scales, bias, rounding and the way out; of a stream its
// sum over the cluster too. GELU on top has 11, of which the power of two runs at an eighth of the others' rate.
constexpr double kW8a8Finish = 10, kLowbitFinish = 12, kStreamFinish = 14, kGelu = 14;
// What products of any number of tokens read of shared memory a cycle: 32 bytes a token, which half a cycle multiplies.
constexpr double kOperandBytes = 64;
// What a warpgroup takes for a block of a panel when it has an SM to itself: its instructions, and what it waits for.
constexpr double kAloneCycles = 400;
// Two sums over a warp, and what is done to a row between them and after: dependent instructions, so cycles, not throughput.
constexpr double kRowEndCycles = 700;

// Of a warp for a block, see expand.cuh.
constexpr double expand_instructions(Code code) { return code == Code::dict3 ? 42 : code == Code::dict4 ? 88 : 72; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one SM gets of L2 in a cycle when so many of them ask.
double l2_bytes(int64_t busy) { return std::min(kArch.l2_bytes, kArch.l2_bytes_all / static_cast<double>(busy)); }

double finish_cycles(double values, double instructions, bool gelu) {
    return values * (instructions + (gelu ? kGelu : 0)) / kArch.float_lanes;
}

// So many tiles one after the other, each with its products and its end. In pingpong either stage takes tile after tile, and
// the shorter one hides behind the other, but for the first products or the last end.
double tiles_cycles(double tiles, double products, double finish, bool pingpong) {
    if (!pingpong) return kArch.launch + tiles * (products + finish);
    return kArch.launch + std::max(tiles * products + finish, products + tiles * finish);
}

// ---- W8A8 -------------------------------------------------------------------------------------------------------------

// One tile a CTA, and CTAs that wait for no one: an SM's are under way together.
double small_cycles(const Tile& tile, const W8a8Problem& problem, int sm_count) {
    const int64_t ctas = ceil_div(problem.t, tile.t) * ceil_div(problem.n, tile.n) * tile.cluster;
    const double each = static_cast<double>(ceil_div(ctas, sm_count));
    const double fetched = tile.k * (tile.t + tile.n) / l2_bytes(std::min<int64_t>(ctas, sm_count));
    const double step = std::max(tile.t * tile.n * tile.k / kArch.s8_macs, fetched);
    const auto steps = static_cast<double>(ceil_div(ceil_div(problem.k, tile.k), tile.cluster));
    const double finish = finish_cycles(tile.t * tile.n, kW8a8Finish, problem.gelu) / tile.cluster +
                          (tile.cluster > 1 ? kArch.cluster_exchange : 0);
    return kArch.overlapped_launch + each * (steps * step + finish);
}

// ---- the choices ------------------------------------------------------------------------------------------------------

// Of 0 ... count - 1 that with the fewest cycles.
template <class Cycles>
int fewest(int first, int count, const Cycles& cycles_of) {
    int best = first;
    double least = cycles_of(first);
    for (int i = first + 1; i < count; ++i) {
        const double cycles = cycles_of(i);
        if (cycles < least) best = i, least = cycles;
    }
    return best;
}

// The smallest tile for all tokens, or the largest.
int stream_tokens(int64_t t, int most_tokens) {
    int tokens = 16;
    while (tokens < t && tokens < most_tokens) tokens *= 2;
    return tokens;
}

StreamPlan best_stream(const StreamProblem& problem, int most_tokens, int least_cluster, int most_cluster, int sm_count) {
    const int tokens = stream_tokens(problem.t, most_tokens);
    StreamPlan best{};
    double least = std::numeric_limits<double>::infinity();
    for (int cluster = least_cluster; cluster <= most_cluster; cluster *= 2) {
        for (int warpgroups = 1; warpgroups <= most_warpgroups(tokens); warpgroups *= 2) {
            const StreamPlan plan{tokens, warpgroups, cluster};
            const double cycles = stream_cycles(plan, problem, sm_count);
            if (cycles < least) best = plan, least = cycles;
        }
    }
    return best;
}

}  // namespace

double w8a8_cycles(const Tile& tile, const W8a8Problem& problem, int sm_count) {
    if (tile.schedule == Schedule::small) return small_cycles(tile, problem, sm_count);
    const int64_t rows = ceil_div(ceil_div(problem.t, tile.t), tile.cluster) * tile.cluster;  // a cluster runs whole
    const int64_t tiles = rows * ceil_div(problem.n, tile.n);
    const double each = static_cast<double>(ceil_div(tiles, sm_count));  // of the busiest SM
    const double fetched = tile.k * (tile.t + static_cast<double>(tile.n) / tile.cluster);  // bytes a step in k
    const double step =
        std::max(tile.t * tile.n * tile.k / kArch.s8_macs, fetched / l2_bytes(std::min<int64_t>(tiles, sm_count)));
    const double products = static_cast<double>(ceil_div(problem.k, tile.k)) * step;
    const double finish = finish_cycles(tile.t * tile.n, kW8a8Finish, problem.gelu);
    return tiles_cycles(each, products, finish, tile.schedule == Schedule::pingpong);
}

double add_norm_cycles(AddNormTileIndex tile, int64_t t, int64_t n, int64_t k, int sm_count) {
    if (!add_norm_fits(tile, n)) return std::numeric_limits<double>::infinity();
    const int tokens = kAddNormTiles[tile].tokens;
    const int64_t ctas = n / kAddNormChannels, clusters = ceil_div(t, tokens);
    const int64_t at_once = kArch.gpcs * std::max<int64_t>(sm_count / kArch.gpcs / ctas, 1);
    const Tile each{"", tokens, kAddNormChannels, 128, 1, Schedule::small};
    // Every round is a problem of its own whose tiles all have an SM.
    const int64_t round = std::min(clusters, at_once) * tokens;
    const double products = w8a8_cycles(each, {round, n, k, false}, sm_count) - kArch.overlapped_launch;
    const double rounds = static_cast<double>(ceil_div(clusters, at_once));
    return kArch.overlapped_launch + rounds * (products + kArch.cluster_exchange + kRowEndCycles);
}

double two_launches_cycles(int64_t t, int64_t n, int64_t k, int sm_count) {
    const W8a8Problem problem{t, n, k, false};
    const double linear = w8a8_cycles(kTiles[w8a8_choose(problem, sm_count)], problem, sm_count);
    constexpr int kBytes = 2 + 2 + 2 + 1;  // y, residual, normed, codes
    return linear + kArch.launch + kRowEndCycles + static_cast<double>(t * n * kBytes) / kArch.l2_bytes_all;
}

double stream_cycles(const StreamPlan& plan, const StreamProblem& problem, int sm_count) {
    const int64_t tiles = ceil_div(panels_of(problem.n), plan.warpgroups) * ceil_div(problem.t, plan.tokens);
    const int64_t each = ceil_div(tiles * plan.cluster, sm_count);  // CTAs of the busiest SM
    const auto rounds = static_cast<double>(ceil_div(each, resident_ctas(plan, problem, kArch.cta_shared)));

    const auto tokens = static_cast<double>(std::min<int64_t>(problem.t, plan.tokens));
    const double weights = plan.warpgroups * problem.weight_bytes, channels = plan.warpgroups * kBlockRows;
    const double products = channels * plan.tokens * problem.token_bytes / kArch.s8_macs;
    const double step = std::max({weights / kArch.memory_bytes,
                                  (weights + tokens * problem.token_bytes) / l2_bytes(kArch.sm_count), products});
    const auto blocks = static_cast<double>(cta_blocks(plan, problem));
    const double finish = channels * tokens / plan.cluster * kStreamFinish / kArch.float_lanes +
                          (plan.cluster > 1 ? kArch.cluster_exchange : 0);
    // CTAs of an SM hide each other's starts and ends, but what each of them waits for takes its time.
    return std::max(kArch.launch + static_cast<double>(each) * blocks * step + finish,
                    rounds * (kArch.launch + blocks * kAloneCycles + finish));
}

double lowbit_cycles(LowbitTileIndex index, const LowbitProblem& problem, int sm_count) {
    if (index == kLowbitFew) {
        const StreamProblem stream = few_problem(problem.t, problem.n, problem.k, problem.code);
        return stream_cycles(stream_choose(stream, kMostFewTokens, false, sm_count), stream, sm_count);
    }
    const LowbitTile& tile = kLowbitTiles[index];
    const LowbitPlan plan = lowbit_plan(tile, problem.t, problem.n);
    const int clusters = lowbit_clusters(plan, sm_count);
    const double each = (plan.tiles() + clusters - 1) / clusters;  // tiles of the busiest cluster

    // A step of k, kBlockColumns: what takes longest of the products, the way from L2, shared memory, and expansion.
    const int panels = tile.channels / kBlockRows;
    const double codes = panels * block_bytes(problem.code), token_bytes = tile.tokens * kBlockColumns;
    const double products = tile.tokens * tile.channels * kBlockColumns / kArch.s8_macs;
    const double shared = products * kOperandBytes + token_bytes + 2 * codes;  // the operand; written; codes written and read
    const double expand = panels * expand_instructions(problem.code) * kArch.integer_issue_cycles;
    const double step = std::max({products, (token_bytes / kClusterCtas + codes) / l2_bytes(kClusterCtas * clusters),
                                  shared / kArch.shared_bytes, expand});
    const double finish = finish_cycles(tile.tokens * tile.channels, kLowbitFinish, problem.gelu);
    return tiles_cycles(each, static_cast<double>(blocks_of(problem.k)) * step, finish, tile.pingpong);
}

TileIndex w8a8_choose(const W8a8Problem& problem, int sm_count) {
    return static_cast<TileIndex>(
        fewest(0, kTileCount, [&](int tile) { return w8a8_cycles(kTiles[tile], problem, sm_count); }));
}

AddNormTileIndex add_norm_choose(int64_t t, int64_t n, int64_t k, int sm_count) {
    const auto best = static_cast<AddNormTileIndex>(fewest(0, kAddNormTileCount, [&](int tile) {
        return add_norm_cycles(static_cast<AddNormTileIndex>(tile), t, n, k, sm_count);
    }));
    return add_norm_cycles(best, t, n, k, sm_count) < two_launches_cycles(t, n, k, sm_count) ? best : kAddNormTileCount;
}

StreamPlan stream_choose(const StreamProblem& problem, int most_tokens, bool same_sums, int sm_count) {
    if (!same_sums) return best_stream(problem, most_tokens, 1, 8, sm_count);
    StreamProblem one = problem;
    one.t = 1;
    const int cluster = best_stream(one, most_tokens, 1, 8, sm_count).cluster;
    return best_stream(problem, most_tokens, cluster, cluster, sm_count);
}

LowbitTileIndex lowbit_choose(const LowbitProblem& problem, int sm_count) {
    const int first = problem.t <= kMaxFewTokens ? kLowbitFew : kLowbitFew + 1;
    return static_cast<LowbitTileIndex>(fewest(first, kLowbitTileCount, [&](int tile) {
        return lowbit_cycles(static_cast<LowbitTileIndex>(tile), problem, sm_count);
    }));
}

}  // namespace qbert::cuda
