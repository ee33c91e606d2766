#include "cuda/common/device.h"

#include "cuda/common/runtime.h"

namespace qbert::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking device ", device, " for attribute ", which);
    return value;
}

}  // namespace

Device current_device() {
    Device device{};
    int count = 0;  // asked for because cudaGetDevice answers 0 in some cases where there is no device
    check_cuda(cudaGetDeviceCount(&count), "no CUDA device can be used");
    check_cuda(cudaGetDevice(&device.index), "no CUDA device can be used");
    device.capability = attribute(cudaDevAttrComputeCapabilityMajor, device.index) * 10 +
                        attribute(cudaDevAttrComputeCapabilityMinor, device.index);
    require(device.capability >= kOldestCapability, "device ", device.index, " has compute capability ",
            device.capability / 10, ".", device.capability % 10, "; qbert._cuda runs from ", kOldestCapability / 10, ".",
            kOldestCapability % 10, " on");
    device.sm_count = attribute(cudaDevAttrMultiProcessorCount, device.index);
    device.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index);
    return device;
}

void check_on_device(const char* name, const void* address, const Device& device) {
    cudaPointerAttributes found{};
    check_cuda(cudaPointerGetAttributes(&found, address), "asking where ", name, " is");
    if (found.type == cudaMemoryTypeManaged) return;
    require(found.type == cudaMemoryTypeDevice, name, " is not in a GPU's memory");
    require(found.device == device.index, name, " is on device ", found.device, "; the launch goes to device ", device.index);
}

}  // namespace qbert::cuda
