#include "cuda/layer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "cuda/error.h"
#include "cuda/tiles.h"

namespace qbert::cuda {
namespace {

constexpr int kWarps = 8;  // of a block that end rows

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two sums over a warp, and what is done to a row between them and after: dependent instructions, so cycles, not throughput.
constexpr double kRowEnd = 700;
// Blocks of a cluster lie on one of eight parts of the GPU (GPCs), each of at least 16 multiprocessors on an H100.
constexpr int64_t kClusterParts = 8;

}  // namespace

AddNormTileIndex add_norm_tile_named(const char* name) {
    std::string allowed;
    for (const AddNormTile& tile : kAddNormTiles) {
        if (std::strcmp(tile.name, name) == 0) return static_cast<AddNormTileIndex>(&tile - kAddNormTiles);
        allowed += (allowed.empty() ? "" : ", ") + std::string(tile.name);
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}

bool add_norm_fits(AddNormTileIndex tile, int64_t n) {
    const int64_t blocks = n / kAddNormChannels;
    return n % kAddNormChannels == 0 && blocks >= 2 && blocks <= kMaxAddNormBlocks &&
           ceil_div(kAddNormTiles[tile].tokens, blocks) <= kWarps;
}

double add_norm_cycles(AddNormTileIndex tile, int64_t t, int64_t n, int64_t k, int multiprocessors) {
    if (!add_norm_fits(tile, n)) return std::numeric_limits<double>::infinity();
    const int tokens = kAddNormTiles[tile].tokens;
    const int64_t blocks = n / kAddNormChannels, clusters = ceil_div(t, tokens);
    const int64_t at_once = kClusterParts * std::max<int64_t>(multiprocessors / kClusterParts / blocks, 1);
    const Tile each{"", tokens, kAddNormChannels, 128, 1, Schedule::small};
    // Every round is a problem of its own whose tiles all have a multiprocessor.
    const int64_t round = std::min(clusters, at_once) * tokens;
    const double products = model_cycles(each, {round, n, k, false}, multiprocessors) - kSmallLaunchCycles;
    return kSmallLaunchCycles + static_cast<double>(ceil_div(clusters, at_once)) * (products + kExchangeCycles + kRowEnd);
}

double two_launches_cycles(int64_t t, int64_t n, int64_t k, int multiprocessors) {
    const Problem problem{t, n, k, false};
    const double linear = model_cycles(kTiles[choose(problem, multiprocessors)], problem, multiprocessors);
    constexpr int kBytes = 2 + 2 + 2 + 1;  // y, residual, normed, codes
    return linear + kLaunchCycles + kRowEnd + static_cast<double>(t * n * kBytes) / kL2BytesAll;
}

AddNormTileIndex choose_add_norm(int64_t t, int64_t n, int64_t k, int multiprocessors) {
    AddNormTileIndex best = kAddNormTileCount;
    double fewest = two_launches_cycles(t, n, k, multiprocessors);
    for (const AddNormTileIndex tile : {kAddNorm16, kAddNorm32}) {
        const double cycles = add_norm_cycles(tile, t, n, k, multiprocessors);
        if (cycles < fewest) best = tile, fewest = cycles;
    }
    return best;
}

void check_arguments(const W8a8LinearAddNorm& a, AddNormTileIndex tile) {
    check_operands(a.linear);
    check_norm(a.norm);
    require(add_norm_fits(tile, a.linear.n), "n is ", a.linear.n, "; allowed with tile ", kAddNormTiles[tile].name,
            ": multiples of ", kAddNormChannels, ", ", kAddNormTiles[tile].tokens / kWarps, " to ", kMaxAddNormBlocks,
            " of them");
}

}  // namespace qbert::cuda
