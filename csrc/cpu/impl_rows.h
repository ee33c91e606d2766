// Operations on rows of floats: per-token quantization, residual plus LayerNorm, look-ups in embedding tables.
//
// All of it is float32: rows of other types are widened to scratch rows first, which stay in the cache. A scratch row has room
// for k floats rounded up to whole vectors, so that only what the caller passed needs care at its end.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr float kCodeMax = 127.0f;
constexpr float kMinAbsmax = 0x1p-100f;  // MIN_ABSMAX of qbert/weight/codec.py
constexpr int32_t kInfinityBits = 0x7f800000;

alignas(64) constexpr int32_t kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// -1 in the first `count` lanes, 0 in the others.
QBERT_INLINE i32x16 first_lanes(int64_t count) { return load(kLaneNumbers) < broadcast(static_cast<int32_t>(count)); }

// Calls use(at, count, part) for vectors that begin at element `at`. Only the last `count` may be below 16; `part` counts mod
// kParts and says which of several sums a vector belongs to, so that no addition waits for the one before. Both are constants
// once this is inlined.
constexpr int kParts = 4;

template <class Use>
QBERT_INLINE void for_vectors(int64_t k, Use use) {
    int64_t at = 0;
    for (; at + kParts * kLanes <= k; at += kParts * kLanes) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) use(at + part * kLanes, int64_t{kLanes}, part);
    }
#pragma GCC unroll 4
    for (int part = 0; part + 1 < kParts; ++part) {
        if (at + kLanes > k) break;
        use(at, int64_t{kLanes}, part);
        at += kLanes;
    }
    if (at < k) use(at, k - at, kParts - 1);
}

// `count` floats of a row that may end there; the other lanes are 0.
QBERT_INLINE f32x16 load_part(const float* from, int64_t count) { return load_floats(from, FloatType::f32, 0, count); }

QBERT_INLINE void store_part(float* to, int64_t count, f32x16 v) { store_floats(to, FloatType::f32, 0, count, v); }

// The row of k floats of any type at element `first`: itself if it is float32, else widened to `space`.
static const float* float_row(const void* data, FloatType type, int64_t first, int64_t k, float* space) {
    if (type == FloatType::f32) return static_cast<const float*>(data) + first;
    const uint16_t* from = static_cast<const uint16_t*>(data) + first;
    int64_t at = 0;
    if (type == FloatType::bf16) {
        for (; at + kLanes <= k; at += kLanes) store(space + at, load_floats(from, FloatType::bf16, at, kLanes));
    } else {
        for (; at + kLanes <= k; at += kLanes) store(space + at, load_floats(from, FloatType::f16, at, kLanes));
    }
    if (at < k) store(space + at, load_floats(from, type, at, k - at));
    return space;
}

// Rounds a row of k floats to elements first ... of `out`.
static void store_row(const float* row, int64_t k, void* out, FloatType type, int64_t first) {
    int64_t at = 0;
    if (type == FloatType::bf16) {
        for (; at + kLanes <= k; at += kLanes) store_floats(out, FloatType::bf16, first + at, kLanes, load(row + at));
    } else if (type == FloatType::f16) {
        for (; at + kLanes <= k; at += kLanes) store_floats(out, FloatType::f16, first + at, kLanes, load(row + at));
    } else {
        memcpy(static_cast<float*>(out) + first, row, sizeof(float) * static_cast<size_t>(k));
        return;
    }
    if (at < k) store_floats(out, type, first + at, k - at, load_part(row + at, k - at));
}

struct RowSum {
    f32x16 part[kParts] = {};

    float total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

// The largest magnitude. Magnitudes are compared as integers, which puts infinity above numbers, and NaN above infinity.
struct RowMax {
    i32x16 bits = {};

    inline __attribute__((always_inline)) void add(f32x16 v) { bits = max((i32x16)v & 0x7fffffff, bits); }

    int32_t total() const { return max_lanes(bits); }
};

// ---- quantization ----

// Codes and scale of a row whose largest magnitude has these bits: see codes_and_scales in qbert/ops/reference.py.
static void quantize_row(const float* x, int64_t k, int32_t absmax_bits, int8_t* codes, float* scale) {
    if (absmax_bits >= kInfinityBits) {
        memset(codes, 0, static_cast<size_t>(k));
        *scale = __builtin_nanf("");
        return;
    }
    float absmax;
    memcpy(&absmax, &absmax_bits, sizeof absmax);
    absmax = absmax < kMinAbsmax ? kMinAbsmax : absmax;
    const float inverse = kCodeMax / absmax;
    *scale = absmax / kCodeMax;
    for_vectors(k, [&](int64_t at, int64_t count, int) __attribute__((always_inline)) {
        const i32x16 code = round_to_int(load_part(x + at, count) * inverse);  // at most 127.00002: no need to clamp
        if (count == kLanes) return store_codes(codes + at, code);
        int8_t lane[kLanes];
        store_codes(lane, code);
        memcpy(codes + at, lane, static_cast<size_t>(count));
    });
}

static void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end, float* scratch) {
    for (int64_t t = begin; t < end; ++t) {
        const float* x = float_row(args.x, args.x_type, t * args.x_stride, args.k, scratch);
        RowMax absmax;
        for_vectors(args.k, [&](int64_t at, int64_t count, int) __attribute__((always_inline)) {
            absmax.add(load_part(x + at, count));
        });
        quantize_row(x, args.k, absmax.total(), args.codes + t * args.k, args.scale + t);
    }
}

// ---- norms ----

// What follows the sum of rows: gains, shifts, and where the results go.
struct NormArgs {
    int64_t k;
    const float* gamma;
    const float* beta;
    float eps;
    Keeps keeps;
    void* out;
    FloatType out_type;
    int8_t* codes;
    float* scale;
};

// LayerNorm of the scratch row `row`, whose sum is `sum`, to token t of the results: as floats, or there the row as it came.
//
// The mean is corrected by the mean of the differences from it: else a row of equal values, whose variance is eps alone, would
// show the rounding of the first mean a million times enlarged.
static void norm_row(const NormArgs& args, float* row, float sum, int64_t t) {
    const int64_t k = args.k, first = t * k;
    const float size = static_cast<float>(k), mean = sum / size;
    RowSum differences, squares;
    for_vectors(k, [&](int64_t at, int64_t count, int part) __attribute__((always_inline)) {
        f32x16 d = load(row + at) - mean;
        if (count < kLanes) d = select(first_lanes(count), d, f32x16{});
        differences.part[part] += d;
        squares.part[part] += d * d;
    });
    const float shift = differences.total() / size, variance = squares.total() / size - shift * shift;
    const float inverse = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + args.eps);
    if (args.keeps == Keeps::sum) store_row(row, k, args.out, args.out_type, first);
    const bool in_place = args.keeps == Keeps::norm && args.out_type == FloatType::f32;
    float* normed = in_place ? static_cast<float*>(args.out) + first : row;
    RowMax absmax;
    for_vectors(k, [&](int64_t at, int64_t count, int) __attribute__((always_inline)) {
        const f32x16 gamma = load_part(args.gamma + at, count), beta = load_part(args.beta + at, count);
        const f32x16 y = ((load(row + at) - mean) - shift) * inverse * gamma + beta;
        absmax.add(count < kLanes ? select(first_lanes(count), y, f32x16{}) : y);
        store_part(normed + at, count, y);
    });
    if (args.keeps == Keeps::norm && !in_place) store_row(row, k, args.out, args.out_type, first);
    quantize_row(normed, k, absmax.total(), args.codes + first, args.scale + t);
}

static void add_norm_rows(const AddNormArgs& args, int64_t begin, int64_t end, float* scratch) {
    const NormArgs norm{args.k, args.gamma, args.beta, args.eps, args.keeps, args.out, args.residual_type, args.codes, args.scale};
    float *row = scratch, *y_space = row + scratch_row_floats(args.k), *residual_space = y_space + scratch_row_floats(args.k);
    for (int64_t t = begin; t < end; ++t) {
        const float* y = float_row(args.y, args.y_type, t * args.k, args.k, y_space);
        const float* residual = float_row(args.residual, args.residual_type, t * args.k, args.k, residual_space);
        RowSum sum;
        for_vectors(args.k, [&](int64_t at, int64_t count, int part) __attribute__((always_inline)) {
            const f32x16 total = load_part(y + at, count) + load_part(residual + at, count);
            sum.part[part] += total;
            store(row + at, total);
        });
        norm_row(norm, row, sum.total(), t);
    }
}

// ---- tables ----

// Sixteen codes of 3 or 4 bits. Not by one memcpy of 6 bytes: the CPU could not forward its two stores to one load.
template <int kBits>
QBERT_INLINE uint64_t load_word(const uint8_t* stream) {
    uint32_t low;
    memcpy(&low, stream, sizeof low);
    if (kBits == 4) {
        uint32_t high;
        memcpy(&high, stream + 4, sizeof high);
        return low | static_cast<uint64_t>(high) << 32;
    }
    uint16_t high;
    memcpy(&high, stream + 4, sizeof high);
    return low | static_cast<uint64_t>(high) << 32;
}

// Sixteen codes of kBits bits, the first in the lowest bits of `word`.
template <int kBits>
QBERT_INLINE i32x16 unpack_word(uint64_t word) {
    const i32x16 lane = load(kLaneNumbers);
    const u32x16 low = u32x16{} + static_cast<uint32_t>(word), high = u32x16{} + static_cast<uint32_t>(word >> (8 * kBits));
    return (i32x16)(select(lane < broadcast(8), low, high) >> (u32x16)((lane & 7) * kBits)) & ((1 << kBits) - 1);
}

// Calls use(at, codes) for each sixteen codes of a row of the PLAIN bit stream; the last ones may be padding, which is 0.
template <int kBits, class Use>
QBERT_INLINE void for_codes(const uint8_t* stream, int64_t k, Use use) {
    constexpr int64_t kBytes = 2 * kBits;
    int64_t at = 0;
    for (; at + kLanes <= k; at += kLanes, stream += kBytes) {
        use(at, unpack_word<kBits>(load_word<kBits>(stream)));
    }
    if (at == k) return;
    uint64_t word = 0;
    memcpy(&word, stream, static_cast<size_t>(((k - at) * kBits + 7) / 8));
    use(at, unpack_word<kBits>(word));
}

QBERT_INLINE float bf16_to_float(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void load_int4_row(const Weight& table, int64_t id, float* row) {
    const int64_t width = (table.k + 1) / 2, size = table.k / table.groups;
    const uint8_t* stream = static_cast<const uint8_t*>(table.codes) + id * width;
    for_codes<4>(stream, table.k, [&](int64_t at, i32x16 code) __attribute__((always_inline)) {
        store(row + at, to_float((code ^ 8) - 8));
    });
    const uint16_t* scale = static_cast<const uint16_t*>(table.group_scale) + id * table.groups;
    for (int64_t group = 0; group < table.groups; ++group) {
        const float factor = bf16_to_float(scale[group]);
        for (int64_t i = group * size; i < (group + 1) * size; ++i) row[i] *= factor;
    }
}

template <int kBits>
static void load_dictionary_row(const Weight& table, int64_t id, float* row) {
    float codebook[kLanes] = {};
    memcpy(codebook, table.codebook, sizeof(float) << kBits);
    const int64_t width = (table.k * kBits + 7) / 8;
    const uint8_t* stream = static_cast<const uint8_t*>(table.codes) + id * width;
    for_codes<kBits>(stream, table.k, [&](int64_t at, i32x16 code) __attribute__((always_inline)) {
#if defined(__AVX512F__)
        _mm512_storeu_ps(row + at, _mm512_maskz_permutexvar_ps(0xffff, (__m512i)code, _mm512_loadu_ps(codebook)));
#else
        int32_t index[kLanes];
        store(index, code);
        for (int i = 0; i < kLanes; ++i) row[at + i] = codebook[index[i]];
#endif
    });
    const Outliers& outliers = table.outliers;
    for (int64_t entry = outliers.rowptr[id]; entry < outliers.rowptr[id + 1]; ++entry) {
        row[column_of(outliers, entry)] += outliers.delta[entry];
    }
}

static void load_int8_row(const Weight& table, int64_t id, float* row) {
    const int8_t* codes = static_cast<const int8_t*>(table.codes) + id * table.k;
    const float scale = table.scale[id];
    int64_t at = 0;
    for (; at + kLanes <= table.k; at += kLanes) store(row + at, to_float(load_codes(codes + at)) * scale);
    for (; at < table.k; ++at) row[at] = static_cast<float>(codes[at]) * scale;
}

// Row `id` as floats, exactly as table_rows of qbert/ops/reference.py gives it: in `space`, or where it is.
static const float* table_row(const Weight& table, int64_t id, float* space) {
    switch (table.format) {
        case WeightFormat::float_rows: return float_row(table.codes, table.float_type, id * table.k, table.k, space);
        case WeightFormat::int8_rows: load_int8_row(table, id, space); break;
        case WeightFormat::int4_rows: load_int4_row(table, id, space); break;
        case WeightFormat::dict4_rows: load_dictionary_row<4>(table, id, space); break;
        default: load_dictionary_row<3>(table, id, space); break;
    }
    return space;
}

static void look_up_rows(const LookUpArgs& args, int64_t begin, int64_t end, float* scratch) {
    const int64_t k = args.table.k;
    for (int64_t t = begin; t < end; ++t) {
        store_row(table_row(args.table, args.ids[t], scratch), k, args.out, args.out_type, t * k);
    }
}

static void embed_norm_rows(const EmbedNormArgs& args, int64_t begin, int64_t end, float* scratch) {
    const int64_t k = args.words.k;
    const NormArgs norm{k, args.gamma, args.beta, args.eps, Keeps::norm, args.out, args.positions.float_type, args.codes, args.scale};
    const Weight &types = args.token_types, &positions = args.positions;
    float *row = scratch, *type_space = row + scratch_row_floats(k), *position_space = type_space + scratch_row_floats(k);
    for (int64_t t = begin; t < end; ++t) {
        const float* word = table_row(args.words, args.ids[t], row);
        const float* type = float_row(types.codes, types.float_type, args.token_type_ids[t] * k, k, type_space);
        const float* position = float_row(positions.codes, positions.float_type, args.position_ids[t] * k, k, position_space);
        RowSum sum;
        for_vectors(k, [&](int64_t at, int64_t count, int part) __attribute__((always_inline)) {
            const f32x16 total = (load_part(word + at, count) + load_part(type + at, count)) + load_part(position + at, count);
            sum.part[part] += total;
            store(row + at, total);
        });
        norm_row(norm, row, sum.total(), t);
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
