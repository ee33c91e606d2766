// How the kernel for many tokens cuts a problem: tiles, their order, the grid. The same on the host and in the kernel.
#pragma once

#include <cstdint>

#include "cuda/sm90/lowbit.h"

namespace qbert::cuda {

inline constexpr int kPair = 2;  // blocks of a cluster: neighbours along the channels, which share the tokens of their tiles
inline constexpr int kTurn = 64;  // tokens of a block of the tokens' copy by columns

// Tiles that follow each other share tokens or weights: they go through the channels of so many token tiles, one token tile
// after the other within a pair of channel tiles. Of 66 clusters at a time, 8 token tiles meet some 8 pairs of channel tiles:
// what they read fits L2 many times over.
inline constexpr int kGroupTokenTiles = 8;

struct LowbitPlan {
    int token_tiles, channel_pairs;

    // A cluster's tile: both blocks' tokens, and which pair of channel tiles.
    struct Place {
        int token_tile, channel_pair;
    };
    constexpr int tiles() const { return token_tiles * channel_pairs; }
    constexpr Place place(int tile) const {
        const int group = tile / (kGroupTokenTiles * channel_pairs), first = group * kGroupTokenTiles;
        const int left = token_tiles - first, rows = left < kGroupTokenTiles ? left : kGroupTokenTiles;
        const int within = tile - first * channel_pairs;
        return {first + within % rows, within / rows};
    }
};

inline LowbitPlan lowbit_plan(const LowbitTile& tile, int64_t t, int64_t n) {
    const int64_t pair_channels = kPair * tile.channels;
    return {static_cast<int>((t + tile.tokens - 1) / tile.tokens), static_cast<int>((n + pair_channels - 1) / pair_channels)};
}

// Clusters that run at once, each going through every so-manyth tile.
inline int lowbit_clusters(const LowbitPlan& plan, int multiprocessors) {
    const int room = multiprocessors / kPair > 0 ? multiprocessors / kPair : 1;
    return plan.tiles() < room ? plan.tiles() : room;
}

// Blocks of kTurn tokens in the copy by columns: whole tiles, whichever they are.
constexpr int64_t column_blocks(int64_t t) { return (t + 2 * kTurn - 1) / (2 * kTurn) * 2; }

}  // namespace qbert::cuda
