#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include "cuda/common/runtime.h"

namespace qbert::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: the module does not link the driver.
Encode encode_function() {
    static const Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050  // CUDA 13 has only this one
        const cudaError_t asked = cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t asked = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &result);
#endif
        check_cuda(asked, "asking the driver for ", kName);
        require(result == cudaDriverEntryPointSuccess && function != nullptr,
                "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or newer");
        return reinterpret_cast<Encode>(function);
    }();
    return found;
}

}  // namespace

TensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t pitch, int element_bytes, int box_rows) {
    constexpr int kBoxBytes = 128;
    TensorMap made{};
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitches[] = {static_cast<cuuint64_t>(pitch) * static_cast<cuuint64_t>(element_bytes)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(kBoxBytes / element_bytes), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[] = {1, 1};
    const CUtensorMapDataType type = element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUresult result = encode_function()(&made.map, type, 2, const_cast<void*>(data), extents, pitches, box, steps,
                                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(result == CUDA_SUCCESS, "describing a matrix of ", rows, " x ", columns, ", pitch ", pitch, ", elements of ",
            element_bytes, " bytes, boxes of ", box_rows, " rows: the driver answers ", static_cast<int>(result));
    return made;
}

}  // namespace qbert::cuda
