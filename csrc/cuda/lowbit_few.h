// The few-token kernels of a low-bit linear, one file for each code. Plain C++.
#pragma once

#include "cuda/lowbit.h"
#include "cuda/stream.h"

namespace qbert::cuda {

inline constexpr int kMostFewTokens = 128;  // of a thread block

StreamProblem stream_problem(const LowbitLinear& linear);

template <Code kCode>
void launch_lowbit_few_of(const LowbitLinear& linear, const StreamPlan& plan, const Launch& launch);

extern template void launch_lowbit_few_of<Code::int4>(const LowbitLinear&, const StreamPlan&, const Launch&);
extern template void launch_lowbit_few_of<Code::dict4>(const LowbitLinear&, const StreamPlan&, const Launch&);
extern template void launch_lowbit_few_of<Code::dict3>(const LowbitLinear&, const StreamPlan&, const Launch&);

}  // namespace qbert::cuda
