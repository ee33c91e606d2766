#include "cuda/common/error.h"
#include "cuda/sm90/lowbit_columns.cuh"
#include "cuda/sm90/lowbit_many.h"

namespace qbert::cuda {

void launch_lowbit_many(const LowbitLinear& linear, LowbitTileIndex tile, const Launch& launch) {
    if (linear.outliers.count > 0) launch_columns(linear, launch);
    switch (linear.code) {
        case Code::int4: return launch_lowbit_code<Code::int4>(linear, tile, launch);
        case Code::dict4: return launch_lowbit_code<Code::dict4>(linear, tile, launch);
        case Code::dict3: return launch_lowbit_code<Code::dict3>(linear, tile, launch);
        case Code::int8: break;
    }
    fail("no kernel for many tokens computes code int8");
}

}  // namespace qbert::cuda
