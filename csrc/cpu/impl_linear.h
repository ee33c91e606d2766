// Integer linears: codes of 16 tokens at a time against a block of 64 output channels, which stays in the cache.
//
// A weight that is not int8 panels already is expanded into them once per task; the epilogue is float32 in the order of
// qbert/ops/reference.py and written once for all instruction sets.
#pragma once

#include "cpu/activations.h"
#include "cpu/expand.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

// What the epilogue needs of a block's channels; channels beyond n are zero.
struct BlockChannels {
    alignas(64) float scale[kBlockChannels];
    alignas(64) float bias[kBlockChannels];
    int64_t first;  // output channel
    int64_t count;
    bool outliers;
};

QBERT_INLINE int64_t padded_quads(int64_t k) { return (k + kPanelInputs - 1) / kPanelInputs * (kPanelInputs / 4); }

static int64_t strip_bytes(int64_t k) { return strip_bytes_of(padded_quads(k)); }

static void pack_strip(const int8_t* q, int64_t rows, int64_t k, void* strip) { pack_codes(q, rows, k, k, padded_quads(k), strip); }

static int64_t panel_stride_of(const Weight& w) { return (padded_quads(w.k) + 1) * 64; }

// Sums of a block, then its expanded panels, then the corrections of one strip: what it has no use for takes no room.
static int64_t linear_scratch_bytes(const LinearArgs& args) {
    const Weight& w = args.weight;
    const int64_t sums = product_sums(padded_quads(w.k)) * static_cast<int64_t>(sizeof(int32_t));
    const int64_t panels = w.format == WeightFormat::int8_panels ? 0 : kBlockPanels * panel_stride_of(w);
    const int64_t corrections = w.outliers.rowptr == nullptr ? 0 : kStripTokens * kBlockChannels * static_cast<int64_t>(sizeof(float));
    return sums + panels + corrections;
}

static BlockChannels channels_of(const LinearArgs& args, int64_t block) {
    const Weight& w = args.weight;
    const int32_t* rowptr = w.outliers.rowptr;
    BlockChannels c;
    c.first = block * kBlockChannels;
    c.count = w.n - c.first < kBlockChannels ? w.n - c.first : kBlockChannels;
    const bool per_matrix = w.format == WeightFormat::dict4_panels || w.format == WeightFormat::dict3_panels;
    for (int64_t i = 0; i < kBlockChannels; ++i) {
        const int64_t channel = c.first + i;
        const bool inside = i < c.count;
        c.scale[i] = !inside ? 0.0f : w.scale[per_matrix ? channel * w.matrices / w.n : channel];
        c.bias[i] = inside && args.bias != nullptr ? args.bias[channel] : -0.0f;  // what changes no bit of a sum
    }
    c.outliers = rowptr != nullptr && rowptr[c.first] != rowptr[c.first + c.count];
    return c;
}

// corrections[token * 64 + channel]: sum of code times outlier delta of these panels, float32, in the order of the columns.
static void correct_strip(const Outliers& outliers, const BlockChannels& c, int64_t panel, int64_t panels, const uint8_t* strip,
                          float* corrections) {
    for (const int64_t stop = panel + panels; panel < stop; ++panel) {
        f32x16 row[16];
        for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
            f32x16 sum{};
            const int64_t i = panel * kPanelLanes + lane;
            if (i < c.count) {
                const int64_t end = outliers.rowptr[c.first + i + 1];
                for (int64_t entry = outliers.rowptr[c.first + i]; entry < end; ++entry) {
                    const auto column = static_cast<uint64_t>(column_of(outliers, entry));
                    sum = madd(codes_of_column(strip, column), broadcast(outliers.delta[entry]), sum);
                }
            }
            row[lane] = sum;
        }
        transpose(row);
        for (int token = 0; token < kStripTokens; ++token) store(corrections + token * kBlockChannels + panel * kPanelLanes, row[token]);
    }
}

// The epilogue: from sums to results, codes with a static scale if kRequantize, else floats.
template <Activation kActivation, bool kRequantize>
struct FinishRows {
    const LinearArgs& args;
    const BlockChannels& c;
    const BlockProduct& product;
    int64_t first;       // token of the product's first
    float* corrections;  // of the strip that is being finished

    // See multiply_by_strip.h; all rows are of one strip.
    QBERT_MEMBER void operator()(int64_t token, int64_t end, int64_t panel, int64_t panels, const int32_t* sums, int64_t row_sums) const {
        if (c.outliers && token % kStripTokens == 0) {
            const uint8_t* strip = product.strips + token / kStripTokens * product.strip_stride;
            correct_strip(args.weight.outliers, c, panel, panels, strip, corrections);
        }
        for (; panels >= 2 && (panel + 2) * kPanelLanes <= c.count; panel += 2, panels -= 2, sums += 2 * kPanelLanes) {
            columns<2>(token, end, panel * kPanelLanes, sums, row_sums);
        }
        for (; panels > 0; ++panel, --panels, sums += kPanelLanes) columns<1>(token, end, panel * kPanelLanes, sums, row_sums);
    }

    // kVectors times 16 channels from `at` on; only one alone may go beyond the last channel.
    template <int kVectors>
    QBERT_MEMBER void columns(int64_t token, int64_t end, int64_t at, const int32_t* sums, int64_t row_sums) const {
        f32x16 scale[kVectors], bias[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            scale[v] = load(c.scale + at + v * kLanes);
            bias[v] = load(c.bias + at + v * kLanes);
        }
        const int64_t count = kVectors > 1 ? int64_t{kLanes} : c.count - at, n = args.weight.n;
        int64_t index = (first + token) * n + c.first + at;
        for (; token < end; ++token, index += n, sums += row_sums) {
            const f32x16 s = broadcast(args.s[first + token]);
            for (int v = 0; v < kVectors; ++v) {
                f32x16 y = to_float(load(sums + v * kLanes)) * scale[v];
                if (c.outliers) y += load(corrections + token % kStripTokens * kBlockChannels + at + v * kLanes);
                put(index + v * kLanes, count, activated_as<kActivation>(args.activation, y * s + bias[v]));
            }
        }
    }

    QBERT_MEMBER void put(int64_t index, int64_t count, f32x16 y) const {
        if (kRequantize) {
            store_static_codes(static_cast<int8_t*>(args.out) + index, count, y * args.inverse_out_scale, args.zero);
        } else {
            store_floats(args.out, args.float_type, index, count, y);
        }
    }
};

struct BlockTask {
    const LinearArgs& args;
    const BlockChannels& c;
    const BlockProduct& product;
    int64_t first;  // token
    int32_t* sums;
    float* corrections;
};

template <Activation kActivation>
QBERT_NOINLINE void multiply_and_finish(const BlockTask& t) {
    if (t.args.requantize) {
        multiply_block(t.product, t.sums, FinishRows<kActivation, true>{t.args, t.c, t.product, t.first, t.corrections});
    } else {
        multiply_block(t.product, t.sums, FinishRows<kActivation, false>{t.args, t.c, t.product, t.first, t.corrections});
    }
}

static void multiply_and_finish(const BlockTask& task) {
    switch (task.args.activation) {
        case Activation::none: return multiply_and_finish<Activation::none>(task);
        case Activation::gelu: return multiply_and_finish<Activation::gelu>(task);
        default: return multiply_and_finish<kAnyActivation>(task);
    }
}

static void linear_block(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end,
                         void* scratch) {
    const Weight& w = args.weight;
    const BlockChannels c = channels_of(args, block);
    const int64_t quads = padded_quads(w.k), panel_stride = panel_stride_of(w), strip_stride = strip_bytes_of(quads);
    const int64_t panels = (c.count + kPanelLanes - 1) / kPanelLanes;
    int32_t* sums = static_cast<int32_t*>(scratch);
    int8_t* free_scratch = reinterpret_cast<int8_t*>(sums + product_sums(quads));
    const int8_t* weight = static_cast<const int8_t*>(w.codes) + block * kBlockPanels * panel_stride;
    if (w.format != WeightFormat::int8_panels) {
        expand_panels(w, block * kBlockPanels, panels, quads, free_scratch);
        weight = free_scratch;
        free_scratch += kBlockPanels * panel_stride;
    }
    // The next block that this worker is likely to get.
    const int64_t next = block + args.blocks_ahead;
    const bool known = w.format == WeightFormat::int8_panels && (next + 1) * kBlockChannels <= w.n;
    const int64_t first = strip_begin * kStripTokens, stop = strip_end * kStripTokens < args.t ? strip_end * kStripTokens : args.t;
    const BlockProduct product{static_cast<const uint8_t*>(strips), strip_stride, stop - first,
                               weight, panel_stride, panels, quads,
                               known ? weight + args.blocks_ahead * kBlockPanels * panel_stride : nullptr};
    const DotSession session;
    multiply_and_finish({args, c, product, first, sums, reinterpret_cast<float*>(free_scratch)});
}

}  // namespace QBERT_ISA
}  // namespace qbert
