// Attention of one head of one sequence: scores and the product with the values are integer products, the softmax between them
// is float32. See attention in qbert/ops/reference.py for the formula.
//
// Keys become panels whose lanes are keys, values panels whose lanes are channels, both once. Then 16 queries at a time (or as
// many as one `dot` takes): all their scores, their softmax to 8-bit probabilities, the product of those with the values. Which
// scores are added up together depends on the sequence alone, so neither the batch nor the instruction set shows in a bit.
#pragma once

#include "cpu/expand.h"
#include "cpu/impl_rows.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kQueries = kStripTokens * kStripsPerDot;
constexpr int64_t kBlockKeys = kBlockPanels * kPanelLanes;  // keys whose scores one `dot` computes
constexpr float kProbabilityMax = 255.0f;

// Where things lie in the scratch memory of one head, in bytes.
struct HeadPlan {
    int64_t key_quads, key_stride, key_panels;        // panels of 16 keys along the channels, with the row of their sums
    int64_t value_quads, value_stride, value_panels;  // panels of 16 channels along the keys
    int64_t row_codes;                                // of one query: a byte for each key, and room for whole blocks
    int64_t keys, values, queries, weights, codes, scores, key_factors, value_scales, bytes;
};

static HeadPlan plan_head(const AttentionArgs& args, int64_t length) {
    const auto multiple = [](int64_t x, int64_t of) { return (x + of - 1) / of * of; };
    HeadPlan plan{};
    const auto take = [&](int64_t bytes) {
        const int64_t at = plan.bytes;
        plan.bytes += multiple(bytes, 64);
        return at;
    };
    plan.key_quads = multiple((args.head_dim + 3) / 4, kQuadMultiple);
    plan.key_stride = (plan.key_quads + 1) * 64;
    plan.key_panels = (length + kPanelLanes - 1) / kPanelLanes;
    plan.value_quads = multiple((length + 3) / 4, kQuadMultiple);
    plan.value_stride = plan.value_quads * 64;
    plan.value_panels = (args.head_dim + kPanelLanes - 1) / kPanelLanes;
    plan.row_codes = multiple(length, kBlockKeys);
    plan.keys = take(plan.key_panels * plan.key_stride);
    plan.values = take(plan.value_panels * plan.value_stride);
    plan.queries = take(kStripsPerDot * strip_bytes_of(plan.key_quads));
    plan.weights = take(kStripsPerDot * strip_bytes_of(plan.value_quads));
    plan.codes = take(kQueries * plan.row_codes);
    plan.scores = take(kQueries * plan.row_codes * static_cast<int64_t>(sizeof(int32_t)));
    plan.key_factors = take(plan.row_codes * static_cast<int64_t>(sizeof(float)));
    plan.value_scales = take(plan.row_codes * static_cast<int64_t>(sizeof(float)));
    return plan;
}

static int64_t attention_scratch_bytes(const AttentionArgs& args, int64_t length) { return plan_head(args, length).bytes; }

// One head of one sequence: what it reads, and its scratch memory.
struct Head {
    const AttentionArgs& args;
    HeadPlan plan;
    int64_t start, length, width, stride;  // a token has `width` channels of results and `stride` of codes
    int64_t channel;                       // the head's first
    const int8_t *query, *key, *value;     // of the first token
    int8_t *keys, *values;
    uint8_t *queries, *weights, *codes;
    int32_t* scores;
    float *key_factors, *value_scales;
};

static Head head_of(const AttentionArgs& args, int64_t start, int64_t length, int64_t head, void* scratch) {
    const HeadPlan plan = plan_head(args, length);
    const int64_t width = args.heads * args.head_dim, channel = head * args.head_dim;
    const int8_t* query = args.qkv + start * 3 * width + channel;
    uint8_t* memory = static_cast<uint8_t*>(scratch);
    const auto codes_at = [&](int64_t at) { return reinterpret_cast<int8_t*>(memory + at); };
    const auto floats_at = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
    return Head{args, plan, start, length, width, 3 * width, channel, query, query + width, query + 2 * width,
                codes_at(plan.keys), codes_at(plan.values), memory + plan.queries, memory + plan.weights, memory + plan.codes,
                reinterpret_cast<int32_t*>(memory + plan.scores), floats_at(plan.key_factors), floats_at(plan.value_scales)};
}

QBERT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- packing ----

static void pack_keys(const Head& h) {
    for (int64_t panel = 0; panel < h.plan.key_panels; ++panel) {
        const int64_t first = panel * kPanelLanes, rows = smaller(h.length - first, kPanelLanes);
        int8_t* to = h.keys + panel * h.plan.key_stride;
        pack_words(h.key + first * h.stride, rows, h.args.head_dim, h.stride, h.plan.key_quads, 0, to);
        sum_lanes_of_panel(to, h.plan.key_quads);
    }
}

static void pack_values(const Head& h) {
    for (int64_t panel = 0; panel < h.plan.value_panels; ++panel) {
        const int64_t lanes = smaller(h.args.head_dim - panel * kPanelLanes, kPanelLanes);
        const int8_t* from = h.value + panel * kPanelLanes;
        int8_t* to = h.values + panel * h.plan.value_stride;
        int64_t row = 0;
        for (; lanes == kPanelLanes && row + 4 <= h.length; row += 4) {
            const int8_t* four = from + row * h.stride;
            const byte16 low = load16(four), second = load16(four + h.stride), third = load16(four + 2 * h.stride);
            interleave_bytes(low, second, third, load16(four + 3 * h.stride), to + row * 16);
        }
        for (; row < 4 * h.plan.value_quads; row += 4) {
            byte16 four[4] = {};
            for (int64_t j = 0; j < 4 && row + j < h.length; ++j) four[j] = load_some(from + (row + j) * h.stride, lanes);
            interleave_bytes(four[0], four[1], four[2], four[3], to + row * 16);
        }
    }
}

// ---- softmax ----

// 255 * 2^r for |r| <= 1/2, exact for 0: our own minimax fit, relative error 9e-8.
constexpr float kPower[6] = {255.0f, 176.752480f, 61.2567177f, 14.1543710f, 2.46623572f, 0.338250544f};
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a small number added to it is rounded to an integer, in its lowest bits
constexpr double kLog2E = 1.4426950408889634;

// 255 * 2^v for v <= 0; below 2^-126 it is 0, and so it is for NaN, whose row is made NaN elsewhere.
QBERT_INLINE f32x16 power(f32x16 v) {
    const f32x16 shifted = v + kRounder, n = shifted - kRounder;
    const u32x16 exponent = (u32x16)shifted << 23;  // what is left of kRounder's own bits is 0
    const f32x16 result = (f32x16)((u32x16)polynomial(kPower, v - n) + exponent);
    return select(v >= broadcast(-126.0f), result, f32x16{});
}

// Codes of sixteen values in 0 ... 255.5.
QBERT_INLINE void store_probabilities(uint8_t* to, f32x16 v) { store_bytes(to, (i32x16)(v + kRounder)); }

// One value for each of 16 rows: lane i is row[i], whose lanes are combined by the tree of sum_lanes.
#if defined(__AVX512F__)
template <class Vector, class Combine>
QBERT_INLINE Vector reduce_rows(const Vector* row, Combine combine) {
    const auto halves = [&](__m512 x, __m512 y) __attribute__((always_inline)) {
        return (__m512)combine((Vector)x, (Vector)y);
    };
    __m512 v[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)row[i], b = (__m512)row[i + 8];
        v[i] = halves(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44), _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = v[i], b = v[i + 4];
        v[i] = halves(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88), _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 a = v[i], b = v[i + 2];
        v[i] = halves(_mm512_maskz_shuffle_ps(0xffff, a, b, 0x44), _mm512_maskz_shuffle_ps(0xffff, a, b, 0xee));
    }
    const __m512 a = v[0], b = v[1];
    const __m512 all = halves(_mm512_maskz_shuffle_ps(0xffff, a, b, 0x88), _mm512_maskz_shuffle_ps(0xffff, a, b, 0xdd));
    // Rows lie as 0 2 1 3, 8 10 9 11, 4 6 5 7, 12 14 13 15 now.
    const __m512i place = _mm512_set_epi32(15, 13, 14, 12, 7, 5, 6, 4, 11, 9, 10, 8, 3, 1, 2, 0);
    return (Vector)_mm512_maskz_permutexvar_ps(0xffff, place, all);
}
QBERT_INLINE f32x16 sum_rows(const f32x16* row) {
    return reduce_rows(row, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return a + b; });
}
QBERT_INLINE f32x16 max_rows(const f32x16* row) {
    return reduce_rows(row, [](f32x16 a, f32x16 b) __attribute__((always_inline)) { return max(a, b); });
}
QBERT_INLINE i32x16 max_rows(const i32x16* row) {
    return reduce_rows(row, [](i32x16 a, i32x16 b) __attribute__((always_inline)) { return max(a, b); });
}
#else
QBERT_INLINE f32x16 sum_rows(const f32x16* row) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = sum_lanes(row[i]);
    return load(lane);
}
QBERT_INLINE f32x16 max_rows(const f32x16* row) {
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = max_lanes(row[i]);
    return load(lane);
}
QBERT_INLINE i32x16 max_rows(const i32x16* row) {
    int32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = max_lanes(row[i]);
    return load(lane);
}
#endif

// Up to 16 queries: their scores, their probabilities' codes, and what the sum of codes times values is multiplied with.
struct StripRows {
    int64_t rows, length;
    void* scores;       // of a row: sixty-four keys, then kBlockStride further the next; int32 sums to begin with
    uint8_t* codes;
    int64_t row_codes;
    float* factors;     // (16,)
};
constexpr int64_t kBlockStride = kQueries * kBlockKeys;

// Calls use(score, key, count) for the scores of row i, 16 keys at a time; count is below 16 only for the last ones.
template <class Score, class Use>
QBERT_INLINE void for_keys(const StripRows& strip, int64_t i, Use use) {
    Score* score = static_cast<Score*>(strip.scores) + i * kBlockKeys;
    int64_t key = 0;
    for (; key + kBlockKeys <= strip.length; key += kBlockKeys, score += kBlockStride) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kBlockKeys; j += kLanes) use(score + j, key + j, int64_t{kLanes});
    }
    for (; key + kLanes <= strip.length; key += kLanes, score += kLanes) use(score, key, int64_t{kLanes});
    if (key < strip.length) use(score, key, strip.length - key);
}

// With one scale for all queries, keys and values: the largest product is the largest score, and the largest weight is s_value.
// `factor` is that of the scores, times log2(e); both are NaN, or a row's result is not.
static void softmax_static(const StripRows& strip, float factor, float s_value) {
    i32x16 top[kLanes] = {};
    for (int64_t i = 0; i < strip.rows; ++i) {
        i32x16 largest = broadcast(INT32_MIN);
        for_keys<int32_t>(strip, i, [&](int32_t* score, int64_t, int64_t count) __attribute__((always_inline)) {
            const i32x16 sums = load(score);
            largest = max(largest, count == kLanes ? sums : select(first_lanes(count), sums, broadcast(INT32_MIN)));
        });
        top[i] = largest;
    }
    int32_t tops[kLanes];
    store(tops, max_rows(top));
    f32x16 total[kLanes] = {};
    for (int64_t i = 0; i < strip.rows; ++i) {
        const i32x16 largest = broadcast(tops[i]);
        uint8_t* codes = strip.codes + i * strip.row_codes;
        f32x16 sum{};
        for_keys<int32_t>(strip, i, [&](int32_t* score, int64_t key, int64_t count) __attribute__((always_inline)) {
            f32x16 e = power(to_float(load(score) - largest) * factor);
            if (count < kLanes) e = select(first_lanes(count), e, f32x16{});
            sum += e;
            store_probabilities(codes + key, e);
        });
        total[i] = sum;
    }
    store(strip.factors, s_value / sum_rows(total));
}

// With a scale for each token; key_factors are s_key times softmax_scale times log2(e).
static void softmax_per_token(const StripRows& strip, const float* s_query, const float* key_factors,
                              const float* value_scales) {
    f32x16 part[kLanes] = {}, total[kLanes] = {};
    for (int64_t i = 0; i < strip.rows; ++i) {
        f32x16 largest = broadcast(-__builtin_inff());
        for_keys<int32_t>(strip, i, [&](int32_t* score, int64_t key, int64_t count) __attribute__((always_inline)) {
            f32x16 x = to_float(load(score)) * load(key_factors + key);
            if (count < kLanes) x = select(first_lanes(count), x, broadcast(-__builtin_inff()));
            largest = max(largest, x);
            store(reinterpret_cast<float*>(score), x);
        });
        part[i] = largest;
    }
    float tops[kLanes], inverses[kLanes];
    store(tops, max_rows(part));
    for (int64_t i = 0; i < strip.rows; ++i) {
        const f32x16 top = broadcast(tops[i]), s = broadcast(s_query[i]);
        f32x16 sum{}, largest{};
        for_keys<float>(strip, i, [&](float* score, int64_t key, int64_t) __attribute__((always_inline)) {
            const f32x16 e = power((load(score) - top) * s), weight = e * load(value_scales + key);
            sum += e;
            largest = max(largest, weight);
            store(score, weight);
        });
        total[i] = sum;
        part[i] = largest;
    }
    const f32x16 largest = max_rows(part);
    store(inverses, kProbabilityMax / largest);
    for (int64_t i = 0; i < strip.rows; ++i) {
        const f32x16 inverse = broadcast(inverses[i]);
        uint8_t* codes = strip.codes + i * strip.row_codes;
        for_keys<float>(strip, i, [&](float* score, int64_t key, int64_t) __attribute__((always_inline)) {
            store_probabilities(codes + key, load(score) * inverse);
        });
    }
    // Powers are 255 times too large, and with them the sum and the largest weight.
    store(strip.factors, largest / kProbabilityMax / sum_rows(total));
}

// ---- scales ----

QBERT_INLINE bool is_scale(float scale) { return scale > 0.0f && scale < __builtin_inff(); }

// What the softmax needs of the scales, once for a head; a row's factor is NaN where a scale it depends on is none.
struct HeadScales {
    const float* token;  // (3,) of the first token, or of all
    bool usable;         // those that all rows depend on
    float factor;        // static: of the scores, times log2(e)

    float query(const Head& h, int64_t i) const { return token[h.args.scales_per_token ? 3 * i : 0]; }
};

static HeadScales scales_of(const Head& h) {
    HeadScales scales{h.args.scales + (h.args.scales_per_token ? 3 * h.start : 0), true, 0.0f};
    const double to_log2 = static_cast<double>(h.args.softmax_scale) * kLog2E;
    const float* s = scales.token;
    if (!h.args.scales_per_token) {
        scales.factor = static_cast<float>(static_cast<double>(s[0]) * s[1] * to_log2);
        scales.usable = is_scale(s[0]) && is_scale(s[1]) && is_scale(s[2]) && scales.factor < __builtin_inff();
        return scales;
    }
    for (int64_t i = 0; i < h.length; ++i, s += 3) {
        h.key_factors[i] = static_cast<float>(s[1] * to_log2);
        h.value_scales[i] = s[2];
        scales.usable &= is_scale(s[1]) && is_scale(s[2]) && h.key_factors[i] < __builtin_inff();
    }
    for (int64_t i = h.length; i < h.plan.row_codes; ++i) h.key_factors[i] = h.value_scales[i] = 0.0f;
    return scales;
}

// ---- one head ----

// Sums of products of queries first ... first + rows - 1 with all keys.
static void score(const Head& h, int64_t first, int64_t rows) {
    const HeadPlan& plan = h.plan;
    for (int64_t i = 0; i < rows; i += kStripTokens) {
        const int8_t* from = h.query + (first + i) * h.stride;
        uint8_t* to = h.queries + i / kStripTokens * strip_bytes_of(plan.key_quads);
        pack_codes(from, smaller(rows - i, kStripTokens), h.args.head_dim, h.stride, plan.key_quads, to);
    }
    int32_t* scores = h.scores;
    for (int64_t panel = 0; panel < plan.key_panels; panel += kBlockPanels, scores += kBlockStride) {
        const int8_t* keys = h.keys + panel * plan.key_stride;
        const int64_t panels = smaller(plan.key_panels - panel, kBlockPanels);
        dot<false>(h.queries, rows, keys, plan.key_stride, panels, plan.key_quads, plan.key_quads, scores);
    }
}

// Their probabilities, packed, and the factors on the sums of these times values.
static void weigh(const Head& h, const HeadScales& scales, int64_t first, int64_t rows, float* factors) {
    for (int64_t i = 0; i < rows; i += kStripTokens) {
        const int64_t now = smaller(rows - i, kStripTokens);
        uint8_t* codes = h.codes + i * h.plan.row_codes;
        const StripRows strip{now, h.length, h.scores + i * kBlockKeys, codes, h.plan.row_codes, factors + i};
        float s_query[kStripTokens];
        for (int64_t j = 0; j < now; ++j) s_query[j] = scales.query(h, first + i + j);
        if (h.args.scales_per_token) {
            softmax_per_token(strip, s_query, h.key_factors, h.value_scales);
        } else {
            softmax_static(strip, scales.factor, scales.token[2]);
        }
        for (int64_t j = 0; j < now; ++j) {
            if (!scales.usable || !is_scale(s_query[j])) factors[i + j] = __builtin_nanf("");
        }
        uint8_t* to = h.weights + i / kStripTokens * strip_bytes_of(h.plan.value_quads);
        pack_bytes(codes, now, h.length, h.plan.row_codes, h.plan.value_quads, to);
    }
}

// Channels at ... of the results of `rows` tokens from their sums.
static void store_rows(const Head& h, const int32_t* sums, const float* factors, int64_t first, int64_t rows, int64_t at) {
    const AttentionArgs& args = h.args;
    const int64_t channels = smaller(args.head_dim - at, kBlockChannels);
    int64_t index = (h.start + first) * h.width + h.channel + at;
    for (int64_t i = 0; i < rows; ++i, index += h.width, sums += kBlockChannels) {
        const f32x16 factor = broadcast(factors[i]);
        for (int64_t c = 0; c < channels; c += kLanes) {
            const f32x16 y = to_float(load(sums + c)) * factor;
            if (args.requantize) {
                store_static_codes(static_cast<int8_t*>(args.out) + index + c, channels - c, y * args.inverse_out_scale);
            } else {
                store_floats(args.out, args.float_type, index + c, channels - c, y);
            }
        }
    }
}

static void attention_head(const AttentionArgs& args, int64_t start, int64_t length, int64_t head, void* scratch) {
    const DotSession session;
    const Head h = head_of(args, start, length, head, scratch);
    const HeadScales scales = scales_of(h);
    pack_keys(h);
    pack_values(h);
    alignas(64) float factors[kQueries];
    alignas(64) int32_t sums[kQueries * kBlockChannels];
    for (int64_t first = 0; first < length; first += kQueries) {
        const int64_t rows = smaller(length - first, kQueries);
        score(h, first, rows);
        weigh(h, scales, first, rows, factors);
        for (int64_t panel = 0; panel < h.plan.value_panels; panel += kBlockPanels) {
            const int8_t* values = h.values + panel * h.plan.value_stride;
            const int64_t panels = smaller(h.plan.value_panels - panel, kBlockPanels);
            dot<true>(h.weights, rows, values, h.plan.value_stride, panels, h.plan.value_quads, 0, sums);
            store_rows(h, sums, factors, first, rows, panel * kPanelLanes);
        }
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
