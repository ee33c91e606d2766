#include "cuda/common/grid.h"

#include <cstdlib>
#include <cstring>

namespace qbert::cuda {
namespace {

// QBERT_PDL=0 makes grids wait for each other as ever: to look for a fault, and to measure what overlapping gives.
bool overlap_allowed() {
    static const bool allowed = [] {
        const char* said = std::getenv("QBERT_PDL");
        return said == nullptr || std::strcmp(said, "0") != 0;
    }();
    return allowed;
}

}  // namespace

void prepare_kernel(const void* kernel, const Device& device, std::atomic<uint64_t>& allowed) {
    const uint64_t bit = uint64_t{1} << (device.index % 64);
    if (allowed.load(std::memory_order_relaxed) & bit) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory),
               "allowing ", device.shared_memory, " bytes of shared memory on device ", device.index);
    allowed.fetch_or(bit, std::memory_order_relaxed);
}

void launch_prepared(const void* kernel, const Grid& grid, const Launch& launch, void** arguments, const char* what) {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    config.attrs = attributes;
    if (grid.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {grid.cluster, 1, 1};
    }
    // Code for 8.0, which other GPUs run, does not wait for earlier grids.
    if (grid.overlap && launch.device.capability == kHopper && overlap_allowed()) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), "launching ", what, ", grid ", grid.x, " x ", grid.y,
               ", clusters of ", grid.cluster, ", ", grid.threads, " threads, ", grid.shared_bytes,
               " bytes of shared memory, device ", launch.device.index);
}

}  // namespace qbert::cuda
