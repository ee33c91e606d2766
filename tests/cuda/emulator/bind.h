#pragma once

#include <pybind11/pybind11.h>

namespace qbert::cuda {

// `emulate(seed, SMs)`: how the emulated device is from now on.
void bind_emulator(pybind11::module_& module);

}  // namespace qbert::cuda
