// Answers of the CUDA runtime as errors. It is linked statically and finds the driver when it is first asked, so a module made
// of this imports anywhere.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/common/error.h"

namespace qbert::cuda {

// "cudaErrorNoDevice (no CUDA-capable device is detected)".
inline std::string described(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

// `doing` is only put together where there is an error to report.
template <class... Parts>
void check_cuda(cudaError_t error, const Parts&... doing) {
    if (error != cudaSuccess) fail(doing..., ": ", described(error));
}

}  // namespace qbert::cuda
