// Codes of a panel as floats, one input channel of as many output channels as a register holds at a time.
//
// A panel has 16 output channels, one in each 32-bit word of its rows; registers of 8 or 4 floats take it in slices. A decoder
// reads rows: as many bytes as hold eight input channels, or 32 of three bits. Step s of part i of the kParts of a row gives
// channel i + kParts * s of it: 3-bit codes come four apart, as one byte of a panel holds them. Loops over steps must be
// unrolled, so that s is a constant and what neighbouring steps share is computed once.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kSlices = kRegisters;
constexpr int kSliceLanes = kPanelLanes / kSlices;
constexpr int kPartSteps = 8;

typedef f32x16::Register SliceFloat;
typedef i32x16::Register SliceInt;
typedef u32x16::Register SliceWords;

QBERT_INLINE SliceWords load_words(const uint8_t* from) { return *reinterpret_cast<const u32x16::Anywhere*>(from); }
QBERT_INLINE SliceFloat load_slice(const float* from) { return *reinterpret_cast<const f32x16::Anywhere*>(from); }
QBERT_INLINE void store_slice(float* to, SliceFloat v) { *reinterpret_cast<f32x16::Anywhere*>(to) = v; }

QBERT_INLINE SliceFloat broadcast_slice(float x) { return x - SliceFloat{}; }  // not +, which would make 0 of -0

QBERT_INLINE SliceFloat to_float_slice(SliceInt v) { return __builtin_convertvector(v, SliceFloat); }

// ---- look-ups in a table of 16 floats ----

#if defined(__AVX512F__)

// vpermps ignores the bits of an index above the fourth, so a code needs no mask.
struct Table16 {
    SliceFloat entries;
};
QBERT_INLINE Table16 table16_of(const float* values) { return {load_slice(values)}; }
QBERT_INLINE SliceFloat look_up(const Table16& table, SliceWords index) {
    return (SliceFloat)_mm512_permutexvar_ps((__m512i)index, (__m512)table.entries);
}

#elif defined(__AVX2__)

// vpermps looks at three bits of an index; the fourth, moved to the sign, chooses between two tables.
struct Table16 {
    SliceFloat low, high;
};
QBERT_INLINE Table16 table16_of(const float* values) { return {load_slice(values), load_slice(values + 8)}; }
QBERT_INLINE SliceFloat look_up8(SliceFloat table, SliceWords index) {
    return (SliceFloat)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
QBERT_INLINE SliceFloat look_up(const Table16& table, SliceWords index) {
    const __m256 low = (__m256)look_up8(table.low, index), high = (__m256)look_up8(table.high, index);
    return (SliceFloat)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}

#else

struct Table16 {
    float entries[16];
};
QBERT_INLINE Table16 table16_of(const float* values) {
    Table16 table;
    memcpy(table.entries, values, sizeof table.entries);
    return table;
}
QBERT_INLINE SliceFloat look_up(const Table16& table, SliceWords index) {
    return SliceFloat{table.entries[index[0] & 15], table.entries[index[1] & 15], table.entries[index[2] & 15],
                      table.entries[index[3] & 15]};
}

#endif

// ---- int8: byte i of a word is input channel i of its half of the row ----

struct DecodeInt8 {
    static constexpr int kRowBytes = 128, kParts = 1;
    struct Row {
        SliceWords words[2];
    };

    static DecodeInt8 of(const Weight&) { return {}; }
    QBERT_INLINE Row load_row(const uint8_t* row, int /*part*/) { return {{load_words(row), load_words(row + 64)}}; }
    QBERT_INLINE SliceFloat step(const DecodeInt8&, const Row& row, int s) {
        return to_float_slice((SliceInt)row.words[s / 4] << (24 - s % 4 * 8) >> 24);
    }
};

// ---- 4 bits: low nibbles of the four bytes of a word, then high nibbles ----

struct NibbleRow {
    SliceWords words;
};

constexpr int nibble_shift(int s) { return s % 4 * 8 + s / 4 * 4; }

struct DecodeDict4 {
    static constexpr int kRowBytes = 64, kParts = 1;
    Table16 table;

    static DecodeDict4 of(const Weight& w) { return {table16_of(static_cast<const float*>(w.codebook))}; }
    QBERT_INLINE NibbleRow load_row(const uint8_t* row, int /*part*/) { return {load_words(row)}; }
    QBERT_INLINE SliceFloat step(const DecodeDict4& d, const NibbleRow& row, int s) {
        return look_up(d.table, row.words >> nibble_shift(s));
    }
};

// Two's complement.
struct DecodeInt4 {
    static constexpr int kRowBytes = 64, kParts = 1;
#if defined(__AVX512F__)
    Table16 table;

    static DecodeInt4 of(const Weight&) {
        static const float kValues[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
        return {table16_of(kValues)};
    }
    QBERT_INLINE SliceFloat step(const DecodeInt4& d, const NibbleRow& row, int s) {
        return look_up(d.table, row.words >> nibble_shift(s));
    }
#else
    static DecodeInt4 of(const Weight&) { return {}; }
    QBERT_INLINE SliceFloat step(const DecodeInt4&, const NibbleRow& row, int s) {
        return to_float_slice((SliceInt)row.words << (28 - nibble_shift(s)) >> 28);
    }
#endif
    QBERT_INLINE NibbleRow load_row(const uint8_t* row, int /*part*/) { return {load_words(row)}; }
};

// ---- 3 bits: two planes of low bits, one of high bits; part i is byte i of each word ----

struct DecodeDict3 {
    static constexpr int kRowBytes = 192, kParts = 4;
    struct Row {
        SliceWords low[2], high;
    };

    QBERT_INLINE Row load_row(const uint8_t* row, int part) {
        const int shift = 8 * part;
        return {{load_words(row) >> shift, load_words(row + 64) >> shift}, load_words(row + 128) >> shift};
    }

#if defined(__AVX512F__)
    // An index has four bits, a code three. Codes of even steps have their low bits at 0 and 1 and their high bit at 2, those
    // of odd steps have them at 2 and 3 and at 1: with a table for each, neighbouring steps share their shifts.
    Table16 even, odd;

    static DecodeDict3 of(const Weight& w) {
        const float* codebook = static_cast<const float*>(w.codebook);
        float even_values[16], odd_values[16];
        for (int i = 0; i < 16; ++i) {
            even_values[i] = codebook[i & 7];
            odd_values[i] = codebook[(i >> 2) | ((i & 2) << 1)];
        }
        return {table16_of(even_values), table16_of(odd_values)};
    }
    QBERT_INLINE SliceFloat step(const DecodeDict3& d, const Row& row, int s) {
        const SliceWords low = s % 4 < 2 ? row.low[s / 4] : row.low[s / 4] >> 4;
        const SliceWords high = s == 0 ? row.high << 2 : row.high >> ((s + 1) / 2 * 2 - 2);
        constexpr int kWhereThird = 0xe4;  // bits of the first operand where the third has them, else of the second
        const __m512i mask = _mm512_set1_epi32(s % 2 ? 12 : 3);
        const SliceWords index = (SliceWords)_mm512_ternarylogic_epi32((__m512i)low, (__m512i)high, mask, kWhereThird);
        return look_up(s % 2 ? d.odd : d.even, index);
    }
#else
    Table16 table;

    static DecodeDict3 of(const Weight& w) {
        const float* codebook = static_cast<const float*>(w.codebook);
        float twice[16];
        for (int i = 0; i < 16; ++i) twice[i] = codebook[i & 7];
        return {table16_of(twice)};
    }
    QBERT_INLINE SliceFloat step(const DecodeDict3& d, const Row& row, int s) {
        const SliceWords high = s < 2 ? row.high << (2 - s) : row.high >> (s - 2);
        const SliceWords index = ((row.low[s / 4] >> (2 * (s % 4))) & 3) | (high & 4);
#if defined(__AVX2__)
        return look_up8(d.table.low, index);
#else
        return look_up(d.table, index);
#endif
    }
#endif
};

}  // namespace QBERT_ISA
}  // namespace qbert
