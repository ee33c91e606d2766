// The GPU that a launch goes to. No CUDA headers here: what asks for a device compiles without a toolkit, for the tests.
#pragma once

namespace qbert::cuda {

// Compute capability that the kernels are compiled for; code for 9.0a runs on nothing else.
inline constexpr int kCapability = 90;

struct Device {
    int index;
    int multiprocessors;
};

struct Launch {
    Device device;
    void* stream;  // a cudaStream_t
};

// The calling thread's current device. Throws Error where there is none, or one that the kernels do not run on.
Device current_device();

// Throws Error unless the address is memory of that device, or managed memory.
void check_on_device(const char* name, const void* address, const Device& device);

}  // namespace qbert::cuda
