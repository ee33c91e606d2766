// cuda/sm90/tensor_map.h where the emulator copies the boxes.
#pragma once

#include <cstdint>

namespace qbert::cuda {

struct alignas(64) TensorMap {
    const unsigned char* data;
    int64_t rows, columns, pitch;  // of elements
    int element_bytes, box_rows;
};

// Throws Error for what the driver refuses.
TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int element_bytes, int box_rows);

}  // namespace qbert::cuda
