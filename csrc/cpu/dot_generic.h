// Integer products in plain C++, for any CPU: codes are widened to 16 bits and multiplied one by one.
#pragma once

#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 1;
constexpr int kQuadMultiple = 1;

// What `dot` needs while it is used; here nothing. See dot_amx_int8.h.
struct DotSession {
    DotSession() {}
    ~DotSession() {}
};

// Strip: for each four input channels, 16 tokens times four int16.
QBERT_INLINE int64_t strip_bytes_of(int64_t quads) { return quads * 128; }

template <class Code>
QBERT_INLINE void pack_strip_of(const Code* q, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    int16_t* out = static_cast<int16_t*>(strip);
    memset(strip, 0, strip_bytes_of(quads));
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < k; ++c) out[c / 4 * 64 + i * 4 + c % 4] = q[i * stride + c];
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
    i32x16 column;
    for (int i = 0; i < 16; ++i) column[i] = from[4 * i];
    return to_float(column);
}

// acc[i * 64 + p * 16 + lane] = sum over k of token i times channel (p, lane), for i < rows <= 16 and p < panel_count <= 4.
// See dot_avx512_vnni.h for the arguments; codes are widened here, so their sign is in the strip and no sums are needed.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t /*sums_row*/, int32_t* acc, const int8_t* /*ahead*/ = nullptr) {
    const int16_t* strip = static_cast<const int16_t*>(strips);
    for (int64_t p = 0; p < panel_count; ++p) {
        const int8_t* panel = panels + p * panel_stride;
        for (int64_t i = 0; i < rows; ++i) {
            int32_t sum[16] = {};
            for (int64_t r = 0; r < quads; ++r) {
                const int16_t* a = strip + r * 64 + i * 4;
                const int8_t* w = panel + r * 64;
                for (int lane = 0; lane < 16; ++lane) {
                    sum[lane] += a[0] * w[4 * lane] + a[1] * w[4 * lane + 1] + a[2] * w[4 * lane + 2] + a[3] * w[4 * lane + 3];
                }
            }
            memcpy(acc + i * 64 + p * 16, sum, sizeof sum);
        }
    }
}

static int64_t peak_products(int64_t iterations) {
    alignas(64) int16_t strip[8 * 64];
    alignas(64) int8_t panel[8 * 64];
    int32_t acc[16 * 64];
    memset(strip, 1, sizeof strip);
    memset(panel, 1, sizeof panel);
    for (int64_t it = 0; it < iterations; it += 100) {
        dot<true>(strip, 16, panel, 0, 1, 8, 0, acc);
        __asm__ volatile("" : : "r"(acc) : "memory");
    }
    return (iterations + 99) / 100 * 16 * 16 * 32;
}

}  // namespace QBERT_ISA
}  // namespace qbert

#include "cpu/multiply_by_strip.h"
