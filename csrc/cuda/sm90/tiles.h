// The tiles that the W8A8 kernels are compiled for; cost.h says which one a problem gets. Plain C++.
#pragma once

#include <cstring>
#include <string>

#include "cuda/common/error.h"

namespace qbert::cuda {

enum class Schedule {
    cooperative,  // two warpgroups share a tile
    pingpong,     // each has a tile of its own, one in the matrix units while the other finishes
    small,        // one warpgroup, one tile: w8a8_small.cu
};

struct Tile {
    const char* name;  // tokens x channels x k, schedule
    int t, n, k;
    int cluster;  // blocks along the tokens that share one tile of the weight: each fetches a part, all get it (multicast);
                  // of a small tile: those that share its k, each of which sums a part
    Schedule schedule;
};

enum TileIndex { k128x256, k128x192, k128x128, k64x128, kFirstSmall, kTileCount = kFirstSmall + 12 };

// One SM's registers hold the sums of 128 x 256 at most, and k = 128 is one row of TMA's widest swizzle.
inline constexpr Tile kTiles[kTileCount] = {
    // Fewest bytes from L2 and shared memory for a product: large problems, above all long k. BERT-large at 4,096 tokens
    // is 128, 384 and 512 of these tiles on 132 SMs, 97% of one, three and four whole waves.
    {"128x256x128 cooperative", 128, 256, 128, 2, Schedule::cooperative},
    // BERT-base's n = 768 and 2,304 at 4,096 tokens are 128 and 384 of these: 97% again, where 256 channels would leave 27%
    // of the SMs idle.
    {"128x192x128 cooperative", 128, 192, 128, 2, Schedule::cooperative},
    // The end of a tile is hidden behind the next one's products: short k, and GELU, which costs as much as k = 384.
    {"128x128x128 pingpong", 128, 128, 128, 2, Schedule::pingpong},
    // Few tokens: twice as many tiles.
    {"64x128x128 pingpong", 64, 128, 128, 2, Schedule::pingpong},
    // A few sequences: small tiles so that all SMs have one, and where that is not enough, parts of k.
    {"64x64x128 small", 64, 64, 128, 1, Schedule::small},
    {"64x64x128 small, k by 2", 64, 64, 128, 2, Schedule::small},
    {"64x64x128 small, k by 4", 64, 64, 128, 4, Schedule::small},
    {"64x64x128 small, k by 8", 64, 64, 128, 8, Schedule::small},
    {"32x64x128 small", 32, 64, 128, 1, Schedule::small},
    {"32x64x128 small, k by 2", 32, 64, 128, 2, Schedule::small},
    {"32x64x128 small, k by 4", 32, 64, 128, 4, Schedule::small},
    {"32x64x128 small, k by 8", 32, 64, 128, 8, Schedule::small},
    {"16x64x128 small", 16, 64, 128, 1, Schedule::small},
    {"16x64x128 small, k by 2", 16, 64, 128, 2, Schedule::small},
    {"16x64x128 small, k by 4", 16, 64, 128, 4, Schedule::small},
    {"16x64x128 small, k by 8", 16, 64, 128, 8, Schedule::small},
};

// The one of that name in a table of tiles. Throws Error.
template <class Named, int kCount>
int index_named(const Named (&tiles)[kCount], const char* name) {
    std::string allowed;
    for (int i = 0; i < kCount; ++i) {
        if (std::strcmp(tiles[i].name, name) == 0) return i;
        allowed += (i == 0 ? "" : ", ") + std::string(tiles[i].name);
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}
inline TileIndex tile_named(const char* name) { return static_cast<TileIndex>(index_named(kTiles, name)); }

}  // namespace qbert::cuda
