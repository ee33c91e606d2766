#include "cuda/sm90/lowbit.h"

#include <algorithm>
#include <cstring>

#include "cuda/common/error.h"
#include "cuda/sm90/cost.h"
#include "cuda/sm90/lowbit_few.h"
#include "cuda/sm90/lowbit_plan.h"

namespace qbert::cuda {
namespace {

// Codes of tokens are within +-127, operands of weights within +-128.
constexpr int64_t kMaxLowbitK = INT32_MAX / (127 * 128);

void check_extents(const LowbitLinear& a) {
    check_tokens_and_channels(a.t, a.n);
    check_extent("k", a.k, kMaxLowbitK, ", beyond which int32 sums could overflow");
    const int64_t blocks = panels_of(a.n) * blocks_of(a.k);
    require(blocks <= kMaxExtent, "n = ", a.n, " by k = ", a.k, " is ", blocks, " blocks of 64 x 128; allowed: ", kMaxExtent);
}

void check_int4(const LowbitLinear& a) {
    check_vector("group_scale", a.group_scale, 1);
    check_groups(a.groups, a.k);
    require(a.n * a.groups <= kMaxExtent, a.n, " rows of ", a.groups, " group scales; allowed: ", kMaxExtent, " scales");
    require(a.matrices == 1, "an int4 weight has ", a.matrices, " matrices; allowed: 1, a scale for each row");
    require(a.outliers.count == 0, "an int4 weight has ", a.outliers.count, " outliers; allowed: none");
}

void check_codebook(const LowbitLinear& a) {
    check_vector("codebook", a.codebook, 4);
    check_extent("matrices", a.matrices, a.n);
    require(a.n % a.matrices == 0, a.matrices, " matrices do not divide n = ", a.n);
    check_outliers(a.outliers);
}

}  // namespace

void check_outliers(const Outliers& o) {
    require(o.count >= 0 && o.count <= INT32_MAX, o.count, " outliers; allowed: 0 ... ", INT32_MAX);
    if (o.count == 0) return;
    require(o.col_bytes == 2 || o.col_bytes == 4, "columns of outliers have ", o.col_bytes, " bytes; allowed: 2, 4");
    check_vector("rowptr", o.rowptr, 4);
    check_vector("col", o.col, o.col_bytes);
    check_vector("delta", o.delta, 4);
}

void check_groups(int64_t groups, int64_t k) {
    check_extent("groups", groups, k);
    require(k % groups == 0, groups, " groups do not divide k = ", k);
    const int64_t size = k / groups;
    require(groups == 1 || size == 32 || size == 64 || size % kBlockColumns == 0, "groups of ", size,
            "; allowed: 32, 64, multiples of 128, or one group");
}

void check_arguments(const LowbitLinear& a) {
    require(a.code != Code::int8, "code is int8; allowed: int4, dict4, dict3");
    check_code("activation", static_cast<int>(a.finish.activation), 2);
    check_type("out's type", a.finish.float_type);
    check_type("bias's type", a.bias_type);
    check_extents(a);
    check_matrix("q", a.q, a.k, a.q_pitch, 1);
    check_vector("codes", a.codes, kAlignment);
    check_vector("s", a.s, 4);
    check_vector("scale", a.scale, 4);
    if (a.code == Code::int4) {
        check_int4(a);
    } else {
        check_codebook(a);
    }
    if (a.bias != nullptr) check_vector("bias", a.bias, bytes_of(a.bias_type));
    check_vector("out", a.out, a.out_bytes());
    check_pitch("out", a.n, a.out_pitch, a.out_bytes());
}

LowbitTileIndex lowbit_tile_named(const char* name) {
    if (std::strncmp(name, "few ", 4) == 0) return kLowbitFew;  // and one of its plans
    return static_cast<LowbitTileIndex>(index_named(kLowbitTiles, name));
}

int64_t lowbit_columns_bytes(LowbitTileIndex tile, int64_t t, int64_t k, int64_t outliers) {
    if (outliers == 0 || tile == kLowbitFew) return 0;
    return column_blocks(t) * k * kColumnTokens;
}

int64_t lowbit_columns_bytes(int64_t t, int64_t n, int64_t k, int64_t outliers, int sm_count) {
    int64_t bytes = 0;
    for (const Code code : {Code::dict3, Code::dict4}) {
        for (const bool gelu : {false, true}) {
            const LowbitTileIndex tile = lowbit_choose({t, n, k, code, gelu}, sm_count);
            bytes = std::max(bytes, lowbit_columns_bytes(tile, t, k, outliers));
        }
    }
    return bytes;
}

}  // namespace qbert::cuda
