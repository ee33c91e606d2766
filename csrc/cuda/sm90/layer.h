// A linear and the norm after it as one launch, for encoder layers of few tokens. Plain C++, as w8a8.h.
#pragma once

#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/rows.h"
#include "cuda/common/w8a8.h"

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
inline constexpr int kMaxAddNormCtas = 8;  // clusters that every H100 can place
inline constexpr int64_t kMaxAddNormColumns = kAddNormChannels * kMaxAddNormCtas;

// Whether a tile can compute rows of n columns: there are blocks and warps enough to end them, a warp a row.
bool add_norm_fits(AddNormTileIndex tile, int64_t n);

// Everything that can be said without a GPU. Throws Error.
void check_arguments(const W8a8LinearAddNorm& arguments, AddNormTileIndex tile);

void launch_w8a8_linear_add_norm(const W8a8LinearAddNorm& arguments, AddNormTileIndex tile, const Launch& launch);

}  // namespace qbert::cuda
