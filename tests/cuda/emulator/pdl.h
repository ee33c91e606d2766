// The names of cuda/common/pdl.cuh on the emulated machine; what they mean is said there.
#pragma once

namespace qbert::cuda {

void pdl_wait();
inline void pdl_launch_dependents() {}

}  // namespace qbert::cuda
