#include "cuda/tiles.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/error.h"

namespace qbert::cuda {
namespace {

// An H100's multiprocessor, a cycle. The products are NVIDIA's 1979 TOPS; what L2 gives all of them together, and one alone,
// follow from what published kernels have reached.
constexpr double kProducts = 4096;
constexpr double kL2BytesOne = 64;
constexpr double kLanes = 128;  // float operations

// Instructions that finish one value, counted in the machine code: scales, bias, rounding and the way out; GELU on top.
constexpr double kFinish = 10, kGelu = 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one multiprocessor gets of L2 in a cycle when so many of them ask.
double l2_bytes(int64_t busy) { return std::min(kL2BytesOne, kL2BytesAll / static_cast<double>(busy)); }

double finish_cycles(const Tile& tile, const Problem& problem) {
    return tile.t * tile.n * (kFinish + (problem.gelu ? kGelu : 0)) / kLanes;
}

// One tile a block, and blocks that wait for no one: a multiprocessor's are under way together.
double small_cycles(const Tile& tile, const Problem& problem, int multiprocessors) {
    const int64_t blocks = ceil_div(problem.t, tile.t) * ceil_div(problem.n, tile.n) * tile.cluster;
    const double each = static_cast<double>(ceil_div(blocks, multiprocessors));
    const double fetched = tile.k * (tile.t + tile.n) / l2_bytes(std::min<int64_t>(blocks, multiprocessors));
    const double step = std::max(tile.t * tile.n * tile.k / kProducts, fetched);
    const auto steps = static_cast<double>(ceil_div(ceil_div(problem.k, tile.k), tile.cluster));
    const double finish = finish_cycles(tile, problem) / tile.cluster + (tile.cluster > 1 ? kExchangeCycles : 0);
    return kSmallLaunchCycles + each * (steps * step + finish);
}

}  // namespace

double model_cycles(const Tile& tile, const Problem& problem, int multiprocessors) {
    if (tile.schedule == Schedule::small) return small_cycles(tile, problem, multiprocessors);
    const int64_t rows = ceil_div(ceil_div(problem.t, tile.t), tile.cluster) * tile.cluster;  // a cluster runs whole
    const int64_t tiles = rows * ceil_div(problem.n, tile.n);
    const double each = static_cast<double>(ceil_div(tiles, multiprocessors));  // of the busiest multiprocessor

    const double fetched = tile.k * (tile.t + static_cast<double>(tile.n) / tile.cluster);  // bytes a step in k
    const double step =
        std::max(tile.t * tile.n * tile.k / kProducts, fetched / l2_bytes(std::min<int64_t>(tiles, multiprocessors)));
    const double products = static_cast<double>(ceil_div(problem.k, tile.k)) * step;
    const double finish = finish_cycles(tile, problem);

    if (tile.schedule == Schedule::cooperative) return kLaunchCycles + each * (products + finish);
    // Each stage takes tile after tile; the shorter one hides, but for the first products or the last finish.
    return kLaunchCycles + std::max(each * products + finish, products + each * finish);
}

TileIndex choose(const Problem& problem, int multiprocessors) {
    const Tile* best = std::min_element(kTiles, kTiles + kTileCount, [&](const Tile& a, const Tile& b) {
        return model_cycles(a, problem, multiprocessors) < model_cycles(b, problem, multiprocessors);
    });
    return static_cast<TileIndex>(best - kTiles);
}

TileIndex tile_named(const char* name) {
    std::string allowed;
    for (const Tile& tile : kTiles) {
        if (std::strcmp(tile.name, name) == 0) return static_cast<TileIndex>(&tile - kTiles);
        allowed += (allowed.empty() ? "" : ", ") + std::string(tile.name);
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}

}  // namespace qbert::cuda
