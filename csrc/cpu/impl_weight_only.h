// Weight-only linears: float32 tokens times packed weights, for few tokens, where the bytes of the weight are what takes time.
//
// Spans of 32 input channels are summed up one after the other, pairs of spans to a block, blocks to the result: short sums
// lose little, and each output has one fixed order of fused multiply-adds, so that a token's result depends neither on the
// tokens beside it nor on the instruction set. Few tokens multiply each decoded vector while it is in a register; many find a
// block decoded in the cache.
#pragma once

#include "cpu/activations.h"
#include "cpu/decode_panels.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kSpan = 32;              // input channels that are summed up one after the other
constexpr int kPrefetch = 3072;        // bytes ahead in each panel
constexpr int kOutliersTogether = 32;  // of a panel

// Panels that are computed together, how many tokens multiply vectors while these are in registers, and tokens of a pass over
// decoded vectors: as many sums as the registers hold beside weights and one token's value.
#if defined(__AVX512F__)
constexpr int kMaxPanels = 4, kDirectTokens = 8, kPassTokens = 6, kUnroll = 8;
constexpr int panels_together(int64_t tokens) { return tokens >= 3 && tokens <= kDirectTokens ? 1 : kMaxPanels; }
#elif defined(__AVX2__)
constexpr int kMaxPanels = 2, kDirectTokens = 4, kPassTokens = 6, kUnroll = 4;
constexpr int panels_together(int64_t tokens) { return tokens == 1 ? kMaxPanels : 1; }
#else
constexpr int kMaxPanels = 1, kDirectTokens = 0, kPassTokens = 2, kUnroll = 1;
constexpr int panels_together(int64_t) { return 1; }
#endif
constexpr int kPendingTokens = kDirectTokens > kPassTokens ? kDirectTokens : kPassTokens;

// Panels that are computed together, and where their parts of the scratch memory are.
struct PanelGroup {
    const uint8_t* weight;
    int64_t stride;  // bytes from a panel to the next
    int64_t spans;   // of kSpan input channels
    int64_t spans_per_scale;
    const float* scale;  // (k / group, panels, 16) of int4, else null
    float* total;        // (tokens, panels, 16)
    float* pending;      // (tokens of a pass, panels, 16)
    float* decoded;      // (64, panels, 16)
};

QBERT_INLINE int64_t weight_only_padded(int64_t k) { return (k + kPanelInputs - 1) / kPanelInputs * kPanelInputs; }

static int64_t weight_only_scratch_bytes(const WeightOnlyArgs& args) {
    const int64_t vectors = (kWeightOnlyTokens + kPendingTokens + kPanelInputs + args.weight.groups) * kMaxPanels;
    return vectors * kLanes * static_cast<int64_t>(sizeof(float));
}

static void weight_only_widen(const WeightOnlyArgs& args, int64_t begin, int64_t end, float* wide) {
    const int64_t k = args.weight.k, padded = weight_only_padded(k);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t at = 0; at < padded; at += kLanes) {
            const int64_t count = k - at < 0 ? 0 : k - at;
            store(wide + row * padded + at, load_floats(args.x, args.float_type, row * args.x_stride + at, count));
        }
    }
}

// ---- sums of a span ----

// A column is a slice of a panel: channels whose sums share a register.
template <int kTokens, int kPanels>
struct Sums {
    SliceFloat of[kTokens][kPanels * kSlices];
};

QBERT_INLINE const uint8_t* column_of_panels(const uint8_t* first, int64_t stride, int column) {
    return first + column / kSlices * stride + column % kSlices * kRegisterBytes;
}

// Adds the sums of a span, scaled, to the totals: those of an even span wait for their neighbour's.
template <int kTokens, int kPanels>
QBERT_INLINE void add_span(const PanelGroup& g, int64_t span, const Sums<kTokens, kPanels>& sums, float* total) {
    const float* scale = g.scale == nullptr ? nullptr : g.scale + span / g.spans_per_scale * kPanels * kLanes;
    const bool first = span % 2 == 0, waits = first && span + 1 < g.spans;
#pragma GCC unroll 4
    for (int c = 0; c < kPanels * kSlices; ++c) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            const int64_t at = t * kPanels * kLanes + c * kSliceLanes;
            SliceFloat block = first ? SliceFloat{} : load_slice(g.pending + at);
            const SliceFloat sum = sums.of[t][c];
            block = scale == nullptr ? block + sum : madd(sum, load_slice(scale + c * kSliceLanes), block);
            if (waits) {
                store_slice(g.pending + at, block);
            } else {
                store_slice(total + at, load_slice(total + at) + block);
            }
        }
    }
}

// One part of a row of each panel, decoded and multiplied at once. x: that part's first input channel of the first token.
template <class Decoder, int kTokens, int kPanels>
QBERT_INLINE void multiply_part(const Decoder& d, const uint8_t* row, int64_t stride, int part, const float* x,
                                int64_t x_stride, Sums<kTokens, kPanels>& sums) {
    constexpr int kColumns = kPanels * kSlices;
    decltype(Decoder::load_row(row, part)) rows[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) rows[c] = Decoder::load_row(column_of_panels(row, stride, c), part);
#pragma GCC unroll 8
    for (int s = 0; s < kPartSteps; ++s) {
        SliceFloat value[kTokens];
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) value[t] = broadcast_slice(x[t * x_stride + Decoder::kParts * s]);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            const SliceFloat w = Decoder::step(d, rows[c], s);
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) sums.of[t][c] = madd(w, value[t], sums.of[t][c]);
        }
    }
}

template <class Decoder, int kTokens, int kPanels>
QBERT_NOINLINE void multiply_direct(const PanelGroup& g, const Decoder& decoder, const float* x, int64_t x_stride) {
    constexpr int kRowInputs = kPartSteps * Decoder::kParts;
    const Decoder d = decoder;
    const uint8_t* row = g.weight;
    for (int64_t span = 0; span < g.spans; ++span) {
        const int64_t left = g.weight + g.stride - row;
        const uint8_t* ahead = row + kPrefetch + (left > kPrefetch ? 0 : (kPanels - 1) * g.stride);
        Sums<kTokens, kPanels> sums{};
        for (int i = 0; i < kSpan; i += kRowInputs) {
            for (int p = 0; p < kPanels; ++p) {
                for (int line = 0; line < Decoder::kRowBytes; line += 64) __builtin_prefetch(ahead + p * g.stride + line);
            }
#pragma GCC unroll 1
            for (int part = 0; part < Decoder::kParts; ++part) {
                multiply_part(d, row, g.stride, part, x + part, x_stride, sums);
            }
            x += kRowInputs;
            row += Decoder::kRowBytes;
            ahead += Decoder::kRowBytes;
        }
        add_span(g, span, sums, g.total);
    }
}

// False, with nothing done, if that many tokens had better read decoded vectors from memory.
template <class Decoder, int kTokens, int kPanels>
static bool multiply_directly(const PanelGroup& g, const Decoder& d, const float* x, int64_t x_stride, int64_t tokens) {
    if constexpr (kTokens == 0) {
        return false;
    } else {
        if (tokens != kTokens) return multiply_directly<Decoder, kTokens - 1, kPanels>(g, d, x, x_stride, tokens);
        // A row of 3-bit codes takes more registers than others: some instruction sets have too few for more than two tokens.
        constexpr bool kFits = kMaxPanels == 4 || Decoder::kParts == 1 || kTokens <= 2;
        if constexpr (kFits && (kPanels == 1 || kPanels == panels_together(kTokens))) {
            multiply_direct<Decoder, kTokens, kPanels>(g, d, x, x_stride);
            return true;
        }
        return false;
    }
}

// ---- sums of a block that is decoded into memory ----

// Rows in the order in which channels are summed: step by step, part by part, row by row.
template <class Decoder, int kPanels>
QBERT_NOINLINE void decode_block(const PanelGroup& g, const Decoder& decoder, int64_t first_span, int64_t spans) {
    constexpr int kRowsOfSpan = kSpan / (kPartSteps * Decoder::kParts);
    const Decoder d = decoder;
    for (int c = 0; c < kPanels * kSlices; ++c) {
        const uint8_t* row = column_of_panels(g.weight, g.stride, c) + first_span * kRowsOfSpan * Decoder::kRowBytes;
        float* out = g.decoded + c * kSliceLanes;
        for (int64_t i = 0; i < spans * kRowsOfSpan; ++i) {
#pragma GCC unroll 1
            for (int part = 0; part < Decoder::kParts; ++part) {
                const auto codes = Decoder::load_row(row, part);
#pragma GCC unroll 8
                for (int s = 0; s < kPartSteps; ++s) store_slice(out + s * kPanels * kLanes, Decoder::step(d, codes, s));
                out += kPartSteps * kPanels * kLanes;
            }
            row += Decoder::kRowBytes;
        }
    }
}

template <int kParts, int kTokens, int kPanels>
QBERT_NOINLINE void multiply_decoded(const PanelGroup& g, int64_t first_span, int64_t spans, const float* x, int64_t x_stride,
                                     float* total) {
    const float* w = g.decoded;
    for (int64_t span = first_span; span < first_span + spans; ++span) {
        Sums<kTokens, kPanels> sums{};
        for (int i = 0; i < kSpan; i += kParts * kPartSteps) {
#pragma GCC unroll 1
            for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll kUnroll
                for (int s = 0; s < kPartSteps; ++s) {
#pragma GCC unroll 8
                    for (int t = 0; t < kTokens; ++t) {
                        const SliceFloat value = broadcast_slice(x[t * x_stride + part + kParts * s]);
#pragma GCC unroll 4
                        for (int c = 0; c < kPanels * kSlices; ++c) {
                            sums.of[t][c] = madd(load_slice(w + c * kSliceLanes), value, sums.of[t][c]);
                        }
                    }
                    w += kPanels * kLanes;
                }
            }
            x += kParts * kPartSteps;
        }
        add_span(g, span, sums, total);
    }
}

template <int kParts, int kTokens, int kPanels>
static void multiply_pass(const PanelGroup& g, int64_t first_span, int64_t spans, const float* x, int64_t x_stride,
                          float* total, int64_t tokens) {
    if (tokens == kTokens) {
        multiply_decoded<kParts, kTokens, kPanels>(g, first_span, spans, x, x_stride, total);
    } else if constexpr (kTokens > 1) {
        multiply_pass<kParts, kTokens - 1, kPanels>(g, first_span, spans, x, x_stride, total, tokens);
    }
}

template <class Decoder, int kPanels>
static void multiply_block(const PanelGroup& g, const Decoder& d, int64_t first_span, const float* x, int64_t x_stride,
                           int64_t tokens) {
    const int64_t spans = g.spans - first_span < 2 ? 1 : 2;
    decode_block<Decoder, kPanels>(g, d, first_span, spans);
    x += first_span * kSpan;
    float* total = g.total;
    for (int64_t passes = (tokens + kPassTokens - 1) / kPassTokens; passes > 0; --passes) {
        const int64_t now = (tokens + passes - 1) / passes;  // passes of equal size: each has enough independent sums
        multiply_pass<Decoder::kParts, kPassTokens, kPanels>(g, first_span, spans, x, x_stride, total, now);
        x += now * x_stride;
        total += now * kPanels * kLanes;
        tokens -= now;
    }
}

// ---- scales, outliers, the end ----

// 8 x 8 halves, in place: shuffling the rows like two halves of a deck of cards, three times.
QBERT_INLINE void transpose_halves(half8* row) {
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
        half8 next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = __builtin_shuffle(row[i], row[i + 4], half8{0, 8, 1, 9, 2, 10, 3, 11});
            next[2 * i + 1] = __builtin_shuffle(row[i], row[i + 4], half8{4, 12, 5, 13, 6, 14, 7, 15});
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) row[i] = next[i];
    }
}

// Eight of the halves at `from`, of which only `count` may be read: the others are 0.
QBERT_INLINE half8 load_eight(const uint16_t* from, int64_t at, int64_t count) {
    return count >= 8 ? (half8)load16(from + at) : (half8)load_some(from + at, count > 0 ? 2 * count : 0);
}

// Scales of 16 output channels as a vector for each group, `stride` floats apart; those of channels beyond n are unspecified.
static void gather_scales(const Weight& w, int64_t channel, int64_t stride, float* out) {
    constexpr int64_t kBlock = 8;
    const uint16_t* scale = static_cast<const uint16_t*>(w.group_scale);
    for (int64_t first = 0; first < w.groups; first += kBlock) {
        alignas(64) uint16_t columns[kBlock][kLanes];
        for (int64_t lane = 0; lane < kLanes; lane += kBlock) {
            half8 row[kBlock];
#pragma GCC unroll 8
            for (int64_t i = 0; i < kBlock; ++i) {
                const int64_t at = (channel + lane + i) * w.groups + first, all = w.n * w.groups;
                row[i] = load_eight(scale, at < all ? at : 0, all - at);
            }
            transpose_halves(row);
            for (int64_t i = 0; i < kBlock; ++i) store16(&columns[i][lane], (byte16)row[i]);
        }
        for (int64_t i = 0; i < kBlock && first + i < w.groups; ++i) {
            store(out + (first + i) * stride, from_bf16(load_halves(columns[i])));
        }
    }
}

// First entries of the rows of 16 output channels; beyond n, the end of the last row.
QBERT_INLINE i32x16 outlier_bounds(const Weight& w, int64_t channel) {
    int32_t bound[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        bound[lane] = w.outliers.rowptr[channel + lane < w.n ? channel + lane : w.n];
    }
    return load(bound);
}

// Adds the outliers of 16 output channels, in the order of their columns: each to its own lane, without asking where rows end.
// Some are summed up on their own first: of very many in a row, one sum would lose too much.
template <int kTokens>
QBERT_INLINE void correct(const WeightOnlyArgs& args, int64_t channel, const float* x, f32x16* y) {
    const Weight& w = args.weight;
    const Outliers& outliers = w.outliers;
    const int64_t last = channel + kLanes < w.n ? channel + kLanes : w.n;
    const int32_t stop = outliers.rowptr[last];
    if (outliers.rowptr[channel] == stop) return;
    const i32x16 begin = outlier_bounds(w, channel), end = outlier_bounds(w, channel + 1);
    for (int32_t entry = outliers.rowptr[channel]; entry < stop;) {
        const int32_t pause = stop - entry < kOutliersTogether ? stop : entry + kOutliersTogether;
        f32x16 sum[kTokens] = {};
        for (; entry < pause; ++entry) {
            const int64_t column = column_of(outliers, entry);
            const auto lane = (begin <= entry) & (end > entry);
            const f32x16 delta = broadcast(outliers.delta[entry]);
            for (int t = 0; t < kTokens; ++t) {
                sum[t] = select(lane, madd(delta, broadcast(x[t * args.wide_stride + column]), sum[t]), sum[t]);
            }
        }
        for (int t = 0; t < kTokens; ++t) y[t] += sum[t];
    }
}

template <int kTokens>
QBERT_NOINLINE void finish_tokens(const WeightOnlyArgs& args, int64_t panel, int64_t token, const float* total,
                                  int64_t panels) {
    const Weight& w = args.weight;
    const int64_t channel = panel * kLanes, count = w.n - channel;
    f32x16 y[kTokens];
    for (int t = 0; t < kTokens; ++t) y[t] = load(total + t * panels * kLanes);
    if (w.scale != nullptr) {
        const f32x16 scale = load_floats(w.scale, FloatType::f32, channel, count);
        for (int t = 0; t < kTokens; ++t) y[t] *= scale;
    }
    if (w.outliers.rowptr != nullptr) correct<kTokens>(args, channel, args.wide_x + token * args.wide_stride, y);
    f32x16 bias{};
    if (args.bias != nullptr) bias = load_floats(args.bias, args.bias_type, channel, count);
    for (int t = 0; t < kTokens; ++t) {
        if (args.bias != nullptr) y[t] += bias;
        y[t] = activated(args.activation, y[t]);
        store_floats(args.out, args.float_type, (token + t) * w.n + channel, count, y[t]);
    }
}

// ---- panels ----

// Output channels panel * 16 ... of kPanels panels, for tokens begin ... end - 1.
template <class Decoder, int kPanels>
static void few_panels(const WeightOnlyArgs& args, const Decoder& d, PanelGroup g, int64_t panel, int64_t begin, int64_t end) {
    const float* x = args.wide_x + begin * args.wide_stride;
    const int64_t tokens = end - begin, stride = kPanels * kLanes;
    memset(g.total, 0, static_cast<size_t>(tokens * stride) * sizeof(float));
    if (args.weight.format == WeightFormat::int4_panels) {
        float* scale = g.decoded + kPanelInputs * stride;
        for (int p = 0; p < kPanels; ++p) gather_scales(args.weight, (panel + p) * kLanes, stride, scale + p * kLanes);
        g.scale = scale;
    }
    if (!multiply_directly<Decoder, kDirectTokens, kPanels>(g, d, x, args.wide_stride, tokens)) {
        for (int64_t span = 0; span < g.spans; span += 2) {
            multiply_block<Decoder, kPanels>(g, d, span, x, args.wide_stride, tokens);
        }
    }
    for (int p = 0; p < kPanels; ++p) {
        const float* total = g.total + p * kLanes;
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) finish_tokens<4>(args, panel + p, begin + t, total + t * stride, kPanels);
        for (; t < tokens; ++t) finish_tokens<1>(args, panel + p, begin + t, total + t * stride, kPanels);
    }
}

template <class Decoder>
static void panels_of(const WeightOnlyArgs& args, int64_t panel, int64_t panel_end, int64_t begin, int64_t end, void* scratch) {
    const Weight& w = args.weight;
    const Decoder d = Decoder::of(w);
    const int64_t padded = weight_only_padded(w.k);
    PanelGroup g{};
    g.stride = padded / (kPartSteps * Decoder::kParts) * Decoder::kRowBytes;
    if (w.format == WeightFormat::int8_panels) g.stride += 64;  // the row of sums
    g.spans = padded / kSpan;
    if (w.groups > 0) {
        g.spans = w.k / kSpan;  // there are no scales for more
        g.spans_per_scale = g.spans / w.groups;
    }
    g.total = static_cast<float*>(scratch);
    g.pending = g.total + kWeightOnlyTokens * kMaxPanels * kLanes;
    g.decoded = g.pending + kPendingTokens * kMaxPanels * kLanes;
    const int64_t together = panels_together(end - begin);
    while (panel < panel_end) {
        const int64_t now = panel_end - panel < together ? 1 : together;
        g.weight = static_cast<const uint8_t*>(w.codes) + panel * g.stride;
        if (now > 1) {
            few_panels<Decoder, kMaxPanels>(args, d, g, panel, begin, end);
        } else {
            few_panels<Decoder, 1>(args, d, g, panel, begin, end);
        }
        panel += now;
    }
}

static void weight_only_panels(const WeightOnlyArgs& args, int64_t panel_begin, int64_t panel_end, int64_t token_begin,
                               int64_t token_end, void* scratch) {
    const auto run = [&](auto of_decoder) { of_decoder(args, panel_begin, panel_end, token_begin, token_end, scratch); };
    switch (args.weight.format) {
        case WeightFormat::int8_panels: return run(panels_of<DecodeInt8>);
        case WeightFormat::int4_panels: return run(panels_of<DecodeInt4>);
        case WeightFormat::dict4_panels: return run(panels_of<DecodeDict4>);
        default: return run(panels_of<DecodeDict3>);
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
