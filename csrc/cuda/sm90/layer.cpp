#include "cuda/sm90/layer.h"

#include "cuda/common/error.h"

namespace qbert::cuda {

static constexpr int kWarps = 8;  // of a CTA that end rows

bool add_norm_fits(AddNormTileIndex tile, int64_t n) {
    const int64_t blocks = n / kAddNormChannels;
    return n % kAddNormChannels == 0 && blocks >= 2 && blocks <= kMaxAddNormCtas &&
           kAddNormTiles[tile].tokens <= kWarps * blocks;
}

void check_arguments(const W8a8LinearAddNorm& a, AddNormTileIndex tile) {
    check_operands(a.linear);
    check_norm(a.norm);
    require(add_norm_fits(tile, a.linear.n), "n is ", a.linear.n, "; allowed with tile ", kAddNormTiles[tile].name,
            ": multiples of ", kAddNormChannels, ", ", kAddNormTiles[tile].tokens / kWarps, " to ", kMaxAddNormCtas,
            " of them");
}

}  // namespace qbert::cuda
