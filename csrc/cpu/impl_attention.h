// Attention of one head of one sequence: scores and the product with the values are integer products, the softmax between them
// is float32. See attention in qbert/ops/reference.py for the formula.
//
// Keys become panels whose lanes are keys, values panels whose lanes are channels, both once a part. Then 16 queries at a time (or
// as many as one `dot` takes): all their scores, their softmax to 8-bit probabilities, the product of those with the values. Which
// scores are added up together depends on the sequence alone, so neither the batch nor the instruction set shows in a bit. With a
// window a part packs the keys that its queries see, from a multiple of 64 on, and 16 queries pass those that they see, from a
// multiple of 16 on: a key is in the same lane wherever the keys begin, and one that is not seen adds 0.
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
constexpr double kLog2E = 1.4426950408889634;

QBERT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
QBERT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
QBERT_INLINE int64_t multiple(int64_t x, int64_t of) { return (x + of - 1) / of * of; }

// Where things lie in the scratch memory of a part, in bytes.
struct HeadPlan {
    int64_t key_quads, key_stride, key_panels;        // panels of 16 keys along the channels, with the row of their sums
    int64_t value_quads, value_stride, value_panels;  // panels of 16 channels along the keys
    int64_t row_codes;                                // of one query: a byte for each key, and room for whole blocks
    int64_t keys, values, queries, weights, codes, scores, key_factors, value_scales;
    int64_t biases;                                   // of every distance between a query and a key of the part
    int64_t rounded_stride, rounded, rounded_scales, space;  // of floats: codes of queries, keys, values; two rows of floats
    int64_t bytes;
};

static HeadPlan plan_head(const AttentionArgs& args, int64_t queries, int64_t keys) {
    HeadPlan plan{};
    const auto take = [&](int64_t bytes) {
        const int64_t at = plan.bytes;
        plan.bytes += multiple(bytes, 64);
        return at;
    };
    constexpr int64_t kFloat = sizeof(float);
    plan.key_quads = multiple((args.head_dim + 3) / 4, kQuadMultiple);
    plan.key_stride = (plan.key_quads + 1) * 64;
    plan.key_panels = (keys + kPanelLanes - 1) / kPanelLanes;
    plan.value_quads = multiple((keys + 3) / 4, kQuadMultiple);
    plan.value_stride = plan.value_quads * 64;
    plan.value_panels = (args.head_dim + kPanelLanes - 1) / kPanelLanes;
    plan.row_codes = multiple(keys, kBlockKeys);
    plan.keys = take(plan.key_panels * plan.key_stride);
    plan.values = take(plan.value_panels * plan.value_stride + kQuadMultiple * 64);  // a window's keys may end in their midst
    plan.queries = take(kStripsPerDot * strip_bytes_of(plan.key_quads));
    plan.weights = take(kStripsPerDot * strip_bytes_of(plan.value_quads));
    plan.codes = take(kQueries * plan.row_codes);
    plan.scores = take(kQueries * plan.row_codes * static_cast<int64_t>(sizeof(int32_t)));
    plan.key_factors = take(plan.row_codes * kFloat);
    plan.value_scales = take(plan.row_codes * kFloat);
    plan.biases = take(args.bias == nullptr ? 0 : (queries + keys + kLanes) * kFloat);
    plan.rounded_stride = multiple(args.head_dim, kLanes);
    const int64_t rows = args.floats ? queries + 2 * keys : 0;
    plan.rounded = take(rows * plan.rounded_stride);
    plan.rounded_scales = take(rows * kFloat);
    plan.space = take(args.floats ? 2 * plan.rounded_stride * kFloat : 0);
    return plan;
}

static int64_t attention_scratch_bytes(const AttentionArgs& args, int64_t length, int64_t queries) {
    const int64_t seen = is_windowed(args, length) ? queries + 2 * args.window + kBlockKeys : length;
    return plan_head(args, queries, smaller(seen, length)).bytes;
}

// A part of a head: what it reads, and its scratch memory. Queries are counted from its first, and keys from its first.
struct Head {
    const AttentionArgs& args;
    const AttentionPart& part;
    HeadPlan plan;
    int64_t first_key, keys, queries;  // first_key is counted from the sequence's start
    bool windowed;
    int64_t width, channel;            // a token has `width` channels of results; the head's first
    int64_t stride;                    // of codes, from a token to the next
    const int8_t *query, *key, *value;
    int64_t scale_stride;              // from a token to the next; 0 where all have one
    const float *query_scale, *key_scale, *value_scale;
    int8_t *key_panels, *value_panels;
    uint8_t *query_strips, *weights, *codes;
    int32_t* scores;
    float *key_factors, *value_scales, *biases, *space;
};

// Queries, keys and values (0, 1, 2) of a token lie side by side, or keys and values where queries are those of first tokens.
QBERT_INLINE int64_t parts_of(const AttentionArgs& args) { return args.queries == nullptr ? 3 : 2; }
QBERT_INLINE int64_t place_of(const AttentionArgs& args, int which) { return args.queries == nullptr ? which : which - 1; }

static void find_codes(Head& h) {
    const AttentionArgs& args = h.args;
    const int64_t first_query = h.part.start + h.part.first, first_key = h.part.start + h.first_key, key = place_of(args, 1);
    const int8_t* codes = static_cast<const int8_t*>(args.qkv) + h.channel;
    h.stride = parts_of(args) * h.width;
    h.query = codes + first_query * h.stride;
    h.key = codes + first_key * h.stride + key * h.width;
    h.value = h.key + h.width;
    h.scale_stride = args.scales_per_token ? parts_of(args) : 0;
    h.query_scale = args.scales + first_query * h.scale_stride;
    h.key_scale = args.scales + first_key * h.scale_stride + (args.scales_per_token ? key : 1);
    h.value_scale = h.key_scale + 1;
    if (args.queries == nullptr) return;
    h.query = static_cast<const int8_t*>(args.queries) + h.part.sequence * h.width + h.channel;
    if (args.scales_per_token) h.query_scale = args.query_scales + h.part.sequence;
}

static Head head_of(const AttentionArgs& args, const AttentionPart& part, void* scratch) {
    const bool windowed = is_windowed(args, part.length);
    const int64_t first = windowed ? larger(part.first - args.window, 0) / kBlockKeys * kBlockKeys : 0;
    const int64_t last = windowed ? smaller(part.last + args.window, part.length) : part.length;
    const int64_t queries = part.last - part.first;
    const HeadPlan plan = plan_head(args, queries, last - first);
    uint8_t* memory = static_cast<uint8_t*>(scratch);
    const auto codes_at = [&](int64_t at) { return reinterpret_cast<int8_t*>(memory + at); };
    const auto floats_at = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
    return Head{args, part, plan, first, last - first, queries, windowed, args.heads * args.head_dim, part.head * args.head_dim, 0,
                nullptr, nullptr, nullptr, 0, nullptr, nullptr, nullptr, codes_at(plan.keys), codes_at(plan.values),
                memory + plan.queries, memory + plan.weights, memory + plan.codes,
                reinterpret_cast<int32_t*>(memory + plan.scores), floats_at(plan.key_factors), floats_at(plan.value_scales),
                floats_at(plan.biases), floats_at(plan.space)};
}

// ---- floats ----

// A row whose halves (a, b) are turned by the angles of a position: (a cos - b sin, b cos + a sin).
static const float* rotate_row(const float* x, const float* cosine, int64_t k, float* to) {
    const int64_t half = k / 2;
    const float* sine = cosine + half;
    for_vectors(half, [&](int64_t at, int64_t count, int) __attribute__((always_inline)) {
        const f32x16 a = load_part(x + at, count), b = load_part(x + half + at, count);
        const f32x16 c = load_part(cosine + at, count), s = load_part(sine + at, count);
        store_part(to + at, count, a * c - b * s);
        store_part(to + half + at, count, b * c + a * s);
    });
    return to;
}

static void round_row(const float* x, int64_t k, float inverse, int8_t* codes) {
    for_vectors(k, [&](int64_t at, int64_t count, int) __attribute__((always_inline)) {
        store_static_codes(codes + at, count, load_part(x + at, count) * inverse);
    });
}

// Codes of `count` rows from position `first` on; `which`: queries, keys or values. Scales too where they are taken here.
static void round_rows(const Head& h, int which, int64_t first, int64_t count, int8_t* codes, float* scales) {
    const AttentionArgs& args = h.args;
    const int64_t k = args.head_dim;
    for (int64_t i = 0; i < count; ++i, codes += h.plan.rounded_stride) {
        const int64_t token = h.part.start + first + i, row = parts_of(args) * token + place_of(args, which);
        const bool apart = which == 0 && args.queries != nullptr;
        const float* x = apart ? float_row(args.queries, args.qkv_type, h.part.sequence * h.width + h.channel, k, h.space)
                               : float_row(args.qkv, args.qkv_type, row * h.width + h.channel, k, h.space);
        if (args.rotary != nullptr && which < 2) {
            x = rotate_row(x, args.rotary + (first + i) * k, k, h.space + h.plan.rounded_stride);
        }
        if (args.scales != nullptr) {
            round_row(x, k, 1.0f / args.scales[which], codes);
            continue;
        }
        RowMax absmax;
        for_vectors(k, [&](int64_t at, int64_t now, int) __attribute__((always_inline)) { absmax.add(load_part(x + at, now)); });
        quantize_row(x, k, absmax.total(), codes, scales + i);
    }
}

static void round_floats(Head& h, void* scratch) {
    int8_t* codes = static_cast<int8_t*>(scratch) + h.plan.rounded;
    float* scales = reinterpret_cast<float*>(static_cast<int8_t*>(scratch) + h.plan.rounded_scales);
    int8_t *key = codes + h.queries * h.plan.rounded_stride, *value = key + h.keys * h.plan.rounded_stride;
    float *key_scale = scales + h.queries, *value_scale = key_scale + h.keys;
    round_rows(h, 0, h.part.first, h.queries, codes, scales);
    round_rows(h, 1, h.first_key, h.keys, key, key_scale);
    round_rows(h, 2, h.first_key, h.keys, value, value_scale);
    const bool dynamic = h.args.scales == nullptr;
    h.stride = h.plan.rounded_stride;
    h.query = codes, h.key = key, h.value = value;
    h.scale_stride = dynamic ? 1 : 0;
    h.query_scale = dynamic ? scales : h.args.scales;
    h.key_scale = dynamic ? key_scale : h.args.scales + 1;
    h.value_scale = dynamic ? value_scale : h.args.scales + 2;
}

// ---- packing ----

static void pack_keys(const Head& h) {
    for (int64_t panel = 0; panel < h.plan.key_panels; ++panel) {
        const int64_t first = panel * kPanelLanes, rows = smaller(h.keys - first, kPanelLanes);
        int8_t* to = h.key_panels + panel * h.plan.key_stride;
        pack_words(h.key + first * h.stride, rows, h.args.head_dim, h.stride, h.plan.key_quads, 0, to);
        sum_lanes_of_panel(to, h.plan.key_quads);
    }
}

static void pack_values(const Head& h) {
    for (int64_t panel = 0; panel < h.plan.value_panels; ++panel) {
        const int64_t lanes = smaller(h.args.head_dim - panel * kPanelLanes, kPanelLanes);
        const int8_t* from = h.value + panel * kPanelLanes;
        int8_t* to = h.value_panels + panel * h.plan.value_stride;
        int64_t row = 0;
        for (; lanes == kPanelLanes && row + 4 <= h.keys; row += 4) {
            const int8_t* four = from + row * h.stride;
            const byte16 low = load16(four), second = load16(four + h.stride), third = load16(four + 2 * h.stride);
            interleave_bytes(low, second, third, load16(four + 3 * h.stride), to + row * 16);
        }
        for (; row < 4 * h.plan.value_quads; row += 4) {
            byte16 four[4] = {};
            for (int64_t j = 0; j < 4 && row + j < h.keys; ++j) four[j] = load_some(from + (row + j) * h.stride, lanes);
            interleave_bytes(four[0], four[1], four[2], four[3], to + row * 16);
        }
    }
}

// ---- softmax ----

// 255 * 2^r for |r| <= 1/2, exact for 0: our own minimax fit, relative error 9e-8.
constexpr float kPower[6] = {255.0f, 176.752480f, 61.2567177f, 14.1543710f, 2.46623572f, 0.338250544f};

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

// ---- softmax over what a row sees ----

// What a row sees: keys first ... last - 1, counted from the strip's first key, and the biases from that key on.
struct Sight {
    int64_t first, last;
    const float* biases;
};

// Calls use(score, key) for vectors of 16 keys that cover what a row sees.
template <class Score, class Use>
QBERT_INLINE void for_seen(const StripRows& strip, int64_t i, const Sight& sight, Use use) {
    Score* row = static_cast<Score*>(strip.scores) + i * kBlockKeys;
    for (int64_t key = sight.first / kLanes * kLanes; key < sight.last; key += kLanes) {
        use(row + key / kBlockKeys * kBlockStride + key % kBlockKeys, key);
    }
}

// -1 in the lanes of keys from `key` on that a row sees.
QBERT_INLINE i32x16 seen_lanes(const Sight& sight, int64_t key) {
    const i32x16 place = load(kLaneNumbers) + static_cast<int32_t>(key - sight.first);
    return (u32x16)place < static_cast<uint32_t>(sight.last - sight.first);
}

// Scores of row i to floats, those of keys that it does not see to minus infinity; a vector whose lanes' largest is the row's.
// Without biases they are still to be multiplied with `factor`; with biases they are powers of e, which rounds the scores and
// not what is left of them below the largest.
template <bool kPerToken, bool kBias>
QBERT_INLINE f32x16 scores_seen(const StripRows& strip, int64_t i, const Sight& sight, float factor, const float* key_factors) {
    f32x16 largest = broadcast(-__builtin_inff());
    for_seen<int32_t>(strip, i, sight, [&](int32_t* score, int64_t key) __attribute__((always_inline)) {
        f32x16 x = to_float(load(score));
        if (kPerToken) x *= load(key_factors + key);
        if (kBias) x = madd(x, broadcast(factor), load(sight.biases + key));
        x = select(seen_lanes(sight, key), x, broadcast(-__builtin_inff()));
        largest = max(largest, x);
        store(reinterpret_cast<float*>(score), x);
    });
    return largest;
}

// As softmax_static and softmax_per_token, for rows that see different keys, or have biases. `row_factors` are of scores times
// log2(e), or without it where there are biases; key_factors, value_scales and biases begin with the strip's first key.
template <bool kPerToken, bool kBias>
QBERT_NOINLINE void softmax_seen(const StripRows& strip, const Sight* sight, const float* row_factors, const float* key_factors,
                                 const float* value_scales, float s_value) {
    f32x16 part[kLanes] = {}, total[kLanes] = {};
    float tops[kLanes], inverses[kLanes];
    for (int64_t i = 0; i < strip.rows; ++i) {
        part[i] = scores_seen<kPerToken, kBias>(strip, i, sight[i], row_factors[i], key_factors);
    }
    store(tops, max_rows(part));
    for (int64_t i = 0; i < strip.rows; ++i) {
        const f32x16 top = broadcast(tops[i]), factor = broadcast(row_factors[i]);
        uint8_t* codes = strip.codes + i * strip.row_codes;
        memset(codes, 0, static_cast<size_t>(multiple(strip.length, kBlockKeys)));
        f32x16 sum{}, largest{};
        for_seen<float>(strip, i, sight[i], [&](float* score, int64_t key) __attribute__((always_inline)) {
            const f32x16 e = power((load(score) - top) * (kBias ? broadcast(static_cast<float>(kLog2E)) : factor));
            sum += e;
            if (!kPerToken) return store_probabilities(codes + key, e);
            const f32x16 weight = e * load(value_scales + key);
            largest = max(largest, weight);
            store(score, weight);
        });
        total[i] = sum;
        part[i] = largest;
    }
    if (!kPerToken) return store(strip.factors, s_value / sum_rows(total));
    const f32x16 largest = max_rows(part);
    store(inverses, kProbabilityMax / largest);
    for (int64_t i = 0; i < strip.rows; ++i) {
        const f32x16 inverse = broadcast(inverses[i]);
        uint8_t* codes = strip.codes + i * strip.row_codes;
        for_seen<float>(strip, i, sight[i], [&](float* score, int64_t key) __attribute__((always_inline)) {
            store_probabilities(codes + key, load(score) * inverse);
        });
    }
    store(strip.factors, largest / kProbabilityMax / sum_rows(total));
}

// The biases of a part's head: at index d - (first key - last query) that of a key d after its query.
static void spread_biases(const Head& h) {
    const int64_t reach = h.args.reach, least = h.first_key - (h.part.last - 1);
    const float* bias = h.args.bias + h.part.head * (2 * reach + 1) + reach;
    for (int64_t i = 0; i < h.queries + h.keys + kLanes; ++i) {
        const int64_t distance = larger(-reach, smaller(reach, least + i));
        h.biases[i] = bias[distance];
    }
}

// ---- scales ----

QBERT_INLINE bool is_scale(float scale) { return scale > 0.0f && scale < __builtin_inff(); }

// What the softmax needs of the scales, once for a part; a row's factor is NaN where a scale it depends on is none.
struct HeadScales {
    bool usable;   // those that all rows depend on, or some
    float factor;  // static: of the scores, as score_factor
};

// On the product of two codes' scales.
QBERT_INLINE double score_factor(const AttentionArgs& args) {
    return static_cast<double>(args.softmax_scale) * (args.bias == nullptr ? kLog2E : 1.0);
}

QBERT_INLINE bool key_is_usable(const Head& h, int64_t i) {
    const double factor = h.key_scale[i * h.scale_stride] * score_factor(h.args);
    return is_scale(h.key_scale[i * h.scale_stride]) && is_scale(h.value_scale[i * h.scale_stride]) &&
           static_cast<float>(factor) < __builtin_inff();
}

static HeadScales scales_of(const Head& h) {
    HeadScales scales{true, 0.0f};
    const double to_score = score_factor(h.args);
    if (h.scale_stride == 0) {
        const float *s = h.args.scales;
        scales.factor = static_cast<float>(static_cast<double>(s[0]) * s[1] * to_score);
        scales.usable = is_scale(s[0]) && is_scale(s[1]) && is_scale(s[2]) && scales.factor < __builtin_inff();
        return scales;
    }
    const float *key = h.key_scale, *value = h.value_scale;
    for (int64_t i = 0; i < h.keys; ++i, key += h.scale_stride, value += h.scale_stride) {
        h.key_factors[i] = static_cast<float>(*key * to_score);
        h.value_scales[i] = *value;
        const bool usable = is_scale(*key) && is_scale(*value) && h.key_factors[i] < __builtin_inff();
        if (!usable) h.key_factors[i] = h.value_scales[i] = 0.0f;  // rows that do not see it shall not notice
        scales.usable &= usable;
    }
    for (int64_t i = h.keys; i < h.plan.row_codes; ++i) h.key_factors[i] = h.value_scales[i] = 0.0f;
    return scales;
}

// ---- one part ----

// Queries that go through it together, and the keys that one of them or more sees.
struct Group {
    int64_t first, rows, key, keys;

    int64_t quads() const { return multiple((keys + 3) / 4, kQuadMultiple); }
};

static Group group_of(const Head& h, int64_t first) {
    const int64_t rows = smaller(h.queries - first, kQueries);
    if (!h.windowed) return {first, rows, 0, h.keys};
    const int64_t query = h.part.first + first - h.first_key;  // counted as keys are
    const int64_t key = larger(query - h.args.window, 0) / kLanes * kLanes;
    return {first, rows, key, smaller(query + rows + h.args.window, h.keys) - key};
}

// Sums of products of a group's queries with its keys.
static void score(const Head& h, const Group& group) {
    const HeadPlan& plan = h.plan;
    for (int64_t i = 0; i < group.rows; i += kStripTokens) {
        const int8_t* from = h.query + (group.first + i) * h.stride;
        uint8_t* to = h.query_strips + i / kStripTokens * strip_bytes_of(plan.key_quads);
        pack_codes(from, smaller(group.rows - i, kStripTokens), h.args.head_dim, h.stride, plan.key_quads, to);
    }
    int32_t* scores = h.scores;
    const int64_t end = (group.key + group.keys + kPanelLanes - 1) / kPanelLanes;
    for (int64_t panel = group.key / kPanelLanes; panel < end; panel += kBlockPanels, scores += kBlockStride) {
        const int8_t* keys = h.key_panels + panel * plan.key_stride;
        const int64_t panels = smaller(end - panel, kBlockPanels);
        dot<false>(h.query_strips, group.rows, keys, plan.key_stride, panels, plan.key_quads, plan.key_quads, scores);
    }
}

// What each of a strip's rows sees, from the group's query `i` on.
static void look(const Head& h, const Group& group, int64_t i, int64_t rows, Sight* sight) {
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t query = h.part.first + group.first + i + j, at = query - h.first_key - group.key;
        sight[j].first = h.windowed ? larger(at - h.args.window, 0) : 0;
        sight[j].last = h.windowed ? smaller(at + h.args.window + 1, group.keys) : group.keys;
        sight[j].biases = h.biases + group.key + h.part.last - 1 - query;
    }
}

// The softmax of a strip whose rows see different keys, or have biases; false for rows that see a scale that is none.
static void weigh_seen(const Head& h, const HeadScales& scales, const Group& group, int64_t i, const StripRows& strip,
                       const float* s_query) {
    Sight sight[kStripTokens];
    look(h, group, i, strip.rows, sight);
    float static_factors[kStripTokens];
    for (int64_t j = 0; j < kStripTokens; ++j) static_factors[j] = scales.factor;
    const float *key_factors = h.key_factors + group.key, *value_scales = h.value_scales + group.key;
    const bool per_token = h.scale_stride != 0, biased = h.args.bias != nullptr;
    const auto softmax = per_token ? (biased ? softmax_seen<true, true> : softmax_seen<true, false>)
                                   : (biased ? softmax_seen<false, true> : softmax_seen<false, false>);
    softmax(strip, sight, per_token ? s_query : static_factors, key_factors, value_scales, *h.value_scale);
    for (int64_t j = 0; j < strip.rows && !scales.usable; ++j) {
        bool usable = per_token;
        for (int64_t key = sight[j].first; key < sight[j].last; ++key) usable = usable && key_is_usable(h, group.key + key);
        if (!usable) strip.factors[j] = __builtin_nanf("");
    }
}

static void weigh_all(const Head& h, const HeadScales& scales, const StripRows& strip, const float* s_query) {
    if (h.scale_stride != 0) {
        softmax_per_token(strip, s_query, h.key_factors, h.value_scales);
    } else {
        softmax_static(strip, scales.factor, *h.value_scale);
    }
    for (int64_t j = 0; j < strip.rows && !scales.usable; ++j) strip.factors[j] = __builtin_nanf("");
}

// Their probabilities, packed, and the factors on the sums of these times values.
static void weigh(const Head& h, const HeadScales& scales, const Group& group, float* factors) {
    const bool all = !h.windowed && h.args.bias == nullptr;
    for (int64_t i = 0; i < group.rows; i += kStripTokens) {
        const int64_t now = smaller(group.rows - i, kStripTokens);
        uint8_t* codes = h.codes + i * h.plan.row_codes;
        const StripRows strip{now, group.keys, h.scores + i * kBlockKeys, codes, h.plan.row_codes, factors + i};
        float s_query[kStripTokens];
        for (int64_t j = 0; j < now; ++j) s_query[j] = h.query_scale[(group.first + i + j) * h.scale_stride];
        if (all) {
            weigh_all(h, scales, strip, s_query);
        } else {
            weigh_seen(h, scales, group, i, strip, s_query);
        }
        for (int64_t j = 0; j < now; ++j) {
            if (!is_scale(s_query[j])) factors[i + j] = __builtin_nanf("");
        }
        uint8_t* to = h.weights + i / kStripTokens * strip_bytes_of(group.quads());
        pack_bytes(codes, now, group.keys, h.plan.row_codes, group.quads(), to);
    }
}

// Channels at ... of the results of `rows` tokens from their sums.
static void store_rows(const Head& h, const int32_t* sums, const float* factors, int64_t first, int64_t rows, int64_t at) {
    const AttentionArgs& args = h.args;
    const int64_t channels = smaller(args.head_dim - at, kBlockChannels);
    const int64_t row = args.queries != nullptr ? h.part.sequence : h.part.start + h.part.first + first;
    int64_t index = row * h.width + h.channel + at;
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

static void attention_part(const AttentionArgs& args, const AttentionPart& part, void* scratch) {
    const DotSession session;
    Head h = head_of(args, part, scratch);
    if (args.floats) {
        round_floats(h, scratch);
    } else {
        find_codes(h);
    }
    const HeadScales scales = scales_of(h);
    if (args.bias != nullptr) spread_biases(h);
    pack_keys(h);
    pack_values(h);
    alignas(64) float factors[kQueries];
    alignas(64) int32_t sums[kQueries * kBlockChannels];
    for (int64_t first = 0; first < h.queries; first += kQueries) {
        const Group group = group_of(h, first);
        score(h, group);
        weigh(h, scales, group, factors);
        for (int64_t panel = 0; panel < h.plan.value_panels; panel += kBlockPanels) {
            const int8_t* values = h.value_panels + panel * h.plan.value_stride + group.key * 16;
            const int64_t panels = smaller(h.plan.value_panels - panel, kBlockPanels);
            dot<true>(h.weights, group.rows, values, h.plan.value_stride, panels, group.quads(), 0, sums);
            store_rows(h, sums, factors, first, group.rows, panel * kPanelLanes);
        }
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
