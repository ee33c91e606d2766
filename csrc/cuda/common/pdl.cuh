// Programmatic dependent launch (PDL): the hand-over from one grid to the next. Kernels that run on Ampere too have no more of
// Hopper than this, which is nothing there: older GPUs never overlap grids.
#pragma once

#ifdef QBERT_EMULATED
#include "emulator/pdl.h"
#else

namespace qbert::cuda {

// A grid launched to overlap (Grid::overlap) may start while the one before it still runs: until this returns it reads
// nothing that an earlier grid may have written, and writes nothing at all.
__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next grid may start as soon as every block has said this or ended.
__device__ inline void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace qbert::cuda

#endif  // QBERT_EMULATED
