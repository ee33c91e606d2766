// Integer linears over several threads.
#pragma once

#include "cpu/kernels.h"

namespace qbert {

// Computes args.out. Every output is computed by one task in a fixed order, so the result does not depend on `threads`.
// Throws std::invalid_argument for an outlier outside the matrix, std::bad_alloc.
void linear(const LinearArgs& args, int threads);

// Products per second that the matrix instructions of the set in use reach from registers, over all `threads` together.
double peak_products_per_second(int threads, double seconds);

}  // namespace qbert
