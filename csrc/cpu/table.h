// The end of every kernels_<isa>.cpp: everything that is written once, and the table of it.
//
// QBERT_ISA is the namespace and the member of enum Isa; its dot_<isa>.h is included before.
#pragma once

#include "cpu/impl_attention.h"
#include "cpu/impl_gated.h"
#include "cpu/impl_linear.h"
#include "cpu/impl_rows.h"
#include "cpu/impl_weight_only.h"

namespace qbert {
namespace QBERT_ISA {

static constexpr Kernels table(Isa isa) {
    return Kernels{
        isa,
        strip_bytes,
        pack_strip,
        linear_scratch_bytes,
        linear_block,
        gated_block,
        peak_products,
        weight_only_widen,
        weight_only_scratch_bytes,
        weight_only_panels,
        attention_scratch_bytes,
        attention_part,
        quantize_rows,
        add_norm_rows,
        look_up_rows,
        embed_norm_rows,
    };
}

}  // namespace QBERT_ISA
}  // namespace qbert
