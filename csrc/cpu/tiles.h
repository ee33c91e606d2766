// AMX tile registers: the instructions, or with QBERT_EMULATE_AMX the same in plain C++, so that the code that uses them can be
// tested on a CPU without AMX. Tile numbers are template arguments because the instructions take them as immediates.
#pragma once

#include <stdint.h>
#include <string.h>

namespace qbert {
namespace QBERT_ISA {

// 64 bytes as ldtilecfg reads them (Intel SDM, volume 1, chapter 18).
struct TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the layout is fixed by the CPU");

#if defined(QBERT_EMULATE_AMX)

struct EmulatedTile {
    int32_t word[16][16];
};
static thread_local EmulatedTile emulated_tile[8];

static void tiles_configure() {
    static const TileConfig config;  // only its shape: eight tiles of 16 rows of 64 bytes
    memset(emulated_tile, 0, sizeof emulated_tile * (config.palette == 1));
}
static void tiles_release() {}
template <int kTile>
static void tile_zero() {
    memset(&emulated_tile[kTile], 0, sizeof(EmulatedTile));
}
template <int kTile>
static void tile_load(const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) memcpy(emulated_tile[kTile].word[row], static_cast<const char*>(from) + row * stride, 64);
}
template <int kTile>
static void tile_load_once(const void* from, int64_t stride) {
    tile_load<kTile>(from, stride);
}
template <int kTile>
static void tile_store(void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) memcpy(static_cast<char*>(to) + row * stride, emulated_tile[kTile].word[row], 64);
}
// sum[m][n] += sum over r and i of a[m][4 r + i] * b[r][4 n + i]; b is signed, a is not if kUnsigned.
template <int kSum, int kA, int kB, bool kUnsigned>
static void tile_dot() {
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            uint32_t sum = static_cast<uint32_t>(emulated_tile[kSum].word[m][n]);
            for (int r = 0; r < 16; ++r) {
                const uint32_t a = static_cast<uint32_t>(emulated_tile[kA].word[m][r]);
                const uint32_t b = static_cast<uint32_t>(emulated_tile[kB].word[r][n]);
                for (int i = 0; i < 32; i += 8) {
                    const int32_t left = kUnsigned ? static_cast<uint8_t>(a >> i) : static_cast<int8_t>(a >> i);
                    sum += static_cast<uint32_t>(left * static_cast<int8_t>(b >> i));
                }
            }
            emulated_tile[kSum].word[m][n] = static_cast<int32_t>(sum);
        }
    }
}

#else

// By assembly: GCC's intrinsics paste the text of their argument into the name of the register, so they take no template argument.
static inline void tiles_configure() {
    static const TileConfig config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
static inline void tiles_release() { __asm__ volatile("tilerelease"); }
template <int kTile>
static inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
static inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
// The same of what is not needed again soon: it does not push out of the first cache what is.
template <int kTile>
static inline void tile_load_once(const void* from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
static inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += sum over r and i of a[m][4 r + i] * b[r][4 n + i]; the instruction's last operand in AT&T order is the sum.
template <int kSum, int kA, int kB, bool kUnsigned>
static inline void tile_dot() {
    if constexpr (kUnsigned) {
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
    } else {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
    }
}

#endif

}  // namespace QBERT_ISA
}  // namespace qbert
