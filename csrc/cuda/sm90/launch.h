// From a checked linear to its kernel. A file for each of CUTLASS's tiles defines launch_w8a8: it compiles for a minute.
#pragma once

#include <cstdio>

#include "cuda/common/device.h"
#include "cuda/common/w8a8.h"
#include "cuda/sm90/tiles.h"

namespace qbert::cuda {

// What an error of a launch calls it. Put together for each launch, so without an allocation.
struct Description {
    char text[160];
};
inline Description description_of(const Tile& tile, const W8a8Linear& a) {
    Description made;
    std::snprintf(made.text, sizeof(made.text), "w8a8_linear, tile %s, t = %lld, n = %lld, k = %lld", tile.name,
                  static_cast<long long>(a.t), static_cast<long long>(a.n), static_cast<long long>(a.k));
    return made;
}

template <TileIndex kIndex>
void launch_w8a8(const W8a8Linear& linear, const Launch& launch);

extern template void launch_w8a8<k128x256>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k128x192>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k128x128>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k64x128>(const W8a8Linear&, const Launch&);

// With a small tile.
void launch_w8a8_small(const W8a8Linear& linear, const Tile& tile, const Launch& launch);

}  // namespace qbert::cuda
