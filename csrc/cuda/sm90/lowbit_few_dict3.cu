#include "cuda/sm90/lowbit_few.cuh"

namespace qbert::cuda {

template void launch_lowbit_few_of<Code::dict3>(const LowbitLinear&, const StreamPlan&, const Launch&);

}  // namespace qbert::cuda
