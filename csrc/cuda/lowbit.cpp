#include "cuda/lowbit.h"

#include <algorithm>
#include <cstring>

#include "cuda/error.h"
#include "cuda/lowbit_few.h"
#include "cuda/lowbit_plan.h"

namespace qbert::cuda {
namespace {

// Codes of tokens are within +-127, operands of weights within +-128.
constexpr int64_t kMaxLowbitK = INT32_MAX / (127 * 128);

// An H100's multiprocessor, a cycle, as in tiles.cpp.
constexpr double kProducts = 4096, kL2BytesAll = 4224, kL2BytesOne = 64, kLanes = 128;
// Of 128: copies and products that share it never use it all.
constexpr double kSharedBytes = 115;
// What products of any number of tokens read of shared memory a cycle: 32 bytes a token, which half a cycle multiplies.
constexpr double kOperandBytes = 64;
// A scheduler begins an integer instruction of a warp in two cycles.
constexpr double kIntegerCycles = 2;
constexpr double kFinish = 12, kGelu = 14;  // instructions a value
constexpr double kStart = 2000;

// Of a warp for a block, see expand.cuh.
constexpr double expand_instructions(Code code) { return code == Code::dict3 ? 42 : code == Code::dict4 ? 88 : 72; }

double few_cycles(const LowbitProblem& problem, int multiprocessors) {
    const StreamProblem stream{problem.t, problem.n, problem.k, block_bytes(problem.code), kBlockColumns, 0};
    return stream_model_cycles(choose_stream(stream, kMostFewTokens, false, multiprocessors), stream, multiprocessors);
}

void check_extents(const LowbitLinear& a) {
    check_tokens_and_channels(a.t, a.n);
    check_extent("k", a.k, kMaxLowbitK, ", beyond which int32 sums could overflow");
    const int64_t blocks = strips_of(a.n) * blocks_of(a.k);
    require(blocks <= kMaxExtent, "n = ", a.n, " by k = ", a.k, " is ", blocks, " blocks of 64 x 128; allowed: ", kMaxExtent);
}

void check_int4(const LowbitLinear& a) {
    check_vector("group_scale", a.group_scale, 1);
    check_groups(a.groups, a.k);
    require(a.n * a.groups <= kMaxExtent, a.n, " rows of ", a.groups, " group scales; allowed: ", kMaxExtent, " scales");
    require(a.matrices == 1, "an int4 weight has ", a.matrices, " matrices; allowed: 1, a scale for each row");
    require(a.outliers.count == 0, "an int4 weight has ", a.outliers.count, " outliers; allowed: none");
}

void check_dictionary(const LowbitLinear& a) {
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
        check_dictionary(a);
    }
    if (a.bias != nullptr) check_vector("bias", a.bias, bytes_of(a.bias_type));
    check_vector("out", a.out, a.out_bytes());
    check_pitch("out", a.n, a.out_pitch, a.out_bytes());
}

LowbitTileIndex lowbit_tile_named(const char* name) {
    if (std::strncmp(name, "few ", 4) == 0) return kLowbitFew;  // and one of its plans
    std::string allowed;
    for (const LowbitTile& tile : kLowbitTiles) {
        if (std::strcmp(tile.name, name) == 0) return static_cast<LowbitTileIndex>(&tile - kLowbitTiles);
        allowed += (allowed.empty() ? "" : ", ") + std::string(tile.name);
    }
    fail("there is no tile '", name, "'; allowed: ", allowed);
}

double lowbit_model_cycles(LowbitTileIndex index, const LowbitProblem& problem, int multiprocessors) {
    if (index == kLowbitFew) return few_cycles(problem, multiprocessors);
    const LowbitTile& tile = kLowbitTiles[index];
    const LowbitPlan plan = lowbit_plan(tile, problem.t, problem.n);
    const int clusters = lowbit_clusters(plan, multiprocessors);
    const double each = (plan.tiles() + clusters - 1) / clusters;  // tiles of the busiest cluster

    // A step of k, kBlockColumns: what takes longest of the products, the way from L2, shared memory, and expansion.
    const int strips = tile.channels / kBlockRows;
    const double codes = strips * block_bytes(problem.code), token_bytes = tile.tokens * kBlockColumns;
    const double products = tile.tokens * tile.channels * kBlockColumns / kProducts;
    const double l2 = std::min(kL2BytesOne, kL2BytesAll / (kPair * clusters));
    const double shared = products * kOperandBytes + token_bytes + 2 * codes;  // the operand; written; codes written and read
    const double expand = strips * expand_instructions(problem.code) * kIntegerCycles;
    const double step = std::max({products, (token_bytes / kPair + codes) / l2, shared / kSharedBytes, expand});

    const double main = static_cast<double>(blocks_of(problem.k)) * step;
    const double finish = tile.tokens * tile.channels * (kFinish + (problem.gelu ? kGelu : 0)) / kLanes;
    if (!tile.pingpong) return kStart + each * (main + finish);
    // One warp group's end hides behind the other's products, or the other way round.
    return kStart + std::max(each * main + finish, main + each * finish);
}

LowbitTileIndex lowbit_choose(const LowbitProblem& problem, int multiprocessors) {
    int best = kLowbitTileCount;
    double fewest = 0;
    for (int tile = problem.t <= kMaxFewTokens ? kLowbitFew : kLowbitFew + 1; tile < kLowbitTileCount; ++tile) {
        const double cycles = lowbit_model_cycles(static_cast<LowbitTileIndex>(tile), problem, multiprocessors);
        if (best == kLowbitTileCount || cycles < fewest) best = tile, fewest = cycles;
    }
    return static_cast<LowbitTileIndex>(best);
}

int64_t lowbit_columns_bytes(LowbitTileIndex tile, int64_t t, int64_t k, int64_t outliers) {
    if (outliers == 0 || tile == kLowbitFew) return 0;
    return column_blocks(t) * k * kTurn;
}

int64_t lowbit_columns_bytes(int64_t t, int64_t n, int64_t k, int64_t outliers, int multiprocessors) {
    int64_t bytes = 0;
    for (const Code code : {Code::dict3, Code::dict4}) {
        for (const bool gelu : {false, true}) {
            const LowbitTileIndex tile = lowbit_choose({t, n, k, code, gelu}, multiprocessors);
            bytes = std::max(bytes, lowbit_columns_bytes(tile, t, k, outliers));
        }
    }
    return bytes;
}

}  // namespace qbert::cuda
