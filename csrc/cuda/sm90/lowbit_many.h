// From a checked linear to its kernel for many tokens. A file for each code defines launch_lowbit_code.
#pragma once

#include "cuda/sm90/lowbit.h"

namespace qbert::cuda {

template <Code kCode>
void launch_lowbit_code(const LowbitLinear& linear, LowbitTileIndex tile, const Launch& launch);

extern template void launch_lowbit_code<Code::int4>(const LowbitLinear&, LowbitTileIndex, const Launch&);
extern template void launch_lowbit_code<Code::dict4>(const LowbitLinear&, LowbitTileIndex, const Launch&);
extern template void launch_lowbit_code<Code::dict3>(const LowbitLinear&, LowbitTileIndex, const Launch&);

}  // namespace qbert::cuda
