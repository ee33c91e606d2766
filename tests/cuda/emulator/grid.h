// cuda/common/grid.h's launch_grid where a grid is run by the emulator, to its end, before the launch returns.
#pragma once

namespace qbert::cuda {

namespace emulator {

using Kernel = void (*)(const void* parameters);
void run_grid(const Grid& grid, const Launch& launch, Kernel kernel, const void* parameters, const char* what);

}  // namespace emulator

template <auto kKernel, class Parameters>
void launch_grid(const Grid& grid, const Launch& launch, const Parameters& parameters, const char* what) {
    const emulator::Kernel kernel = [](const void* given) { kKernel(*static_cast<const Parameters*>(given)); };
    emulator::run_grid(grid, launch, kernel, &parameters, what);
}

}  // namespace qbert::cuda
