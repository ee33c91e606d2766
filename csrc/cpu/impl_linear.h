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

constexpr int kDotTokens = kStripTokens * kStripsPerDot;

// What the epilogue needs of a block's channels; channels beyond n are zero.
struct BlockChannels {
    alignas(64) float scale[kBlockChannels];
    alignas(64) float bias[kBlockChannels];
    int64_t first;  // output channel
    int64_t count;
    bool outliers;
};

QBERT_INLINE int64_t padded_quads(int64_t k) { return (k + kPanelInputs - 1) / kPanelInputs * (kPanelInputs / 4); }
QBERT_INLINE int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t strip_bytes(int64_t k) { return strip_bytes_of(padded_quads(k)); }

static void pack_strip(const int8_t* q, int64_t rows, int64_t k, void* strip) { pack_codes(q, rows, k, k, padded_quads(k), strip); }

static int64_t linear_scratch_bytes(const LinearArgs& args) {
    const Weight& w = args.weight;
    const int64_t panels = w.format == WeightFormat::int8_panels ? 0 : kBlockPanels * (padded_quads(w.k) + 1) * 64;
    const int64_t corrections = w.outliers.rowptr == nullptr ? 0 : kDotTokens * kBlockChannels * static_cast<int64_t>(sizeof(float));
    return panels + corrections;
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
        c.bias[i] = inside && args.bias != nullptr ? args.bias[channel] : 0.0f;
    }
    c.outliers = rowptr != nullptr && rowptr[c.first] != rowptr[c.first + c.count];
    return c;
}

// corrections[token * 64 + channel]: sum of code times outlier delta, float32, in the order of the columns.
static void correct_strip(const Outliers& outliers, const BlockChannels& c, const void* strip, float* corrections) {
    for (int64_t panel = 0; panel < kBlockPanels; ++panel) {
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

template <bool kOutliers>
static void finish_token(const LinearArgs& args, const BlockChannels& c, int64_t token, const int32_t* acc, const float* corrections) {
    const f32x16 s = broadcast(args.s[token]);
    for (int64_t at = 0; at < c.count; at += kLanes) {
        f32x16 y = to_float(load(acc + at)) * load(c.scale + at);
        if (kOutliers) y += load(corrections + at);
        y *= s;
        if (args.bias != nullptr) y += load(c.bias + at);
        y = activated(args.activation, y);
        const int64_t index = token * args.weight.n + c.first + at, count = c.count - at;
        if (args.requantize) {
            store_static_codes(static_cast<int8_t*>(args.out) + index, count, y * args.inverse_out_scale);
        } else {
            store_floats(args.out, args.float_type, index, count, y);
        }
    }
}

static void linear_block(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end,
                         void* scratch) {
    const Weight& w = args.weight;
    const BlockChannels c = channels_of(args, block);
    const int64_t quads = padded_quads(w.k), panel_stride = (quads + 1) * 64, strip_size = strip_bytes_of(quads);
    const int64_t panels = (c.count + kPanelLanes - 1) / kPanelLanes;
    int8_t* free_scratch = static_cast<int8_t*>(scratch);
    const int8_t* weight = static_cast<const int8_t*>(w.codes) + block * kBlockPanels * panel_stride;
    if (w.format != WeightFormat::int8_panels) {
        expand_panels(w, block * kBlockPanels, panels, quads, free_scratch);
        weight = free_scratch;
        free_scratch += kBlockPanels * panel_stride;
    }
    // The next block that this worker is likely to get.
    const int64_t next = block + args.blocks_ahead;
    const bool known = args.blocks_ahead > 0 && w.format == WeightFormat::int8_panels && (next + 1) * kBlockChannels <= w.n;
    const int8_t* ahead = known ? weight + args.blocks_ahead * kBlockPanels * panel_stride : nullptr;
    float* corrections = reinterpret_cast<float*>(free_scratch);
    const DotSession session;
    alignas(64) int32_t acc[kDotTokens * kBlockChannels];
    for (int64_t strip = strip_begin; strip < strip_end; strip += kStripsPerDot) {
        const uint8_t* packed = static_cast<const uint8_t*>(strips) + strip * strip_size;
        const int64_t first = strip * kStripTokens, stop = strip_end * kStripTokens < args.t ? strip_end * kStripTokens : args.t;
        const int64_t rows = stop - first < kDotTokens ? stop - first : kDotTokens;
        dot<false>(packed, rows, weight, panel_stride, panels, quads, quads, acc, strip == strip_begin ? ahead : nullptr);
        for (int64_t i = 0; c.outliers && i < rows; i += kStripTokens) {
            correct_strip(w.outliers, c, packed + i / kStripTokens * strip_size, corrections + i * kBlockChannels);
        }
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t* sums = acc + i * kBlockChannels;
            if (c.outliers) {
                finish_token<true>(args, c, first + i, sums, corrections + i * kBlockChannels);
            } else {
                finish_token<false>(args, c, first + i, sums, nullptr);
            }
        }
    }
}

}  // namespace QBERT_ISA
}  // namespace qbert
