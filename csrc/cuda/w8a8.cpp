#include "cuda/w8a8.h"

#include "cuda/error.h"

namespace qbert::cuda {
namespace {

// Whole tiles beyond the edge, and the scheduler's count of them, must still be int32.
constexpr int64_t kMaxExtent = INT32_MAX - 1024;
constexpr int64_t kMaxTiles = INT32_MAX / 4;

void check_extents(const W8a8Linear& a) {
    check_extent("t", a.t, kMaxExtent);
    check_extent("n", a.n, kMaxExtent);
    check_extent("k", a.k, kMaxK, ", beyond which int32 sums could overflow");
    const int64_t tiles = (a.t / 64 + 1) * (a.n / 128 + 1);
    require(tiles <= kMaxTiles, "t = ", a.t, " by n = ", a.n, " is ", tiles, " tiles of 64 x 128; allowed: ", kMaxTiles);
}

}  // namespace

void check_operands(const W8a8Linear& a) {
    check_type("bias's type", a.bias_type);
    check_extents(a);
    check_matrix("q", a.q, a.k, a.q_pitch, 1);
    check_matrix("weight", a.weight, a.k, a.weight_pitch, 1);
    check_vector("s", a.s, 4);
    check_vector("scale", a.scale, 4);
    if (a.bias != nullptr) check_vector("bias", a.bias, bytes_of(a.bias_type));
}

void check_arguments(const W8a8Linear& a) {
    check_code("activation", static_cast<int>(a.finish.activation), 2);
    check_type("out's type", a.finish.float_type);
    check_operands(a);
    check_matrix("out", a.out, a.n, a.out_pitch, a.out_bytes());
}

}  // namespace qbert::cuda
