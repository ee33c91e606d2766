// Sixteen-lane float arithmetic, written once over the compiler's vector types and compiled for every instruction set.
//
// Every function is a fixed sequence of IEEE operations, fused only where it says madd, and sums over lanes follow one fixed tree,
// so that all instruction sets give the same bits. Included by the kernels_*.cpp files only, each of which is compiled with
// its own flags; hence everything here is static, and nothing here may include a C++ standard library header (the linker
// keeps one copy of an inline function for the whole module, which could be the AVX-512 one).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

#define QBERT_INLINE static inline __attribute__((always_inline))
#define QBERT_NOINLINE static __attribute__((noinline))  // inner loops of their own, so that they get all registers

namespace qbert {
namespace QBERT_ISA {

constexpr int kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// ---- memory ----

template <class Vector, class Element>
QBERT_INLINE Vector load_as(const Element* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

QBERT_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }
QBERT_INLINE i32x16 load(const int32_t* from) { return load_as<i32x16>(from); }
QBERT_INLINE void store(float* to, f32x16 v) { memcpy(to, &v, sizeof v); }
QBERT_INLINE void store(int32_t* to, i32x16 v) { memcpy(to, &v, sizeof v); }

QBERT_INLINE f32x16 broadcast(float x) { return x - f32x16{}; }  // minus zero is nothing; plus zero is an addition, for -0
QBERT_INLINE i32x16 broadcast(int32_t x) { return x - i32x16{}; }

QBERT_INLINE f32x16 to_float(i32x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i half[2];
    __m256 out[2];
    memcpy(half, &v, sizeof v);
    out[0] = _mm256_cvtepi32_ps(half[0]);
    out[1] = _mm256_cvtepi32_ps(half[1]);
    return load_as<f32x16>(out);
#else
    return __builtin_convertvector(v, f32x16);
#endif
}

// Sixteen int8, as int32 lanes.
QBERT_INLINE i32x16 load_codes(const int8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i half[2] = {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
    return load_as<i32x16>(half);
#else
    return __builtin_convertvector(load_as<i8x16>(from), i32x16);
#endif
}

// The lower 8 bits of each lane.
QBERT_INLINE void store_codes(int8_t* to, i32x16 v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#else
    const i8x16 bytes = __builtin_convertvector(v, i8x16);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

// The lower 8 bits of each lane.
QBERT_INLINE void store_bytes(uint8_t* to, i32x16 v) { store_codes(reinterpret_cast<int8_t*>(to), v); }

// ---- half types ----

QBERT_INLINE f32x16 from_bf16(u16x16 half) { return (f32x16)(__builtin_convertvector(half, u32x16) << 16); }

// Nearest, ties to even; NaN stays NaN.
QBERT_INLINE u16x16 to_bf16(f32x16 v) {
    const u32x16 bits = (u32x16)v;
    const u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const u32x16 kept = (i32x16)(v == v) ? rounded : (bits | 0x400000);
    return __builtin_convertvector(kept >> 16, u16x16);
}

#if defined(__F16C__)
QBERT_INLINE f32x16 from_f16(u16x16 half) {
    __m128i in[2];
    memcpy(in, &half, sizeof in);
    const __m256 out[2] = {_mm256_cvtph_ps(in[0]), _mm256_cvtph_ps(in[1])};
    return load_as<f32x16>(out);
}

QBERT_INLINE u16x16 to_f16(f32x16 v) {
    __m256 in[2];
    memcpy(in, &v, sizeof in);
    const __m128i out[2] = {_mm256_cvtps_ph(in[0], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(in[1], _MM_FROUND_TO_NEAREST_INT)};
    return load_as<u16x16>(out);
}
#else
QBERT_INLINE f32x16 from_f16(u16x16 half) {
    const u32x16 wide = __builtin_convertvector(half, u32x16);
    const u32x16 sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
    // Exponents are moved by a product, which makes subnormal halves normal floats on the way.
    const f32x16 scaled = (f32x16)(magnitude << 13) * 0x1p112f;
    const u32x16 special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
    const u32x16 quiet = magnitude > 0x7c00 ? special | 0x400000 : special;
    return (f32x16)(sign | (magnitude >= 0x7c00 ? quiet : (u32x16)scaled));
}

QBERT_INLINE u16x16 to_f16(f32x16 v) {
    const u32x16 bits = (u32x16)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const u32x16 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;  // rounds to even
    // Adding one half, whose last bit weighs 2^-24, leaves the subnormal half's bits at the bottom, rounded to even.
    const u32x16 subnormal = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000;
    u32x16 half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? u32x16{} + 0x7c00 : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000 ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : half;
    return __builtin_convertvector(half | sign, u16x16);
}
#endif

// Lanes 0 ... count - 1 of float values of any type at `from`; the others are 0. Elements, not bytes, are counted.
QBERT_INLINE f32x16 load_floats(const void* from, FloatType type, int64_t index, int64_t count) {
    if (type == FloatType::f32) {
        const float* at = static_cast<const float*>(from) + index;
        if (count >= kLanes) return load(at);
        float lane[kLanes] = {};
        memcpy(lane, at, sizeof(float) * static_cast<size_t>(count));
        return load(lane);
    }
    const uint16_t* at = static_cast<const uint16_t*>(from) + index;
    uint16_t lane[kLanes] = {};
    memcpy(lane, at, sizeof(uint16_t) * static_cast<size_t>(count < kLanes ? count : kLanes));
    const u16x16 half = load_as<u16x16>(lane);
    return type == FloatType::bf16 ? from_bf16(half) : from_f16(half);
}

// The first `count` lanes, rounded to `type`, to elements index ... of `to`.
QBERT_INLINE void store_floats(void* to, FloatType type, int64_t index, int64_t count, f32x16 v) {
    if (type == FloatType::f32) {
        float* at = static_cast<float*>(to) + index;
        if (count >= kLanes) return store(at, v);
        float lane[kLanes];
        store(lane, v);
        memcpy(at, lane, sizeof(float) * static_cast<size_t>(count));
        return;
    }
    const u16x16 half = type == FloatType::bf16 ? to_bf16(v) : to_f16(v);
    uint16_t lane[kLanes];
    memcpy(lane, &half, sizeof half);
    memcpy(static_cast<uint16_t*>(to) + index, lane, sizeof(uint16_t) * static_cast<size_t>(count < kLanes ? count : kLanes));
}

// ---- lanes ----

// a * b + c, rounded once. On a CPU without the instruction the C library computes it, exactly and slowly.
QBERT_INLINE f32x16 madd(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    const __m256 out[2] = {_mm256_fmadd_ps(x[0], y[0], z[0]), _mm256_fmadd_ps(x[1], y[1], z[1])};
    return load_as<f32x16>(out);
#else
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int kCount>
QBERT_INLINE f32x16 polynomial(const float (&c)[kCount], f32x16 x) {
    f32x16 sum = broadcast(c[kCount - 1]);
#pragma GCC unroll 16
    for (int i = kCount - 2; i >= 0; --i) sum = madd(sum, x, broadcast(c[i]));
    return sum;
}

QBERT_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }
// As `a > b ? a : b`: where one of them is NaN, b is taken.
#if defined(__AVX512F__)
QBERT_INLINE f32x16 max(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
QBERT_INLINE f32x16 min(f32x16 a, f32x16 b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }
#else
QBERT_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
QBERT_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
#endif
QBERT_INLINE f32x16 abs(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }

QBERT_INLINE float sum_lanes(f32x16 v) {
    float lane[16];
    store(lane, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
}

QBERT_INLINE float max_lanes(f32x16 v) {
    float lane[16];
    store(lane, v);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    }
    return lane[0];
}

// Nearest integer, ties to even, of values below 2^22 in magnitude: the sum has no bits left for a fraction.
QBERT_INLINE f32x16 round_even(f32x16 v) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
    return (v + kMagic) - kMagic;
}

// As round_even, to int32 lanes; NaN gives an unspecified lane.
QBERT_INLINE i32x16 round_to_int(f32x16 v) {
    constexpr float kMagic = 12582912.0f;
    return (i32x16)(v + kMagic) - 0x4b400000;  // the bits of kMagic
}

// The first `count` lanes rounded to int8 codes -127 ... 127; NaN becomes 0: the residual stream, not this, carries it.
QBERT_INLINE void store_static_codes(int8_t* to, int64_t count, f32x16 v) {
    v = (i32x16)(v == v) ? v : f32x16{};
    const i32x16 code = round_to_int(max(min(v, broadcast(127.0f)), broadcast(-127.0f)));
    if (count >= kLanes) return store_codes(to, code);
    int8_t lane[kLanes];
    store_codes(lane, code);
    memcpy(to, lane, static_cast<size_t>(count));
}

// ---- functions ----

constexpr float kExp[8] = {1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};

// e^v for v <= 0 (and up to 88), relative error about 1e-7; below -87 it is 0, NaN stays NaN.
QBERT_INLINE f32x16 exp(f32x16 v) {
    const f32x16 scaled = v * 1.44269504f, n = round_even(scaled);  // v = n ln 2 + r, |r| <= ln 2 / 2
    const f32x16 r = madd(n, broadcast(2.12194440e-4f), madd(n, broadcast(-0.693359375f), v));  // ln 2 in two parts
    const f32x16 power = (f32x16)((round_to_int(scaled) + 127) << 23);
    const f32x16 result = polynomial(kExp, r) * power;
    return v < -87.0f ? f32x16{} : result;
}

constexpr float kGeluAbove[6] = {0.398942235f, 0.0338525307f, 0.00467725338f, 1.68824518e-4f, 6.35211221e-6f, 2.27495037e-8f};
constexpr float kGeluBelow[6] = {1.0f, 0.251521629f, 0.0286458049f, 0.00188443813f, 7.36471486e-5f, 1.19750761e-6f};

// Exact GELU: x Phi(x), Phi(x) - 1/2 = x P(x^2) / Q(x^2), our own minimax fit on |x| <= 5.5 (absolute error 7e-9), beyond which
// it is 1/2 in float32. The error is below 2e-7 |x|; minus infinity gives NaN, as in torch.
QBERT_INLINE f32x16 gelu(f32x16 x) {
    const f32x16 inside = max(min(x, broadcast(5.5f)), broadcast(-5.5f)), square = inside * inside;
    const f32x16 half_erf = inside * polynomial(kGeluAbove, square) / polynomial(kGeluBelow, square);
    return madd(x, half_erf, x * 0.5f);
}

}  // namespace QBERT_ISA
}  // namespace qbert
