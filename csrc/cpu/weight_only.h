// Weight-only linears over several threads.
#pragma once

#include "cpu/kernels.h"

namespace qbert {

// Computes args.out from args.x; wide_x is set here. Every output is computed by one task in a fixed order, so the result
// depends neither on `threads` nor on how many tokens there are.
// Throws std::invalid_argument for an outlier outside the matrix, std::bad_alloc.
void weight_only(WeightOnlyArgs args, int threads);

}  // namespace qbert
