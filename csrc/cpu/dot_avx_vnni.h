// Integer products with AVX-VNNI: vpdpbusd on 256-bit registers. See dot_avx512_vnni.h for how signs are treated.
#pragma once

#include "cpu/pack.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 1;
constexpr int kQuadMultiple = 1;
constexpr int kRowsPerPass = 3;  // 3 tokens x 2 panels of two registers: 12 accumulators and 3 activations of the 16 registers

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

// The codes of input channel c for the 16 tokens of a strip from pack_codes, as floats.
QBERT_INLINE f32x16 codes_of_column(const void* strip, uint64_t c) {
    const u32x16 words = load_as<u32x16>(static_cast<const uint8_t*>(strip) + (c / 4) * 64);
    return to_float((i32x16)((words >> static_cast<int>(8 * (c % 4))) & 0xff) - 128);
}

QBERT_INLINE __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// By assembly, and with all loops over registers unrolled: see dot_avx512_vnni.h.
QBERT_INLINE void add_products(__m256i& sum, __m256i bytes, __m256i codes) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(bytes), "x"(codes));
}

template <int kRows, int kPanels, bool kUnsigned>
QBERT_NOINLINE void dot_pass(const uint8_t* strip, const int8_t* panels, int64_t panel_stride, int64_t quads, int64_t sums_row, int32_t* acc) {
    __m256i sum[kRows][2 * kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < 2 * kPanels; ++p) {
        __m256i start = _mm256_setzero_si256();
        if (!kUnsigned) {
            const int8_t* sums = panels + p / 2 * panel_stride + sums_row * 64 + p % 2 * 32;
            start = _mm256_sub_epi32(start, _mm256_slli_epi32(load256(sums), 7));
        }
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) sum[i][p] = start;
    }
    for (int64_t r = 0; r < quads; ++r) {
        __m256i a[kRows];
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) {
            int32_t word;
            memcpy(&word, strip + r * 64 + 4 * i, 4);
            a[i] = _mm256_set1_epi32(word);
        }
#pragma GCC unroll 4
        for (int p = 0; p < 2 * kPanels; ++p) {
            const __m256i w = load256(panels + p / 2 * panel_stride + r * 64 + p % 2 * 32);
#pragma GCC unroll 3
            for (int i = 0; i < kRows; ++i) add_products(sum[i][p], a[i], w);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < 2 * kPanels; ++p) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + i * 64 + p * 8), sum[i][p]);
    }
}

template <int kPanels, bool kUnsigned>
QBERT_INLINE void dot_rows(const uint8_t* strip, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t quads,
                           int64_t sums_row, int32_t* acc) {
    for (; rows >= 3; rows -= 3, strip += 12, acc += 192) {
        dot_pass<3, kPanels, kUnsigned>(strip, panels, panel_stride, quads, sums_row, acc);
    }
    if (rows == 2) dot_pass<2, kPanels, kUnsigned>(strip, panels, panel_stride, quads, sums_row, acc);
    if (rows == 1) dot_pass<1, kPanels, kUnsigned>(strip, panels, panel_stride, quads, sums_row, acc);
}

// See dot_avx512_vnni.h.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t sums_row, int32_t* acc, const int8_t* /*ahead*/ = nullptr) {
    const uint8_t* strip = static_cast<const uint8_t*>(strips);
    int64_t p = 0;
    for (; p + 2 <= panel_count; p += 2) {
        dot_rows<2, kUnsigned>(strip, rows, panels + p * panel_stride, panel_stride, quads, sums_row, acc + p * 16);
    }
    if (p < panel_count) dot_rows<1, kUnsigned>(strip, rows, panels + p * panel_stride, panel_stride, quads, sums_row, acc + p * 16);
}

static int64_t peak_products(int64_t iterations) {
    const __m256i a = _mm256_set1_epi8(3), w = _mm256_set1_epi8(5);
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
    for (int64_t it = 0; it < iterations; ++it) {
        __asm__ volatile("" : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5));
        __asm__ volatile("" : "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11));
        add_products(s0, a, w), add_products(s1, a, w), add_products(s2, a, w), add_products(s3, a, w);
        add_products(s4, a, w), add_products(s5, a, w), add_products(s6, a, w), add_products(s7, a, w);
        add_products(s8, a, w), add_products(s9, a, w), add_products(s10, a, w), add_products(s11, a, w);
    }
    return iterations * 12 * 32;
}

}  // namespace QBERT_ISA
}  // namespace qbert

#include "cpu/multiply_by_strip.h"
