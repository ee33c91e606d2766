#include "cuda/common/rows.h"

#include "cuda/common/error.h"

namespace qbert::cuda {

void check_norm(const AddLayerNormQuantize& a) {
    check_type("residual's type", a.residual.type);
    check_type("gamma's type", a.gamma.type);
    check_type("beta's type", a.beta.type);
    check_extent("t", a.t, INT32_MAX);
    check_extent("k", a.k, kMaxRowColumns, ", what a warp keeps in registers");
    require(a.k % kLaneColumns == 0, "k is ", a.k, "; allowed: multiples of ", kLaneColumns);
    check_vector("residual", a.residual.data, kAlignment);
    check_vector("gamma", a.gamma.data, kAlignment);
    check_vector("beta", a.beta.data, kAlignment);
    check_vector("normed", a.normed, kAlignment);
    check_vector("codes", a.codes, kAlignment);
    check_vector("scale", a.scale, 4);
}

void check_arguments(const AddLayerNormQuantize& a) {
    check_type("y's type", a.y.type);
    check_vector("y", a.y.data, kAlignment);
    check_norm(a);
}

}  // namespace qbert::cuda
