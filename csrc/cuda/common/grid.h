// Launching a hand-written kernel: shape, shared memory, clusters, overlap with the grid before, and the runtime's answer.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/common/device.h"

namespace qbert::cuda {

// The shape of a launch. CTAs of a cluster are neighbours along x.
struct Grid {
    unsigned x, y;  // blocks; x a multiple of `cluster`
    unsigned threads;
    unsigned shared_bytes;  // dynamic shared memory
    unsigned cluster = 1;
    // Whether it may start while the grid before it ends: for kernels that call pdl_wait.
    bool overlap = false;
};

}  // namespace qbert::cuda

#ifdef QBERT_EMULATED
#include "emulator/grid.h"
#else

#include <cuda_runtime_api.h>

#include "cuda/common/runtime.h"

namespace qbert::cuda {

// What every launch needs of a kernel, once for each device. `allowed` belongs to the kernel.
void prepare_kernel(const void* kernel, const Device& device, std::atomic<uint64_t>& allowed);
void launch_prepared(const void* kernel, const Grid& grid, const Launch& launch, void** arguments, const char* what);

// Launches kKernel with one parameter; `what` names the operation and its numbers in an error.
template <auto kKernel, class Parameters>
void launch_grid(const Grid& grid, const Launch& launch, const Parameters& parameters, const char* what) {
    static std::atomic<uint64_t> allowed{0};
    const auto kernel = reinterpret_cast<const void*>(kKernel);
    prepare_kernel(kernel, launch.device, allowed);
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    launch_prepared(kernel, grid, launch, arguments, what);
}

}  // namespace qbert::cuda

#endif  // QBERT_EMULATED
