// Integer products with AVX-512 VNNI: vpdpbusd adds four products of an unsigned and a signed byte to each of 16 int32 lanes.
//
// Activations are the unsigned operand: signed codes are stored plus 128, and 128 times the sum of a channel's weights, which
// every panel carries in its last row, is where the accumulator starts from below. All of it is exact modulo 2^32.
#pragma once

#include "cpu/pack.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 1;
constexpr int kQuadMultiple = 1;    // rows of a panel are padded to a multiple of this for `dot`
constexpr int kRowsPerPass = 6;     // 6 tokens x 4 panels: 24 accumulators, 4 weights, 1 activation of the 32 registers

// What `dot` needs while it is used; here nothing. See dot_amx_int8.h.
struct DotSession {
    DotSession() {}
    ~DotSession() {}
};

// Strip: for each four input channels, 16 tokens times 4 bytes.
QBERT_INLINE int64_t strip_bytes_of(int64_t quads) { return quads * 64; }

QBERT_INLINE void pack_codes(const int8_t* q, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_words(q, rows, k, stride, quads, 0x80, strip);
}

QBERT_INLINE void pack_bytes(const uint8_t* p, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_words(p, rows, k, stride, quads, 0, strip);
}

#define QBERT_WITHIN(c) {(c), 0, 0, 0, 4 + (c), 0, 0, 0, 8 + (c), 0, 0, 0, 12 + (c), 0, 0, 0}
#define QBERT_WITHIN4(c) {QBERT_WITHIN(c), QBERT_WITHIN(c), QBERT_WITHIN(c), QBERT_WITHIN(c)}
alignas(64) static const uint8_t kByteOfWord[4][4][16] = {QBERT_WITHIN4(0), QBERT_WITHIN4(1), QBERT_WITHIN4(2), QBERT_WITHIN4(3)};
#undef QBERT_WITHIN4
#undef QBERT_WITHIN

// The codes of input channel c for the 16 tokens of a strip from pack_codes, as floats: a shuffle puts the byte u into the
// mantissa of 2^23, whose bits then mean 2^23 + u, and u is the code plus 128.
QBERT_INLINE f32x16 codes_of_column(const void* strip, uint64_t c) {
    const __m512i words = _mm512_loadu_si512(static_cast<const uint8_t*>(strip) + c / 4 * 64);
    const __m512i byte = _mm512_load_si512(kByteOfWord[c % 4]);
    const __m512i bits = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111ull, words, byte);
    return (f32x16)bits - 8388736.0f;
}

// By assembly: GCC 12 copies the sum before each intrinsic that overwrites it, at the price of a fifth of the speed.
QBERT_INLINE void add_products(__m512i& sum, __m512i bytes, __m512i codes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(codes));
}

// All loops over registers are unrolled: a sum that is indexed by a variable would live in memory.
//
// kAhead cache lines from `ahead` on are asked for with each row: with few tokens the weights come from memory, whose latency the
// hardware's own prefetching of four streams does not hide.
template <int kRows, int kPanels, bool kUnsigned, int kAhead>
QBERT_NOINLINE void dot_pass(const uint8_t* strip, const int8_t* panels, int64_t panel_stride, int64_t quads, int64_t sums_row,
                             int32_t* acc, const int8_t* ahead) {
    __m512i sum[kRows][kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
        __m512i start = _mm512_setzero_si512();
        if (!kUnsigned) start = (__m512i)(i32x16{} - (load_as<i32x16>(panels + p * panel_stride + sums_row * 64) << 7));
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) sum[i][p] = start;
    }
    for (int64_t r = 0; r < quads; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kAhead; ++i) __builtin_prefetch(ahead + (r * kAhead + i) * 64, 0, 2);
        __m512i w[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) w[p] = _mm512_loadu_si512(panels + p * panel_stride + r * 64);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            int32_t word;
            memcpy(&word, strip + r * 64 + 4 * i, 4);
            const __m512i a = _mm512_set1_epi32(word);
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) add_products(sum[i][p], a, w[p]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) _mm512_storeu_si512(acc + i * 64 + p * 16, sum[i][p]);
    }
}

template <int kPanels, bool kUnsigned, int kAhead>
QBERT_INLINE void dot_some_rows(int64_t rows, const uint8_t* strip, const int8_t* panels, int64_t panel_stride, int64_t quads,
                                int64_t sums_row, int32_t* acc, const int8_t* ahead) {
    switch (rows) {
        case 1: return dot_pass<1, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
        case 2: return dot_pass<2, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
        case 3: return dot_pass<3, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
        case 4: return dot_pass<4, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
        case 5: return dot_pass<5, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
        default: return dot_pass<6, kPanels, kUnsigned, kAhead>(strip, panels, panel_stride, quads, sums_row, acc, ahead);
    }
}

template <int kPanels, bool kUnsigned>
QBERT_INLINE void dot_rows(const uint8_t* strip, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t quads,
                           int64_t sums_row, int32_t* acc, const int8_t* ahead) {
    int64_t passes = (rows + kRowsPerPass - 1) / kRowsPerPass;
    int64_t lines_ahead = ahead == nullptr ? 0 : passes == 1 ? 4 : 2, asked = 0;  // a block's lines, over one or two passes
    while (rows > 0) {
        const int64_t now = (rows + passes - 1) / passes;  // 16 is 6 + 5 + 5, each with enough independent sums
        if (kPanels == 4 && lines_ahead == 4) {
            dot_some_rows<kPanels, kUnsigned, 4>(now, strip, panels, panel_stride, quads, sums_row, acc, ahead);
        } else if (kPanels == 4 && lines_ahead == 2) {
            dot_some_rows<kPanels, kUnsigned, 2>(now, strip, panels, panel_stride, quads, sums_row, acc, ahead);
        } else {
            dot_some_rows<kPanels, kUnsigned, 0>(now, strip, panels, panel_stride, quads, sums_row, acc, nullptr);
        }
        ahead = ahead == nullptr ? nullptr : ahead + lines_ahead * quads * 64;
        asked += lines_ahead;
        if (asked >= kBlockPanels) lines_ahead = 0;
        strip += 4 * now;
        acc += 64 * now;
        rows -= now;
        --passes;
    }
}

// acc[i * 64 + p * 16 + lane] = sum over k of token i times channel (p, lane), for i < rows <= 16 and p < panel_count <= 4.
//
// strips: from pack_codes (kUnsigned false) or pack_bytes (true), of `quads` rows.
// panels: panel_stride bytes apart; row r of 64 bytes holds input channels 4 r ... 4 r + 3 of 16 lanes, row sums_row the int32
//     sums of the lanes over all `quads` rows (read for signed codes only).
// ahead: a block of four panels that will be wanted soon and is not in the cache, or null.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t sums_row, int32_t* acc, const int8_t* ahead = nullptr) {
    const uint8_t* strip = static_cast<const uint8_t*>(strips);
    switch (panel_count) {
        case 1: dot_rows<1, kUnsigned>(strip, rows, panels, panel_stride, quads, sums_row, acc, nullptr); break;
        case 2: dot_rows<2, kUnsigned>(strip, rows, panels, panel_stride, quads, sums_row, acc, nullptr); break;
        case 3: dot_rows<3, kUnsigned>(strip, rows, panels, panel_stride, quads, sums_row, acc, nullptr); break;
        default: dot_rows<4, kUnsigned>(strip, rows, panels, panel_stride, quads, sums_row, acc, ahead); break;
    }
}

static int64_t peak_products(int64_t iterations) {
    const __m512i a = _mm512_set1_epi8(3), w = _mm512_set1_epi8(5);
    __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
    for (int64_t it = 0; it < iterations; ++it) {
        __asm__ volatile(
            "vpdpbusd %8, %9, %0\n\tvpdpbusd %8, %9, %1\n\tvpdpbusd %8, %9, %2\n\tvpdpbusd %8, %9, %3\n\t"
            "vpdpbusd %8, %9, %4\n\tvpdpbusd %8, %9, %5\n\tvpdpbusd %8, %9, %6\n\tvpdpbusd %8, %9, %7"
            : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7)
            : "v"(a), "v"(w));
    }
    return iterations * 8 * 64;
}

}  // namespace QBERT_ISA
}  // namespace qbert

#include "cpu/multiply_by_strip.h"
