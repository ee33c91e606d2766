// The GPU that a launch goes to. No CUDA headers here: what asks for a device compiles without a toolkit, for the tests.
#pragma once

#include "cuda/common/error.h"

namespace qbert::cuda {

// Compute capabilities, major * 10 + minor: the oldest that row kernels are compiled for (they run on everything newer), and
// the only one for kernels that use wgmma or the copy engine, whose code for 9.0a runs on nothing else. setup.py:
// ARCHITECTURES.
inline constexpr int kOldestCapability = 80, kHopper = 90;

struct Device {
    int index;
    int capability;
    int sm_count;
    int shared_memory;  // bytes that one block can have
};

struct Launch {
    Device device;
    void* stream;  // a cudaStream_t
};

// The calling thread's current device. Throws Error where there is none, or one that no kernel runs on.
Device current_device();

// Throws Error unless it is one for kernels that use wgmma or the copy engine; `operation` is whose.
inline void require_hopper(const Device& device, const char* operation) {
    require(device.capability == kHopper, operation, " is compiled for compute capability ", kHopper / 10, ".", kHopper % 10,
            " only; device ", device.index, " has ", device.capability / 10, ".", device.capability % 10);
}

// Throws Error unless the address is memory of that device, or managed memory.
void check_on_device(const char* name, const void* address, const Device& device);

}  // namespace qbert::cuda
