// Sizes of what expand_float.cuh keeps in shared memory.
#pragma once

namespace qbert::cuda {

// Pairs of a codebook's sixteen numbers: an entry for each byte, a copy for each lane.
inline constexpr int kPairEntries = 256, kPairStride = 32 * 4;
inline constexpr int kPairTableBytes = kPairEntries * kPairStride;

}  // namespace qbert::cuda
