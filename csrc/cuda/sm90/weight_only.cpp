#include "cuda/sm90/weight_only.h"

#include "cuda/common/error.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/expand_float.h"

namespace qbert::cuda {
namespace {

void check_int4(const PackedWeight& a) {
    check_vector("scale", a.scale, 2);
    check_groups(a.groups, a.k);
}

void check_weight(const PackedWeight& a) {
    const bool codebook = a.code == Code::dict3 || a.code == Code::dict4;
    check_extent("n", a.n, kMaxExtent);
    check_extent("k", a.k, kMaxExtent);
    check_vector("codes", a.codes, kAlignment);
    if (a.code == Code::int8) check_vector("scale", a.scale, 4);
    if (a.code == Code::int4) check_int4(a);
    if (codebook) check_vector("codebook", a.codebook, 4);
    require(codebook || a.outliers.count == 0, "an integer weight has ", a.outliers.count, " outliers; allowed: none");
    check_outliers(a.outliers);
}

}  // namespace

void check_arguments(const WeightOnlyLinear& a) {
    check_code("activation", static_cast<int>(a.activation), 2);
    check_type("x's type", a.x_type);
    require(a.x_type != FloatType::f32, "x is float32; allowed: bfloat16, float16");
    check_type("bias's type", a.bias_type);
    check_extent("t", a.t, kMaxExtent);
    check_weight(a.weight);
    check_matrix("x", a.x, a.weight.k, a.x_pitch, 2);
    if (a.bias != nullptr) check_vector("bias", a.bias, bytes_of(a.bias_type));
    check_vector("out", a.out, 2);
    check_pitch("out", a.weight.n, a.out_pitch, 2);
}

void check_arguments(const ExpandedWeight& a) {
    check_type("out's type", a.out_type);
    check_weight(a.weight);
    require(blocks_of(a.weight.k) <= UINT16_MAX, "k is ", a.weight.k, "; allowed: 1 ... ", UINT16_MAX * int64_t{kBlockColumns});
    check_vector("out", a.out, bytes_of(a.out_type));
}

StreamProblem weight_only_problem(int64_t t, int64_t n, int64_t k, Code code) {
    return {t, n, k, block_bytes(code), 2 * kBlockColumns, code == Code::dict4 ? kPairTableBytes : 0};
}

namespace {

template <Code kCode>
void launch_of(const WeightOnlyLinear& a, const StreamPlan& plan, const Launch& launch) {
    if (a.x_type == FloatType::bf16) return launch_weight_only_of<kCode, FloatType::bf16>(a, plan, launch);
    launch_weight_only_of<kCode, FloatType::f16>(a, plan, launch);
}

}  // namespace

void launch_weight_only(const WeightOnlyLinear& a, const Launch& launch, const char* plan_name) {
    const StreamProblem problem = weight_only_problem(a.t, a.weight.n, a.weight.k, a.weight.code);
    const StreamPlan plan = *plan_name == '\0'
                                ? stream_choose(problem, kMostWeightOnlyTokens, true, launch.device.sm_count)
                                : stream_plan_named(plan_name, problem, kMostWeightOnlyTokens, launch.device);
    switch (a.weight.code) {
        case Code::int4: return launch_of<Code::int4>(a, plan, launch);
        case Code::dict4: return launch_of<Code::dict4>(a, plan, launch);
        case Code::dict3: return launch_of<Code::dict3>(a, plan, launch);
        case Code::int8: return launch_of<Code::int8>(a, plan, launch);
    }
}

}  // namespace qbert::cuda
