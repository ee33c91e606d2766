#include "cuda/sm90/weight_only.cuh"

namespace qbert::cuda {

template void launch_weight_only_of<Code::int4, FloatType::bf16>(const WeightOnlyLinear&, const StreamPlan&, const Launch&);
template void launch_weight_only_of<Code::int4, FloatType::f16>(const WeightOnlyLinear&, const StreamPlan&, const Launch&);

}  // namespace qbert::cuda
