// The few-token kernels of a low-bit linear, one file for each code. Plain C++.
#pragma once

#include "cuda/sm90/lowbit.h"
#include "cuda/sm90/stream.h"

namespace qbert::cuda {

inline constexpr int kMostFewTokens = 128;  // of a CTA

inline StreamProblem few_problem(int64_t t, int64_t n, int64_t k, Code code) {
    return {t, n, k, block_bytes(code), kBlockColumns, 0};
}

template <Code kCode>
void launch_lowbit_few_of(const LowbitLinear& linear, const StreamPlan& plan, const Launch& launch);

extern template void launch_lowbit_few_of<Code::int4>(const LowbitLinear&, const StreamPlan&, const Launch&);
extern template void launch_lowbit_few_of<Code::dict4>(const LowbitLinear&, const StreamPlan&, const Launch&);
extern template void launch_lowbit_few_of<Code::dict3>(const LowbitLinear&, const StreamPlan&, const Launch&);

}  // namespace qbert::cuda
