#include "cuda/sm90/lowbit_few.h"

#include "cuda/common/error.h"
#include "cuda/sm90/cost.h"

namespace qbert::cuda {

void launch_lowbit_few(const LowbitLinear& a, const Launch& launch, const char* plan_name) {
    const StreamProblem problem = few_problem(a.t, a.n, a.k, a.code);
    const StreamPlan plan = *plan_name == '\0'
                                ? stream_choose(problem, kMostFewTokens, false, launch.device.sm_count)
                                : stream_plan_named(plan_name, problem, kMostFewTokens, launch.device);
    switch (a.code) {
        case Code::int4: return launch_lowbit_few_of<Code::int4>(a, plan, launch);
        case Code::dict4: return launch_lowbit_few_of<Code::dict4>(a, plan, launch);
        case Code::dict3: return launch_lowbit_few_of<Code::dict3>(a, plan, launch);
        case Code::int8: break;
    }
    fail("code is int8; allowed: int4, dict4, dict3");
}

}  // namespace qbert::cuda
