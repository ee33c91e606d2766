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

// The epilogue of a pair: sixteen results of a token from sums of both halves side by side.
template <Activation kActivation, bool kRequantize>
struct FinishPair {
    const LinearArgs& args;
    const PairChannels& c;
    const BlockProduct& product;
    int64_t first;       // token of the product's first
    int64_t channel;     // first of the results
    float* corrections;  // of the strip that is being finished

    // See multiply_by_strip.h; all rows are of one strip, and there are always both panels.
    QBERT_MEMBER void operator()(int64_t token, int64_t end, int64_t, int64_t, const int32_t* sums, int64_t row_sums) const {
        if (c.outliers && token % kStripTokens == 0) {
            correct_pair(args.weight.outliers, c, product.strips + token / kStripTokens * product.strip_stride, corrections);
        }
        const int64_t n = args.weight.n / kHalves;
        int64_t index = (first + token) * n + channel;
        for (; token < end; ++token, index += n, sums += row_sums) {
            const f32x16 s = broadcast(args.s[first + token]);
            const f32x16 y = activated_as<kActivation>(args.activation, half_of(0, token, sums, s)) * half_of(1, token, sums, s);
            if (kRequantize) {
                store_static_codes(static_cast<int8_t*>(args.out) + index, kLanes, y * args.inverse_out_scale, args.zero);
            } else {
                store_floats(args.out, args.float_type, index, kLanes, y);
            }
        }
    }

    QBERT_MEMBER f32x16 half_of(int half, int64_t token, const int32_t* sums, f32x16 s) const {
        f32x16 y = to_float(load(sums + half * kPanelLanes)) * c.scale[half];
        if (c.outliers) y += load(corrections + (half * kStripTokens + token % kStripTokens) * kPanelLanes);
        return y * s + c.bias[half];
    }
};

struct PairTask {
    const LinearArgs& args;
    const PairChannels& c;
    const BlockProduct& product;
    int64_t first;    // token
    int64_t channel;  // of the results
    int32_t* sums;
    float* corrections;
};

template <Activation kActivation, bool kRequantize>
QBERT_NOINLINE void multiply_and_finish_pair(const PairTask& t) {
    const FinishPair<kActivation, kRequantize> finish{t.args, t.c, t.product, t.first, t.channel, t.corrections};
    multiply_block(t.product, t.sums, finish);
}

static void multiply_pair(const LinearArgs& args, int64_t pair, const uint8_t* strips, int64_t strip_begin, int64_t strip_end,
                          void* scratch) {
    const Weight& w = args.weight;
    const PairChannels c = pair_channels_of(args, pair);
    const int64_t quads = padded_quads(w.k), panel_stride = panel_stride_of(w), pairs = w.n / kHalves / kPanelLanes;
    int32_t* sums = static_cast<int32_t*>(scratch);
    int8_t* free_scratch = reinterpret_cast<int8_t*>(sums + product_sums(quads));
    const int8_t* weight = static_cast<const int8_t*>(w.codes) + pair * panel_stride;
    const int8_t* ahead = pair + 1 < pairs ? weight + panel_stride : nullptr;
    int64_t distance = pairs * panel_stride;
    if (w.format != WeightFormat::int8_panels) {
        expand_panels(w, pair, 1, quads, free_scratch);
        expand_panels(w, pairs + pair, 1, quads, free_scratch + panel_stride);
        weight = free_scratch;
        ahead = nullptr;
        distance = panel_stride;
        free_scratch += kHalves * panel_stride;
    }
    const int64_t first = strip_begin * kStripTokens, stop = strip_end * kStripTokens < args.t ? strip_end * kStripTokens : args.t;
    const BlockProduct product{strips, strip_bytes_of(quads), stop - first, weight, distance, kHalves, quads, ahead};
    const PairTask task{args, c, product, first, pair * kPanelLanes, sums, reinterpret_cast<float*>(free_scratch)};
    if (args.activation == Activation::gelu) {
        (args.requantize ? multiply_and_finish_pair<Activation::gelu, true> : multiply_and_finish_pair<Activation::gelu, false>)(task);
    } else {
        (args.requantize ? multiply_and_finish_pair<kAnyActivation, true> : multiply_and_finish_pair<kAnyActivation, false>)(task);
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
