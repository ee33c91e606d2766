#include "cuda/device.h"

#include "cuda/runtime.h"

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
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device.index);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device.index);
    require(major * 10 + minor == kCapability, "device ", device.index, " has compute capability ", major, ".", minor,
            "; qbert._cuda is compiled for ", kCapability / 10, ".", kCapability % 10, " only");
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device.index);
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
