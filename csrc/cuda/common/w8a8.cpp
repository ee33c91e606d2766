#include "cuda/common/w8a8.h"

namespace qbert::cuda {
void check_operands(const W8a8Linear& a) {
    check_type("bias's type", a.bias_type);
    check_tokens_and_channels(a.t, a.n);
    check_extent("k", a.k, kMaxK, ", beyond which int32 sums could overflow");
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
