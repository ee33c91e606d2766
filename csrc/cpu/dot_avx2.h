// Integer products with AVX2: both operands widened to 16 bits, then vpmaddwd, which is exact; vpmaddubsw would saturate.
#pragma once

#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 1;
constexpr int kQuadMultiple = 1;
constexpr int kRowsPerPass = 3;  // 3 tokens x 4 registers of half-added lanes: 12 accumulators, 1 weight, 1 activation, 1 product

// What `dot` needs while it is used; here nothing. See dot_amx_int8.h.
struct DotSession {
    DotSession() {}
    ~DotSession() {}
};

// Strip: for each four input channels, 16 tokens times four int16.
QBERT_INLINE int64_t strip_bytes_of(int64_t quads) { return quads * 128; }

template <class Code>
QBERT_INLINE void pack_strip_of(const Code* q, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    constexpr bool kSigned = static_cast<Code>(-1) < 0;
    uint8_t* out = static_cast<uint8_t*>(strip);
    for (int64_t i = 0; i < kStripTokens; ++i) {
        for (int64_t r = 0; r < quads; ++r) {
            const int64_t left = i < rows ? k - 4 * r : 0;
            int32_t word = 0;
            if (left >= 4) {
                memcpy(&word, q + i * stride + 4 * r, 4);
            } else if (left > 0) {
                memcpy(&word, q + i * stride + 4 * r, static_cast<size_t>(left));
            }
            const __m128i bytes = _mm_cvtsi32_si128(word);
            const __m128i wide = kSigned ? _mm_cvtepi8_epi16(bytes) : _mm_cvtepu8_epi16(bytes);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(out + r * 128 + i * 8), wide);
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
    const int16_t* from = static_cast<const int16_t*>(strip) + c / 4 * 64 + c % 4;
    int32_t column[16];
    for (int i = 0; i < 16; ++i) column[i] = from[4 * i];
    return to_float(load(column));
}

// One panel. A register holds, for four lanes, the sums over even and odd pairs of input channels side by side.
template <int kRows>
QBERT_NOINLINE void dot_pass(const uint8_t* strip, const int8_t* panel, int64_t quads, int32_t* acc) {
    __m256i sum[kRows][4];
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[i][v] = _mm256_setzero_si256();
    }
    for (int64_t r = 0; r < quads; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + r * 64 + v * 16)));
#pragma GCC unroll 3
            for (int i = 0; i < kRows; ++i) {
                int64_t word;
                memcpy(&word, strip + r * 128 + 8 * i, 8);
                sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(_mm256_set1_epi64x(word), w));
            }
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 4; v += 2) {
            // hadd works within 128-bit halves: lanes come out as 0 1 4 5 2 3 6 7.
            const __m256i lanes = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[i][v], sum[i][v + 1]), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + i * 64 + v * 4), lanes);
        }
    }
}

// See dot_avx512_vnni.h. Codes are widened, so their sign is in the strip and no sums are needed.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t /*sums_row*/, int32_t* acc, const int8_t* /*ahead*/ = nullptr) {
    for (int64_t p = 0; p < panel_count; ++p) {
        const uint8_t* strip = static_cast<const uint8_t*>(strips);
        const int8_t* panel = panels + p * panel_stride;
        int32_t* out = acc + p * 16;
        int64_t left = rows;
        for (; left >= 3; left -= 3, strip += 24, out += 192) dot_pass<3>(strip, panel, quads, out);
        if (left == 2) dot_pass<2>(strip, panel, quads, out);
        if (left == 1) dot_pass<1>(strip, panel, quads, out);
    }
}

static int64_t peak_products(int64_t iterations) {
    const __m256i w = _mm256_set1_epi16(5);
    __m256i a = _mm256_set1_epi16(3), s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
    for (int64_t it = 0; it < iterations; ++it) {
        __asm__ volatile("" : "+x"(a), "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7));
        s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));  // or the compiler would multiply once
        s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s4 = _mm256_add_epi32(s4, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s5 = _mm256_add_epi32(s5, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s6 = _mm256_add_epi32(s6, _mm256_madd_epi16(a, w));
        __asm__ volatile("" : "+x"(a));
        s7 = _mm256_add_epi32(s7, _mm256_madd_epi16(a, w));
    }
    return iterations * 8 * 16;
}

}  // namespace QBERT_ISA
}  // namespace qbert

#include "cpu/multiply_by_strip.h"
