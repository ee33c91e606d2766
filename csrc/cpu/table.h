// The end of every kernels_<isa>.cpp: everything that is written once, and the table of it.
//
// QBERT_ISA is the namespace and the member of enum Isa; its dot_<isa>.h is included before.
#pragma once

#include "cpu/impl_linear.h"

namespace qbert {
namespace QBERT_ISA {

static constexpr Kernels table(Isa isa) {
    return Kernels{
        isa,
        strip_bytes,
        pack_strip,
        linear_scratch_bytes,
        linear_block,
        peak_products,
    };
}

}  // namespace QBERT_ISA
}  // namespace qbert
