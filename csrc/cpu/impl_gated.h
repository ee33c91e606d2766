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

// Sixteen results of `rows` tokens of a strip, the first being token `first`; sums of both halves lie side by side, a row every
// kBlockChannels.
template <Activation kActivation>
static void finish_pair(const LinearArgs& args, const PairChannels& c, int64_t pair, int64_t first, int64_t rows, const int32_t* sums,
                        const float* corrections) {
    const int64_t n = args.weight.n / kHalves;
    for (int64_t i = 0; i < rows; ++i, sums += kBlockChannels) {
        const f32x16 s = broadcast(args.s[first + i]);
        f32x16 y[kHalves];
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
            y[half] = to_float(load(sums + half * kPanelLanes)) * c.scale[half];
            if (c.outliers) y[half] += load(corrections + (half * kStripTokens + i) * kPanelLanes);
            y[half] = y[half] * s + c.bias[half];
        }
        const f32x16 result = activated(kActivation, y[0]) * y[1];
        const int64_t index = (first + i) * n + pair * kPanelLanes;
        if (args.requantize) {
            store_static_codes(static_cast<int8_t*>(args.out) + index, kLanes, result * args.inverse_out_scale);
        } else {
            store_floats(args.out, args.float_type, index, kLanes, result);
        }
    }
}

static void finish_pair(const LinearArgs& args, const PairChannels& c, int64_t pair, int64_t first, int64_t rows, const int32_t* sums,
                        const float* corrections) {
    switch (args.activation) {
        case Activation::gelu: return finish_pair<Activation::gelu>(args, c, pair, first, rows, sums, corrections);
        case Activation::gelu_tanh: return finish_pair<Activation::gelu_tanh>(args, c, pair, first, rows, sums, corrections);
        case Activation::relu: return finish_pair<Activation::relu>(args, c, pair, first, rows, sums, corrections);
        case Activation::silu: return finish_pair<Activation::silu>(args, c, pair, first, rows, sums, corrections);
        default: return finish_pair<Activation::none>(args, c, pair, first, rows, sums, corrections);
    }
}

static void multiply_pair(const LinearArgs& args, int64_t pair, const uint8_t* strips, int64_t strip_begin, int64_t strip_end,
                          int8_t* expanded) {
    const Weight& w = args.weight;
    const PairChannels c = pair_channels_of(args, pair);
    const int64_t quads = padded_quads(w.k), panel_stride = (quads + 1) * 64, strip_size = strip_bytes_of(quads);
    const int64_t second = w.n / kHalves / kPanelLanes + pair;
    const int8_t* weight = static_cast<const int8_t*>(w.codes) + pair * panel_stride;
    int64_t distance = (second - pair) * panel_stride;
    if (w.format != WeightFormat::int8_panels) {
        expand_panels(w, pair, 1, quads, expanded);
        expand_panels(w, second, 1, quads, expanded + panel_stride);
        weight = expanded;
        distance = panel_stride;
    }
    alignas(64) int32_t acc[kDotTokens * kBlockChannels];
    alignas(64) float corrections[kHalves * kStripTokens * kPanelLanes];
    const int64_t stop = strip_end * kStripTokens < args.t ? strip_end * kStripTokens : args.t;
    for (int64_t strip = strip_begin; strip < strip_end; strip += kStripsPerDot) {
        const int64_t first = strip * kStripTokens, rows = stop - first < kDotTokens ? stop - first : kDotTokens;
        dot<false>(strips + strip * strip_size, rows, weight, distance, kHalves, quads, quads, acc);
        for (int64_t i = 0; i < rows; i += kStripTokens) {
            const int64_t of_strip = rows - i < kStripTokens ? rows - i : kStripTokens;
            if (c.outliers) correct_pair(w.outliers, c, strips + (strip + i / kStripTokens) * strip_size, corrections);
            finish_pair(args, c, pair, first + i, of_strip, acc + i * kBlockChannels, corrections);
        }
    }
}

// Results block * kGatedChannels ..., for strips strip_begin ... strip_end - 1; n is a multiple of 16.
static void gated_block(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end, void* scratch) {
    const int64_t begin = block * kGatedPairs, pairs = args.weight.n / kHalves / kPanelLanes;
    const int64_t end = pairs < begin + kGatedPairs ? pairs : begin + kGatedPairs;
    const DotSession session;
    for (int64_t pair = begin; pair < end; ++pair) {
        multiply_pair(args, pair, static_cast<const uint8_t*>(strips), strip_begin, strip_end, static_cast<int8_t*>(scratch));
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
