// What the products of a block of output channels with many tokens are given. How they are taken is the instruction set's:
// multiply_block in multiply_by_strip.h, or in dot_amx_int8.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace qbert {
namespace QBERT_ISA {

struct BlockProduct {
    const uint8_t* strips;  // packed, one behind the other
    int64_t strip_stride;   // bytes
    int64_t tokens;         // at most kMaxStripsPerTask strips of them; the last strip may have fewer than 16
    const int8_t* panels;
    int64_t panel_stride;   // bytes
    int64_t panel_count;    // 1 ... kBlockPanels
    int64_t quads;
    const int8_t* ahead;    // the block that will be wanted next and is not in the cache, or null
};

}  // namespace QBERT_ISA
}  // namespace qbert
