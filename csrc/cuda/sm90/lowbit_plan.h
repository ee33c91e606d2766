// How the kernel for many tokens cuts a problem: tiles, their order, the grid. The same on the host and in the kernel.
#pragma once

#include <cstdint>

#include "cuda/sm90/lowbit.h"

namespace qbert::cuda {

inline constexpr int kClusterCtas = 2;    // neighbours along the channels, which share the tokens of their tiles
inline constexpr int kColumnTokens = 64;  // tokens of a block of the tokens' copy by columns

// Tiles that follow each other share tokens or weights: they go through the channels of so many token tiles, one token tile
// after the other within a pair of channel tiles. Of 66 clusters at a time, 8 token tiles meet some 8 pairs of channel tiles:
// what they read fits L2 many times over.
inline constexpr int kRasterTokenTiles = 8;

struct LowbitPlan {
    int token_tiles, channel_pairs;

    // A cluster's tile: both blocks' tokens, and which pair of channel tiles.
    struct TileCoord {
        int token_tile, channel_pair;
    };
    constexpr int tiles() const { return token_tiles * channel_pairs; }
    constexpr TileCoord coord(int tile) const {
        const int group = tile / (kRasterTokenTiles * channel_pairs), first = group * kRasterTokenTiles;
        const int left = token_tiles - first, rows = left < kRasterTokenTiles ? left : kRasterTokenTiles;
        const int within = tile - first * channel_pairs;
        return {first + within % rows, within / rows};
    }
};

inline LowbitPlan lowbit_plan(const LowbitTile& tile, int64_t t, int64_t n) {
    const int64_t pair_channels = kClusterCtas * tile.channels;
    return {static_cast<int>((t + tile.tokens - 1) / tile.tokens), static_cast<int>((n + pair_channels - 1) / pair_channels)};
}

// Clusters that run at once, each going through every so-manyth tile.
inline int lowbit_clusters(const LowbitPlan& plan, int sm_count) {
    const int most = sm_count / kClusterCtas > 0 ? sm_count / kClusterCtas : 1;
    return plan.tiles() < most ? plan.tiles() : most;
}

// Blocks of kColumnTokens tokens in the copy by columns: whole tiles, whichever they are.
constexpr int64_t column_blocks(int64_t t) { return (t + 2 * kColumnTokens - 1) / (2 * kColumnTokens) * 2; }

}  // namespace qbert::cuda
