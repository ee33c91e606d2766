// Weights in the order in which wgmma's A operand lies in registers: qbert/weight/layout/fragments.py, in C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/common/error.h"

namespace qbert::cuda {

// Formats of a weight's codes.
enum class Code : int { int4, dict4, dict3, int8 };
inline constexpr const char* kCodeNames[] = {"int4", "dict4", "dict3", "int8"};

inline Code code_named(const char* name) {
    for (int i = 0; i < 4; ++i) {
        if (std::strcmp(kCodeNames[i], name) == 0) return static_cast<Code>(i);
    }
    fail("there is no code '", name, "'; allowed: int4, dict4, dict3, int8");
}

// A matrix is cut into blocks of 64 rows by 128 columns. A panel of 64 rows is one run of blocks.
inline constexpr int kBlockRows = 64, kBlockColumns = 128;
// Of the warpgroup that a block belongs to.
inline constexpr int kWarpgroupThreads = 128;

constexpr int code_bits(Code code) { return code == Code::int8 ? 8 : code == Code::dict3 ? 3 : 4; }
constexpr int block_bytes(Code code) { return kBlockRows * kBlockColumns / 8 * code_bits(code); }
constexpr int64_t panels_of(int64_t n) { return (n + kBlockRows - 1) / kBlockRows; }
constexpr int64_t blocks_of(int64_t k) { return (k + kBlockColumns - 1) / kBlockColumns; }

// 32-bit words of a block that each of its threads has.
constexpr int thread_words(Code code) { return block_bytes(code) / kWarpgroupThreads / 4; }
// Where a thread's 16 bytes of a piece start in a block, for words 4 piece ... 4 piece + 3; of three bits the second piece is 8
// bytes.
constexpr int piece_start(Code code, int piece, int thread) {
    return piece * 2048 + thread * (code == Code::dict3 && piece == 1 ? 8 : 16);
}

}  // namespace qbert::cuda
