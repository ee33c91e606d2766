// A linear and the norm after it as one launch, for encoder layers of few tokens. Plain C++, as w8a8.h.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/w8a8.h"

namespace qbert::cuda {

// y of the linear, rounded to residual's type and never stored, goes into the norm: the same bits as from one after the other.
struct W8a8LinearAddNorm {
    W8a8Linear linear;          // no activation; out, its pitch and type are not looked at
    AddLayerNormQuantize norm;  // t, k = n of the linear; y is not looked at
};

// A cluster of n / kAddNormChannels blocks computes all channels of so many tokens, and its blocks then end some rows each.
struct AddNormTile {
    const char* name;
    int tokens;
};
enum AddNormTileIndex { kAddNorm16, kAddNorm32, kAddNormTileCount };
inline constexpr AddNormTile kAddNormTiles[kAddNormTileCount] = {{"16 tokens", 16}, {"32 tokens", 32}};
inline constexpr int kAddNormChannels = 128;
inline constexpr int kMaxAddNormBlocks = 8;  // clusters that every H100 can place
inline constexpr int64_t kMaxAddNormColumns = kAddNormChannels * kMaxAddNormBlocks;

// The tile of that name. Throws Error.
AddNormTileIndex add_norm_tile_named(const char* name);

// Whether a tile can compute rows of n columns: there are blocks and warps enough to end them, a warp a row.
bool add_norm_fits(AddNormTileIndex tile, int64_t n);

// Cycles by the model of tiles.h; infinite where the tile does not fit.
double add_norm_cycles(AddNormTileIndex tile, int64_t t, int64_t n, int64_t k, int multiprocessors);
// The same of the linear and the norm as two launches.
double two_launches_cycles(int64_t t, int64_t n, int64_t k, int multiprocessors);

// The best tile; kAddNormTileCount where two launches take fewer cycles.
AddNormTileIndex choose_add_norm(int64_t t, int64_t n, int64_t k, int multiprocessors);

// Everything that can be said without a GPU. Throws Error.
void check_arguments(const W8a8LinearAddNorm& arguments, AddNormTileIndex tile);

void launch_w8a8_linear_add_norm(const W8a8LinearAddNorm& arguments, AddNormTileIndex tile, const Launch& launch);

}  // namespace qbert::cuda
