// From a checked linear to its kernel. A file for each tile defines launch_w8a8: it compiles for a minute.
#pragma once

#include "cuda/device.h"
#include "cuda/tiles.h"
#include "cuda/w8a8.h"

namespace qbert::cuda {

template <TileIndex kIndex>
void launch_w8a8(const W8a8Linear& linear, const Launch& launch);

extern template void launch_w8a8<k128x256>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k128x192>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k128x128>(const W8a8Linear&, const Launch&);
extern template void launch_w8a8<k64x128>(const W8a8Linear&, const Launch&);

}  // namespace qbert::cuda
