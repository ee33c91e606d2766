// Packed weights to int8 panels: look-ups of 64 codes at a time, by vpermb, vpshufb or plain loops.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

typedef Lanes<uint8_t> u8x64;
typedef Lanes<int8_t> i8x64;
typedef Lanes<uint16_t> u16x32;

// Sixteen int8 to look up; an index counts modulo 16, so a table of 8 stands there twice.
struct Table {
    u8x64 value;
};

QBERT_INLINE Table table_of(const int8_t* values, int count) {
    uint8_t repeated[64];
    for (int i = 0; i < 64; ++i) repeated[i] = static_cast<uint8_t>(values[i % count]);
    return {load_as<u8x64>(repeated)};
}

QBERT_INLINE u8x64 look_up(Table table, u8x64 index) {
#if defined(__AVX512VBMI__)
    return (u8x64)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)index, (__m512i)table.value);  // modulo 64
#elif defined(__AVX2__)
    const u8x64 low = index & 15;
    for (int i = 0; i < 2; ++i) index.part[i] = (u8x64::Register)_mm256_shuffle_epi8((__m256i)table.value.part[0], (__m256i)low.part[i]);
    return index;
#else
    for (int i = 0; i < 64; ++i) index[i] = table.value[index[i] & 15];
    return index;
#endif
}

// Bits of the neighbouring byte come in from above; look_up and masks ignore them.
QBERT_INLINE u8x64 shift_right(u8x64 v, int bits) { return (u8x64)((u16x32)v >> bits); }

// The sums row of a panel: for each lane, the sum over all input channels.
QBERT_INLINE void sum_lanes_of_panel(int8_t* panel, int64_t quads) {
    i32x16 sum{};
    for (int64_t r = 0; r < quads; ++r) {
        const i32x16 words = load_as<i32x16>(panel + r * 64);
        sum += (words << 24 >> 24) + (words << 16 >> 24) + (words << 8 >> 24) + (words >> 24);
    }
    store_as(panel + quads * 64, sum);
}

QBERT_INLINE void expand_dict4(const uint8_t* from, Table table, int64_t quads, int8_t* to) {
    for (int64_t r = 0; r < quads / 2; ++r) {
        const u8x64 codes = load_as<u8x64>(from + r * 64);
        const u8x64 low = look_up(table, codes & 15), high = look_up(table, shift_right(codes, 4) & 15);
        store_as(to + r * 128, low);
        store_as(to + r * 128 + 64, high);
    }
}

QBERT_INLINE void expand_dict3(const uint8_t* from, Table table, int64_t quads, int8_t* to) {
    for (int64_t r = 0; r < quads / 8; ++r) {
        const u8x64 top = load_as<u8x64>(from + r * 192 + 128);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const u8x64 low = load_as<u8x64>(from + r * 192 + (j / 4) * 64);
            const u8x64 bit2 = j < 2 ? (u8x64)((u16x32)top << (2 - j)) : shift_right(top, j - 2);
            const u8x64 value = look_up(table, (shift_right(low, 2 * (j % 4)) & 3) | (bit2 & 4));
            store_as(to + r * 512 + j * 64, value);
        }
    }
}

// code * scale of its group; |code| * scale <= 127, so two products side by side in 16 bits do not touch.
QBERT_INLINE void expand_int4(const uint8_t* from, const uint8_t* group_scale, int64_t lanes, int64_t groups, int64_t k, int64_t quads,
                              int8_t* to) {
    static const int8_t kMagnitude[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1};
    const Table magnitude = table_of(kMagnitude, 16);
    const int64_t rows_per_group = k / groups / 8;
    for (int64_t group = 0; group < groups; ++group) {
        uint32_t pair[16] = {};
        for (int64_t lane = 0; lane < lanes; ++lane) pair[lane] = group_scale[lane * groups + group] * 0x00010001u;
        const u16x32 scale = load_as<u16x32>(pair);
        const int64_t stop = group + 1 == groups ? quads / 2 : (group + 1) * rows_per_group;
        for (int64_t r = group * rows_per_group; r < stop; ++r) {
            const u8x64 codes = load_as<u8x64>(from + r * 64);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const u8x64 code = (half ? shift_right(codes, 4) : codes) & 15;
                const i8x64 product = (i8x64)((u16x32)look_up(magnitude, code) * scale);
                const i8x64 value = select(code > 7, -product, product);
                store_as(to + r * 128 + half * 64, value);
            }
        }
    }
}

// Rows of int8 (n, k), as an embedding's table lies, to a panel.
QBERT_INLINE void expand_rows(const int8_t* from, int64_t lanes, int64_t k, int64_t quads, int8_t* to) {
    memset(to, 0, static_cast<size_t>(quads * 64));
    for (int64_t lane = 0; lane < lanes; ++lane) {
        const int8_t* row = from + lane * k;
        for (int64_t r = 0; r < k / 4; ++r) memcpy(to + r * 64 + lane * 4, row + r * 4, 4);
        if (k % 4) memcpy(to + k / 4 * 64 + lane * 4, row + k / 4 * 4, static_cast<size_t>(k % 4));
    }
}

// Lanes of a panel that belong to different matrices look up in different tables: rare, so one lane's bytes at a time.
static void expand_stacked_lane(const uint8_t* from, const int8_t* codebook, bool three_bits, int64_t quads, int64_t lane, int8_t* to) {
    for (int64_t r = 0; r < quads; ++r) {
        for (int64_t at = lane * 4; at < lane * 4 + 4; ++at) {
            int code;
            if (three_bits) {
                const uint8_t* row = from + r / 8 * 192;
                const int j = static_cast<int>(r % 8);
                code = ((row[j / 4 * 64 + at] >> (2 * (j % 4))) & 3) | ((row[128 + at] >> j) & 1) << 2;
            } else {
                code = (from[r / 2 * 64 + at] >> (4 * (r % 2))) & 15;
            }
            to[r * 64 + at] = codebook[code];
        }
    }
}

static void expand_dictionary(const Weight& w, int64_t panel, int64_t quads, int8_t* to) {
    const bool three_bits = w.format == WeightFormat::dict3_panels;
    const int entries = three_bits ? 8 : 16;
    const int64_t first = panel * kPanelLanes, last = first + kPanelLanes < w.n ? first + kPanelLanes - 1 : w.n - 1;
    const int64_t first_matrix = first * w.matrices / w.n, last_matrix = last * w.matrices / w.n;
    const uint8_t* from = static_cast<const uint8_t*>(w.codes) + panel * (three_bits ? quads / 8 * 192 : quads / 2 * 64);
    const int8_t* codebook = static_cast<const int8_t*>(w.codebook);
    const Table table = table_of(codebook + first_matrix * entries, entries);
    if (three_bits) {
        expand_dict3(from, table, quads, to);
    } else {
        expand_dict4(from, table, quads, to);
    }
    for (int64_t lane = 0; first_matrix != last_matrix && lane <= last - first; ++lane) {
        const int64_t matrix = (first + lane) * w.matrices / w.n;
        expand_stacked_lane(from, codebook + matrix * entries, three_bits, quads, lane, to);
    }
}

// Panels first ... first + count - 1 of a weight in any format but int8 panels, with their sums rows, to `to`.
static void expand_panels(const Weight& w, int64_t first, int64_t count, int64_t quads, int8_t* to) {
    for (int64_t panel = first; panel < first + count; ++panel, to += (quads + 1) * 64) {
        const int64_t channel = panel * kPanelLanes;
        const int64_t lanes = w.n - channel < kPanelLanes ? w.n - channel : kPanelLanes;
        if (w.format == WeightFormat::int8_rows) {
            expand_rows(static_cast<const int8_t*>(w.codes) + channel * w.k, lanes, w.k, quads, to);
        } else if (w.format == WeightFormat::int4_panels) {
            const uint8_t* from = static_cast<const uint8_t*>(w.codes) + panel * (quads / 2) * 64;
            const uint8_t* group_scale = static_cast<const uint8_t*>(w.group_scale) + channel * w.groups;
            expand_int4(from, group_scale, lanes, w.groups, w.k, quads, to);
        } else {
            expand_dictionary(w, panel, quads, to);
        }
        sum_lanes_of_panel(to, quads);
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
