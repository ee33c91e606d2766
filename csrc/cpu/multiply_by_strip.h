// A block of panels times many tokens, for instruction sets whose registers hold the sums of all its channels: the block stays in
// the cache, and the tokens of one strip after the other are multiplied with it, then finished. The end of their dot_<isa>.h.
#pragma once

#include "cpu/block_product.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int64_t kTokensBoundByMemory = 64;  // with so few, reading a block takes longer than multiplying with it

// Numbers that `sums` of multiply_block must have room for.
QBERT_INLINE int64_t product_sums(int64_t /*quads*/) { return kStripTokens * kBlockChannels; }

// Calls finish(token, end, panel, panels, sums, row_sums) for tokens token ... end - 1 of one strip, with the sums of 16 * panels
// channels from panel `panel` on, row_sums numbers from token to token: once for each token and panel, in the order of the tokens.
template <class Finish>
QBERT_INLINE void multiply_block(const BlockProduct& p, int32_t* sums, const Finish& finish) {
    const int8_t* ahead = p.tokens <= kTokensBoundByMemory ? p.ahead : nullptr;
    for (int64_t first = 0; first < p.tokens; first += kStripTokens) {
        const int64_t rows = p.tokens - first < kStripTokens ? p.tokens - first : kStripTokens;
        const uint8_t* strip = p.strips + first / kStripTokens * p.strip_stride;
        dot<false>(strip, rows, p.panels, p.panel_stride, p.panel_count, p.quads, p.quads, sums, first == 0 ? ahead : nullptr);
        finish(first, first + rows, 0, p.panel_count, sums, kBlockChannels);
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
