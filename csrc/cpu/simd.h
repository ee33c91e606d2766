// Sixteen-lane float arithmetic, written once over the compiler's vector types and compiled for every instruction set.
//
// Every function is a fixed sequence of IEEE operations, fused only where it says madd, and sums over lanes follow one fixed tree,
// so that all instruction sets give the same bits. Included by the kernels_*.cpp files only, each of which is compiled with
// its own flags; hence everything here is static, and nothing here may include a C++ standard library header (the linker
// keeps one copy of an inline function for the whole module, which could be the AVX-512 one).
#pragma once

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kLanes = 16;

// ---- memory ----

template <class Vector, class Element>
QBERT_INLINE Vector load_as(const Element* from) {
    Vector v;
    if constexpr (IsLanes<Vector>::value) {
        const auto* at = reinterpret_cast<const typename Vector::Anywhere*>(from);
        for (int i = 0; i < kRegisters; ++i) v.part[i] = at[i];
    } else {
        memcpy(&v, from, sizeof v);
    }
    return v;
}

template <class Element, class Vector>
QBERT_INLINE void store_as(Element* to, Vector v) {
    auto* at = reinterpret_cast<typename Vector::Anywhere*>(to);
    for (int i = 0; i < kRegisters; ++i) at[i] = v.part[i];
}

QBERT_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }
QBERT_INLINE i32x16 load(const int32_t* from) { return load_as<i32x16>(from); }
QBERT_INLINE void store(float* to, f32x16 v) { store_as(to, v); }
QBERT_INLINE void store(int32_t* to, i32x16 v) { store_as(to, v); }

QBERT_INLINE f32x16 broadcast(float x) { return f32x16::all(x); }
QBERT_INLINE i32x16 broadcast(int32_t x) { return i32x16::all(x); }

QBERT_INLINE f32x16 to_float(i32x16 v) {
    f32x16 out;
    for (int i = 0; i < kRegisters; ++i) out.part[i] = __builtin_convertvector(v.part[i], f32x16::Register);
    return out;
}

// Sixteen int8, as int32 lanes.
QBERT_INLINE i32x16 load_codes(const int8_t* from) {
    i32x16 v;
#if defined(__AVX512F__)
    v.part[0] = (i32x16::Register)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
        v.part[i] = (i32x16::Register)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
    }
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i words[2] = {_mm_unpacklo_epi8(bytes, bytes), _mm_unpackhi_epi8(bytes, bytes)};
    for (int i = 0; i < 4; ++i) {
        const __m128i word = words[i / 2], twice = i % 2 ? _mm_unpackhi_epi16(word, word) : _mm_unpacklo_epi16(word, word);
        v.part[i] = (i32x16::Register)_mm_srai_epi32(twice, 24);
    }
#else
    int32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = from[i];
    v = load(lane);
#endif
    return v;
}

// The lower 8 bits of each lane.
QBERT_INLINE void store_codes(int8_t* to, i32x16 v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v.part[0]));
#elif defined(__AVX2__)
    const i32x16 low = v & 0xff;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low.part[0], (__m256i)low.part[1]), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#elif defined(__SSE2__)
    const i32x16 low = v << 24 >> 24;
    const __m128i words[2] = {_mm_packs_epi32((__m128i)low.part[0], (__m128i)low.part[1]),
                              _mm_packs_epi32((__m128i)low.part[2], (__m128i)low.part[3])};
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words[0], words[1]));
#else
    int32_t lane[kLanes];
    store(lane, v);
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(lane[i]);
#endif
}

// The lower 8 bits of each lane.
QBERT_INLINE void store_bytes(uint8_t* to, i32x16 v) { store_codes(reinterpret_cast<int8_t*>(to), v); }

// Sixteen uint16, as uint32 lanes.
QBERT_INLINE u32x16 load_halves(const uint16_t* from) {
    u32x16 v;
#if defined(__AVX512F__)
    v.part[0] = (u32x16::Register)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
        v.part[i] = (u32x16::Register)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i)));
    }
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) {
        const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 4 * i));
        v.part[i] = (u32x16::Register)_mm_unpacklo_epi16(words, _mm_setzero_si128());
    }
#else
    uint32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = from[i];
    v = load_as<u32x16>(lane);
#endif
    return v;
}

// The lower 16 bits of each lane.
QBERT_INLINE void store_halves(uint16_t* to, u32x16 v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v.part[0]));
#elif defined(__AVX2__)
    const u32x16 low = v & 0xffff;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low.part[0], (__m256i)low.part[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
#elif defined(__SSE2__)
    const i32x16 low = (i32x16)v << 16 >> 16;
    for (int i = 0; i < 2; ++i) {
        const __m128i words = _mm_packs_epi32((__m128i)low.part[2 * i], (__m128i)low.part[2 * i + 1]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), words);
    }
#else
    uint32_t lane[kLanes];
    store_as(lane, v);
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(lane[i]);
#endif
}

// ---- half types, in the lower 16 bits of each lane ----

QBERT_INLINE f32x16 from_bf16(u32x16 half) { return (f32x16)(half << 16); }

// Nearest, ties to even; NaN stays NaN.
QBERT_INLINE u32x16 to_bf16(f32x16 v) {
    const u32x16 bits = (u32x16)v;
    const u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return select(v == v, rounded, bits | 0x400000) >> 16;
}

#if defined(__F16C__)
QBERT_INLINE f32x16 load_f16(const uint16_t* from) {
    float lane[kLanes];
    for (int i = 0; i < 2; ++i) {
        _mm256_storeu_ps(lane + 8 * i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i))));
    }
    return load(lane);
}

QBERT_INLINE void store_f16(uint16_t* to, f32x16 v) {
    float lane[kLanes];
    store(lane, v);
    for (int i = 0; i < 2; ++i) {
        const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(lane + 8 * i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), half);
    }
}
#else
QBERT_INLINE f32x16 load_f16(const uint16_t* from) {
    const u32x16 wide = load_halves(from);
    const u32x16 sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
    // Exponents are moved by a product, which makes subnormal halves normal floats on the way.
    const f32x16 scaled = (f32x16)(magnitude << 13) * 0x1p112f;
    const u32x16 special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
    const u32x16 quiet = select(magnitude > 0x7c00, special | 0x400000, special);
    return (f32x16)(sign | select(magnitude >= 0x7c00, quiet, (u32x16)scaled));
}

QBERT_INLINE void store_f16(uint16_t* to, f32x16 v) {
    const u32x16 bits = (u32x16)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const u32x16 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;  // rounds to even
    // Adding one half, whose last bit weighs 2^-24, leaves the subnormal half's bits at the bottom, rounded to even.
    const u32x16 subnormal = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000;
    u32x16 half = select(magnitude < 0x38800000, subnormal, normal);
    half = select(magnitude >= 0x477ff000, u32x16::all(0x7c00), half);  // 65520 and above round to infinity
    half = select(magnitude > 0x7f800000, ((magnitude >> 13) & 0x3ff) | 0x7e00, half);
    store_halves(to, half | sign);
}
#endif

// Lanes 0 ... count - 1 of float values of any type at `from`; the others are 0. Elements, not bytes, are counted.
QBERT_INLINE f32x16 load_floats(const void* from, FloatType type, int64_t index, int64_t count) {
    if (type == FloatType::f32) {
        const float* at = static_cast<const float*>(from) + index;
        if (count >= kLanes) return load(at);
        float lane[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) lane[i] = at[i];
        return load(lane);
    }
    const uint16_t* at = static_cast<const uint16_t*>(from) + index;
    uint16_t lane[kLanes] = {};
    if (count < kLanes) {
        for (int64_t i = 0; i < count; ++i) lane[i] = at[i];
        at = lane;
    }
    return type == FloatType::bf16 ? from_bf16(load_halves(at)) : load_f16(at);
}

// The first `count` lanes, rounded to `type`, to elements index ... of `to`.
QBERT_INLINE void store_floats(void* to, FloatType type, int64_t index, int64_t count, f32x16 v) {
    if (type == FloatType::f32) {
        float* at = static_cast<float*>(to) + index;
        if (count >= kLanes) return store(at, v);
        float lane[kLanes];
        store(lane, v);
        for (int64_t i = 0; i < count; ++i) at[i] = lane[i];
        return;
    }
    uint16_t lane[kLanes], *at = static_cast<uint16_t*>(to) + index, *whole = count >= kLanes ? at : lane;
    if (type == FloatType::bf16) {
        store_halves(whole, to_bf16(v));
    } else {
        store_f16(whole, v);
    }
    for (int64_t i = 0; count < kLanes && i < count; ++i) at[i] = lane[i];
}

// ---- lanes ----

#if defined(__SSE2__) && !defined(__FMA__)

typedef double double2 __attribute__((vector_size(16)));
typedef int64_t bits2 __attribute__((vector_size(16)));

// a * b + c such that rounding the result to float gives what one rounding of the exact value would have given: the product of
// two floats is exact in double, and a sum that is not is taken to the neighbour whose last bit is odd.
QBERT_INLINE double2 madd_to_odd(double2 a, double2 b, double2 c) {
    const double2 product = a * b, sum = product + c, part = sum - product;
    const double2 error = (product - (sum - part)) + (c - part);
    const bits2 up = error > 0.0, inexact = up | (error < 0.0), outwards = up ^ (sum < 0.0);
    const bits2 even = ((bits2)sum & 1) - 1;
    return (double2)((bits2)sum + (inexact & even & (-1 - outwards - outwards)));
}

#endif

// a * b + c, rounded once.
QBERT_INLINE f32x16::Register madd(f32x16::Register a, f32x16::Register b, f32x16::Register c) {
    typedef f32x16::Register Register;
#if defined(__AVX512F__)
    return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
    const auto low = [](Register v) { return (double2)_mm_cvtps_pd((__m128)v); };
    const auto high = [](Register v) { return (double2)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v)); };
    const __m128 first = _mm_cvtpd_ps((__m128d)madd_to_odd(low(a), low(b), low(c)));
    return (Register)_mm_movelh_ps(first, _mm_cvtpd_ps((__m128d)madd_to_odd(high(a), high(b), high(c))));
#else
    for (int i = 0; i < kLanes / kRegisters; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

QBERT_INLINE f32x16 madd(f32x16 a, f32x16 b, f32x16 c) {
    for (int i = 0; i < kRegisters; ++i) c.part[i] = madd(a.part[i], b.part[i], c.part[i]);
    return c;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int kCount>
QBERT_INLINE f32x16 polynomial(const float (&c)[kCount], f32x16 x) {
    f32x16 sum = broadcast(c[kCount - 1]);
#pragma GCC unroll 16
    for (int i = kCount - 2; i >= 0; --i) sum = madd(sum, x, broadcast(c[i]));
    return sum;
}

// As `a > b ? a : b`: where one of them is NaN, b is taken.
QBERT_INLINE f32x16 max(f32x16 a, f32x16 b) {
    for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
        a.part[i] = (f32x16::Register)_mm512_maskz_max_ps(0xffff, (__m512)a.part[i], (__m512)b.part[i]);
#elif defined(__AVX2__)
        a.part[i] = (f32x16::Register)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
#elif defined(__SSE2__)
        a.part[i] = (f32x16::Register)_mm_max_ps((__m128)a.part[i], (__m128)b.part[i]);
#else
        a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
    }
    return a;
}
// As `a < b ? a : b`.
QBERT_INLINE f32x16 min(f32x16 a, f32x16 b) {
    for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
        a.part[i] = (f32x16::Register)_mm512_maskz_min_ps(0xffff, (__m512)a.part[i], (__m512)b.part[i]);
#elif defined(__AVX2__)
        a.part[i] = (f32x16::Register)_mm256_min_ps((__m256)a.part[i], (__m256)b.part[i]);
#elif defined(__SSE2__)
        a.part[i] = (f32x16::Register)_mm_min_ps((__m128)a.part[i], (__m128)b.part[i]);
#else
        a.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
#endif
    }
    return a;
}
QBERT_INLINE i32x16 max(i32x16 a, i32x16 b) {
    for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
        a.part[i] = (i32x16::Register)_mm512_maskz_max_epi32(0xffff, (__m512i)a.part[i], (__m512i)b.part[i]);
#elif defined(__AVX2__)
        a.part[i] = (i32x16::Register)_mm256_max_epi32((__m256i)a.part[i], (__m256i)b.part[i]);
#else
        a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
    }
    return a;
}

// Sixteen lanes to one, by a tree that adds, or takes the larger, of lanes i and i + 8, then i + 4, i + 2, i + 1.
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

template <class Quarter, class Element, class Combine>
QBERT_INLINE Element reduce_lanes(Lanes<Element> v, Combine combine) {
    Quarter q[4];
    memcpy(q, v.part, sizeof q);
    Quarter four = combine(combine(q[0], q[2]), combine(q[1], q[3]));
    four = combine(four, __builtin_shuffle(four, i32x4{2, 3, 0, 1}));
    four = combine(four, __builtin_shuffle(four, i32x4{1, 0, 3, 2}));
    return four[0];
}

QBERT_INLINE float sum_lanes(f32x16 v) {
    return reduce_lanes<f32x4>(v, [](f32x4 a, f32x4 b) __attribute__((always_inline)) { return a + b; });
}

// Without NaN.
QBERT_INLINE float max_lanes(f32x16 v) {
    return reduce_lanes<f32x4>(v, [](f32x4 a, f32x4 b) __attribute__((always_inline)) { return a > b ? a : b; });
}

QBERT_INLINE int32_t max_lanes(i32x16 v) {
    return reduce_lanes<i32x4>(v, [](i32x4 a, i32x4 b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// 16 x 16 floats, in place, in blocks of 4 x 4.
QBERT_INLINE void transpose(f32x16* row) {
    alignas(64) float from[16][16], to[16][16];
    for (int i = 0; i < 16; ++i) store(from[i], row[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4) {
            f32x4 v[4];
            for (int r = 0; r < 4; ++r) memcpy(&v[r], &from[i + r][j], sizeof v[r]);
            const i32x4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
            const f32x4 a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[0], v[1], high);
            const f32x4 c = __builtin_shuffle(v[2], v[3], low), d = __builtin_shuffle(v[2], v[3], high);
            const f32x4 out[4] = {__builtin_shuffle(a, c, first), __builtin_shuffle(a, c, second),
                                  __builtin_shuffle(b, d, first), __builtin_shuffle(b, d, second)};
            for (int r = 0; r < 4; ++r) memcpy(&to[j + r][i], &out[r], sizeof out[r]);
        }
    }
    for (int i = 0; i < 16; ++i) row[i] = load(to[i]);
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a small number added to it is rounded to an integer, in its lowest bits

// Nearest integer, ties to even, of values below 2^22 in magnitude: the sum has no bits left for a fraction.
QBERT_INLINE f32x16 round_even(f32x16 v) {
    return (v + kRounder) - kRounder;
}

// As round_even, to int32 lanes; NaN gives an unspecified lane.
QBERT_INLINE i32x16 round_to_int(f32x16 v) {
    return (i32x16)((u32x16)(v + kRounder) - 0x4b400000);  // the bits of kRounder
}

// The first `count` lanes rounded, plus `zero`, as int8 codes -127 ... 127; NaN is as 0: the residual stream, not this, carries it.
QBERT_INLINE void store_static_codes(int8_t* to, int64_t count, f32x16 v, int zero = 0) {
    const float shift = static_cast<float>(zero);
    const f32x16 inside = max(min(select(v == v, v, f32x16{}), broadcast(127.0f - shift)), broadcast(-127.0f - shift));
    const i32x16 code = (i32x16)(inside + kRounder) + zero;  // as round_to_int, whose last step changes other bytes only
    if (count >= kLanes) return store_codes(to, code);
    int8_t lane[kLanes];
    store_codes(lane, code);
    memcpy(to, lane, static_cast<size_t>(count));
}

}  // namespace QBERT_ISA
}  // namespace qbert
