// Gated integer linears: y = activation(a) * b, a being the sums of a weight's first n rows and b those of its last n.
//
// A pair of panels, one of each half and n / 16 panels apart, is multiplied as a block of two panels that far apart is: the weight
// lies as that of any linear. Everything up to activation and product is impl_linear.h's, operation by operation.
#pragma once

#include "cpu/activations.h"
#include "cpu/expand.h"
#include "cpu/impl_linear.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kHalves = 2;

// What the epilogue needs of a pair's channels, by half.
struct PairChannels {
    int64_t first[kHalves];  // row of the weight
    f32x16 scale[kHalves];
    f32x16 bias[kHalves];
    bool outliers;
};

static PairChannels pair_channels_of(const LinearArgs& args, int64_t pair) {
    const Weight& w = args.weight;
    const int32_t* rowptr = w.outliers.rowptr;
    const bool per_matrix = w.format == WeightFormat::dict4_panels || w.format == WeightFormat::dict3_panels;
    PairChannels c;
    c.outliers = false;
    for (int half = 0; half < kHalves; ++half) {
        const int64_t first = half * (w.n / kHalves) + pair * kPanelLanes;
        float scale[kPanelLanes];
        for (int64_t i = 0; i < kPanelLanes; ++i) scale[i] = w.scale[per_matrix ? (first + i) * w.matrices / w.n : first + i];
        c.first[half] = first;
        c.scale[half] = load(scale);
        c.bias[half] = args.bias == nullptr ? broadcast(-0.0f) : load(args.bias + first);  // what changes no bit of a sum
        c.outliers |= rowptr != nullptr && rowptr[first] != rowptr[first + kPanelLanes];
    }
    return c;
}

// corrections[(half * 16 + token) * 16 + lane]: sum of code times outlier delta, float32, in the order of the columns.
static void correct_pair(const Outliers& outliers, const PairChannels& c, const void* strip, float* corrections) {
    for (int half = 0; half < kHalves; ++half) {
        f32x16 row[kPanelLanes];
        for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
            f32x16 sum{};
            const int64_t end = outliers.rowptr[c.first[half] + lane + 1];
            for (int64_t entry = outliers.rowptr[c.first[half] + lane]; entry < end; ++entry) {
                const auto column = static_cast<uint64_t>(column_of(outliers, entry));
                sum = madd(codes_of_column(strip, column), broadcast(outliers.delta[entry]), sum);
            }
            row[lane] = sum;
        }
        transpose(row);
        for (int token = 0; token < kStripTokens; ++token) store(corrections + (half * kStripTokens + token) * kPanelLanes, row[token]);
    }
}

// The epilogue of a pair: from sums of both halves, side by side, to sixteen results of each token.
template <Activation kActivation, bool kRequantize>
struct FinishPair {
    const LinearArgs& args;
    const PairChannels& c;
    const BlockProduct& product;
    int64_t pair;
    int64_t first;       // token of the product's first
    float* corrections;  // of the strip that is being finished

    // See multiply_by_strip.h; all rows are of one strip.
    QBERT_MEMBER void operator()(int64_t token, int64_t end, int64_t, int64_t, const int32_t* sums, int64_t row_sums) const {
        if (c.outliers && token % kStripTokens == 0) {
            correct_pair(args.weight.outliers, c, product.strips + token / kStripTokens * product.strip_stride, corrections);
        }
        const int64_t n = args.weight.n / kHalves;
        for (; token < end; ++token, sums += row_sums) {
            const f32x16 s = broadcast(args.s[first + token]);
            f32x16 y[kHalves];
#pragma GCC unroll 2
            for (int half = 0; half < kHalves; ++half) {
                y[half] = to_float(load(sums + half * kPanelLanes)) * c.scale[half];
                if (c.outliers) y[half] += load(corrections + (half * kStripTokens + token % kStripTokens) * kPanelLanes);
                y[half] = y[half] * s + c.bias[half];
            }
            put((first + token) * n + pair * kPanelLanes, activated(kActivation, y[0]) * y[1]);
        }
    }

    QBERT_MEMBER void put(int64_t index, f32x16 y) const {
        if (kRequantize) {
            store_static_codes(static_cast<int8_t*>(args.out) + index, kLanes, y * args.inverse_out_scale);
        } else {
            store_floats(args.out, args.float_type, index, kLanes, y);
        }
    }
};

struct PairTask {
    const LinearArgs& args;
    const PairChannels& c;
    const BlockProduct& product;
    int64_t pair, first;  // first token
    int32_t* sums;
    float* corrections;
};

template <Activation kActivation>
QBERT_NOINLINE void multiply_and_gate(const PairTask& t) {
    if (t.args.requantize) {
        multiply_block(t.product, t.sums, FinishPair<kActivation, true>{t.args, t.c, t.product, t.pair, t.first, t.corrections});
    } else {
        multiply_block(t.product, t.sums, FinishPair<kActivation, false>{t.args, t.c, t.product, t.pair, t.first, t.corrections});
    }
}

static void multiply_and_gate(const PairTask& task) {
    switch (task.args.activation) {
        case Activation::none: return multiply_and_gate<Activation::none>(task);
        case Activation::gelu: return multiply_and_gate<Activation::gelu>(task);
        case Activation::gelu_tanh: return multiply_and_gate<Activation::gelu_tanh>(task);
        case Activation::relu: return multiply_and_gate<Activation::relu>(task);
        case Activation::silu: return multiply_and_gate<Activation::silu>(task);
    }
}

// `tokens` tokens from `first` on, whose packed strips are `strips`. `sums` and `expanded` are scratch memory.
static void multiply_pair(const LinearArgs& args, int64_t pair, const uint8_t* strips, int64_t first, int64_t tokens, int32_t* sums,
                          int8_t* expanded) {
    const Weight& w = args.weight;
    const PairChannels c = pair_channels_of(args, pair);
    const int64_t quads = padded_quads(w.k), panel_stride = panel_stride_of(w), pairs = w.n / kHalves / kPanelLanes;
    const int8_t* panel = static_cast<const int8_t*>(w.codes) + pair * panel_stride;
    BlockProduct product{strips, strip_bytes_of(quads), tokens, panel, pairs * panel_stride, kHalves, quads, nullptr};
    if (w.format == WeightFormat::int8_panels) {
        product.ahead = pair + 1 < pairs ? panel + panel_stride : nullptr;
    } else {
        expand_panels(w, pair, 1, quads, expanded);
        expand_panels(w, pairs + pair, 1, quads, expanded + panel_stride);
        product.panels = expanded;
        product.panel_stride = panel_stride;
    }
    alignas(64) float corrections[kHalves * kStripTokens * kPanelLanes];
    multiply_and_gate({args, c, product, pair, first, sums, corrections});
}

// Results block * kGatedChannels ..., for strips strip_begin ... strip_end - 1, of which `strips` is the first.
static void gated_block(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end, void* scratch) {
    const int64_t begin = block * kGatedPairs, pairs = args.weight.n / kHalves / kPanelLanes;
    const int64_t end = pairs < begin + kGatedPairs ? pairs : begin + kGatedPairs;
    const int64_t first = strip_begin * kStripTokens, stop = strip_end * kStripTokens < args.t ? strip_end * kStripTokens : args.t;
    int32_t* sums = static_cast<int32_t*>(scratch);
    int8_t* expanded = reinterpret_cast<int8_t*>(sums + product_sums(padded_quads(args.weight.k)));
    const DotSession session;
    for (int64_t pair = begin; pair < end; ++pair) {
        multiply_pair(args, pair, static_cast<const uint8_t*>(strips), first, stop - first, sums, expanded);
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
