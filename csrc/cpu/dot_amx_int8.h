// Integer products with AMX-INT8: tiles of 16 rows of 64 bytes. One instruction multiplies 16 tokens by 16 channels over 64 input
// channels, signed or unsigned by signed, so codes need no shift and panels no sums.
//
// Two strips by two panels a pass: four sums, two loads of each operand for four products, which is what the load ports can feed.
#pragma once

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 2;
constexpr int kQuadMultiple = 16;  // whole tiles: 64 input channels

// `dot` works only while one of these lives. Telling the CPU the tiles' shape costs as much as a dozen products, so it is done once
// a task; releasing them keeps context switches of everything else small.
struct DotSession {
    DotSession() { tiles_configure(); }
    ~DotSession() { tiles_release(); }
};

// Strip: for each 64 input channels, 16 tokens times 64 bytes: a tile.
QBERT_INLINE int64_t strip_bytes_of(int64_t quads) { return quads * 64; }

QBERT_INLINE void pack_strip_of(const void* codes, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    const uint8_t* q = static_cast<const uint8_t*>(codes);
    uint8_t* out = static_cast<uint8_t*>(strip);
    for (int64_t at = 0; at < quads * 4; at += 64, out += 1024) {
        const int64_t inside = k - at < 64 ? (k - at > 0 ? k - at : 0) : 64;
        for (int64_t i = 0; i < kStripTokens; ++i) {
            if (i < rows && inside == 64) {
                memcpy(out + i * 64, q + i * stride + at, 64);
            } else {
                memset(out + i * 64, 0, 64);
                if (i < rows) memcpy(out + i * 64, q + i * stride + at, static_cast<size_t>(inside));
            }
        }
    }
}

QBERT_INLINE void pack_codes(const int8_t* q, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_strip_of(q, rows, k, stride, quads, strip);
}

QBERT_INLINE void pack_bytes(const uint8_t* p, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_strip_of(p, rows, k, stride, quads, strip);
}

// The codes of input channel c for the 16 tokens of a strip from pack_codes, as floats.
QBERT_INLINE f32x16 codes_of_column(const void* strip, uint64_t c) {
    const int8_t* from = static_cast<const int8_t*>(strip) + c / 64 * 1024 + c % 64 / 4 * 4;
    int32_t column[16];
    for (int i = 0; i < 16; ++i) memcpy(&column[i], from + 64 * i, 4);
    return to_float((load(column) << static_cast<int>(24 - 8 * (c % 4))) >> 24);
}

// kStrips strips times kPanels panels, each 1 or 2. Tiles 0 ... 3 are the sums, 4 and 5 the strips, 6 and 7 the panels.
template <int kStrips, int kPanels, bool kUnsigned>
QBERT_NOINLINE void dot_pass(const uint8_t* strip, int64_t strip_stride, const int8_t* panels, int64_t panel_stride, int64_t quads, int32_t* acc) {
    tile_zero<0>();
    if constexpr (kPanels == 2) tile_zero<1>();
    if constexpr (kStrips == 2) tile_zero<2>();
    if constexpr (kStrips == 2 && kPanels == 2) tile_zero<3>();
    for (int64_t r = 0; r < quads; r += 16) {
        tile_load<6>(panels + r * 64, 64);
        tile_load<4>(strip + r * 64, 64);
        tile_dot<0, 4, 6, kUnsigned>();
        if constexpr (kPanels == 2) {
            tile_load<7>(panels + panel_stride + r * 64, 64);
            tile_dot<1, 4, 7, kUnsigned>();
        }
        if constexpr (kStrips == 2) {
            tile_load<5>(strip + strip_stride + r * 64, 64);
            tile_dot<2, 5, 6, kUnsigned>();
        }
        if constexpr (kStrips == 2 && kPanels == 2) tile_dot<3, 5, 7, kUnsigned>();
    }
    constexpr int64_t kRow = kBlockChannels * sizeof(int32_t);
    tile_store<0>(acc, kRow);
    if constexpr (kPanels == 2) tile_store<1>(acc + kPanelLanes, kRow);
    if constexpr (kStrips == 2) tile_store<2>(acc + kStripTokens * kBlockChannels, kRow);
    if constexpr (kStrips == 2 && kPanels == 2) tile_store<3>(acc + kStripTokens * kBlockChannels + kPanelLanes, kRow);
}

template <int kStrips, bool kUnsigned>
QBERT_INLINE void dot_strips(const uint8_t* strip, const int8_t* panels, int64_t panel_stride, int64_t panel_count, int64_t quads, int32_t* acc) {
    const int64_t strip_stride = strip_bytes_of(quads);
    int64_t p = 0;
    for (; p + 2 <= panel_count; p += 2) {
        dot_pass<kStrips, 2, kUnsigned>(strip, strip_stride, panels + p * panel_stride, panel_stride, quads, acc + p * kPanelLanes);
    }
    if (p < panel_count) {
        dot_pass<kStrips, 1, kUnsigned>(strip, strip_stride, panels + p * panel_stride, panel_stride, quads, acc + p * kPanelLanes);
    }
}

// As in dot_avx512_vnni.h, for rows <= 32: of two strips that lie one behind the other. All rows of a strip are written.
// quads is a multiple of 16.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t /*sums_row*/, int32_t* acc, const int8_t* /*ahead*/ = nullptr) {
    const uint8_t* strip = static_cast<const uint8_t*>(strips);
    if (rows > kStripTokens) {
        dot_strips<2, kUnsigned>(strip, panels, panel_stride, panel_count, quads, acc);
    } else {
        dot_strips<1, kUnsigned>(strip, panels, panel_stride, panel_count, quads, acc);
    }
}

static int64_t peak_products(int64_t iterations) {
    alignas(64) uint8_t operand[1024];
    memset(operand, 1, sizeof operand);
    const DotSession session;
    tile_load<4>(operand, 64);
    tile_load<5>(operand, 64);
    tile_load<6>(operand, 64);
    tile_load<7>(operand, 64);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t it = 0; it < iterations; ++it) {
        tile_dot<0, 4, 6, false>();
        tile_dot<1, 4, 7, false>();
        tile_dot<2, 5, 6, false>();
        tile_dot<3, 5, 7, false>();
    }
    alignas(64) int32_t sums[256];
    tile_store<0>(sums, 64);
    return iterations * 4 * 16 * 16 * 64;
}

}  // namespace QBERT_ISA
}  // namespace qbert
