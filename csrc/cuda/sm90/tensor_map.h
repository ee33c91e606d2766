// Descriptors by which the copy engine (TMA) reads boxes of a matrix.
#pragma once

#ifdef QBERT_EMULATED
#include "emulator/tensor_map.h"
#else

#include <cuda.h>

#include <cstdint>

namespace qbert::cuda {

// As a kernel takes it: `const __grid_constant__ TensorMap`, or within such a parameter.
struct TensorMap {
    CUtensorMap map;  // 64 bytes aligned
};

// A matrix (rows, columns) in global memory of elements of so many bytes (1 or 2), rows a pitch (in elements) apart, the
// address and the pitch in bytes multiples of 16; boxes of 128 bytes by box_rows (1 ... 256), which lie swizzled in shared
// memory, see sm90::smem_descriptor. Throws Error.
TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int element_bytes, int box_rows);

}  // namespace qbert::cuda

#endif  // QBERT_EMULATED
