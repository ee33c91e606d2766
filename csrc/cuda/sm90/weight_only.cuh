// Packed weights with few tokens of bfloat16 or float16: codes become wgmma's 16-bit operand on their way (stream.cuh), sums
// are float32.
//
// Weights are rounded to the tokens' type where torch's own product of that type has them rounded: codebooks' numbers, and
// int4's code * scale, which is rounded once. int8's codes are exact, their scale comes after the sum. Outliers are added to
// the sum in float32, in the order of the columns.
#pragma once

#include "cuda/sm90/expand_float.cuh"
#include "cuda/sm90/stream.cuh"
#include "cuda/sm90/weight_only.h"

namespace qbert::cuda {

template <class Float>
__device__ float widen(uint16_t bits) {
    if constexpr (std::is_same_v<Float, sm90::Half>) {
        return __half2float(__ushort_as_half(bits));
    } else {
        return __uint_as_float(uint32_t{bits} << 16);
    }
}

// Words to the registers of step 0 ... 7 (see expand_float.cuh), by the code: what each thread keeps for it.
template <Code kCode, class Float>
struct FloatExpander;

template <class Float>
struct FloatExpander<Code::int8, Float> {
    __device__ FloatExpander(const PackedWeight&, const unsigned char*, int, int) {}
    __device__ void expand(const uint32_t (&words)[16], int step, uint32_t (&a)[4]) const {
        expand_int8<Float>(words[2 * step], a[0], a[2]);
        expand_int8<Float>(words[2 * step + 1], a[1], a[3]);
    }
    __device__ void fetch_scales() {}
};

template <class Float>
struct FloatExpander<Code::int4, Float> {
    GroupScales<uint16_t> scales;
    __device__ FloatExpander(const PackedWeight& a, const unsigned char*, int row, int block)
        : scales(static_cast<const uint16_t*>(a.scale), a.groups, a.k, a.n, row, block) {}
    __device__ void expand(const uint32_t (&words)[8], int step, uint32_t (&a)[4]) const {
        const uint32_t even = both<Float>(scales.of(0, step / 2)), odd = both<Float>(scales.of(1, step / 2));
        a[0] = multiply_pairs<Float>(expand_int4<Float, 0>(words[step]), even);
        a[1] = multiply_pairs<Float>(expand_int4<Float, 1>(words[step]), odd);
        a[2] = multiply_pairs<Float>(expand_int4<Float, 2>(words[step]), even);
        a[3] = multiply_pairs<Float>(expand_int4<Float, 3>(words[step]), odd);
    }
    __device__ void fetch_scales() { scales.fetch(); }
};

template <class Float>
struct FloatExpander<Code::dict4, Float> {
    const unsigned char* table;
    uint32_t lane_bytes = static_cast<uint32_t>(sm90::lane_index()) * 4;
    __device__ FloatExpander(const PackedWeight&, const unsigned char* pairs, int, int) : table(pairs) {}
    __device__ void expand(const uint32_t (&words)[8], int step, uint32_t (&a)[4]) const {
        a[0] = look_up_pair<0>(table, words[step], lane_bytes);
        a[2] = look_up_pair<1>(table, words[step], lane_bytes);
        a[1] = look_up_pair<2>(table, words[step], lane_bytes);
        a[3] = look_up_pair<3>(table, words[step], lane_bytes);
    }
    __device__ void fetch_scales() {}
};

template <class Float>
struct FloatExpander<Code::dict3, Float> {
    Codebook8 codebook;
    __device__ FloatExpander(const PackedWeight& a, const unsigned char*, int, int)
        : codebook(load_codebook8<Float>(a.codebook)) {}
    __device__ void expand(const uint32_t (&words)[6], int step, uint32_t (&a)[4]) const {
        const uint32_t* of_half = words + step / 4 * 3;
        const uint32_t selectors = step % 4 < 3 ? of_half[step % 4] & 0x77777777 : fourth_word(of_half);
        look_up(codebook, selectors, a[0], a[2]);
        look_up(codebook, high_half(selectors), a[1], a[3]);
    }
    __device__ void fetch_scales() {}
};

template <Code kOf, class Float>
struct WeightOnly : FloatExpander<kOf, Float> {
    static constexpr Code kCode = kOf;
    static constexpr int kTableBytes = kOf == Code::dict4 ? kPairTableBytes : 0;
    using Operand = Float;

    struct Arguments {
        WeightOnlyLinear linear;
        bool wide;
    };

    __device__ WeightOnly(const Arguments& a, const unsigned char* table, int row, int block)
        : FloatExpander<kOf, Float>(a.linear.weight, table, row, block) {}

    static __device__ void fill_table(const Arguments& a, unsigned char* table, int thread, int threads) {
        fill_pair_table<Float>(table, a.linear.weight.codebook, thread, threads);
    }

    static __device__ void prefetch(const Arguments& arguments, int first, int channels) {
        const WeightOnlyLinear& a = arguments.linear;
        const PackedWeight& w = a.weight;
        prefetch_outliers(w.outliers, first, channels);
        if (kOf == Code::int8) prefetch_elements(w.scale, 4, first, channels);
        if (kOf == Code::int4) prefetch_elements(w.scale, 2, first * w.groups, channels * w.groups);
        if (a.bias != nullptr) prefetch_elements(a.bias, a.bias_type == FloatType::f32 ? 4 : 2, first, channels);
    }

    static __device__ void finish(const Arguments& arguments, const float (&sums)[kQuadChannels], int token, int channel) {
        const WeightOnlyLinear& a = arguments.linear;
        const int channels = min(kQuadChannels, static_cast<int>(a.weight.n) - channel), last = channel + channels - 1;
        float y[kQuadChannels];
#pragma unroll
        for (int i = 0; i < kQuadChannels; ++i) {
            y[i] = sums[i];
            if (kOf == Code::int8) y[i] *= static_cast<const float*>(a.weight.scale)[min(channel + i, last)];
        }
        const uint16_t* x = static_cast<const uint16_t*>(a.x) + token * a.x_pitch;
        add_outliers(a.weight.outliers, channel, channels, [x](int column) { return widen<Float>(x[column]); }, y);
        add_bias(y, a.bias, a.bias_type, channel, last);
        if (a.activation == Activation::gelu) apply_gelu(y);
        store_floats(a.out, a.x_type, token * a.out_pitch + channel, y, channels, arguments.wide);
    }
};

template <Code kCode, class Float, int kTokens>
void launch_weight_only_tokens(const WeightOnlyLinear& a, const StreamPlan& plan, const Launch& launch) {
    const typename WeightOnly<kCode, Float>::Arguments arguments{a, stores_quads(a.out, a.out_pitch, 2)};
    const StreamProblem problem = weight_only_problem(a.t, a.weight.n, a.weight.k, kCode);
    launch_stream<WeightOnly<kCode, Float>, kTokens>(plan, problem, a.x, a.x_pitch, a.weight.codes, arguments, launch,
                                                     "weight-only linear");
}

template <Code kCode, FloatType kType>
void launch_weight_only_of(const WeightOnlyLinear& a, const StreamPlan& plan, const Launch& launch) {
    using Float = std::conditional_t<kType == FloatType::bf16, sm90::BFloat, sm90::Half>;
    switch (plan.tokens) {
        case 16: return launch_weight_only_tokens<kCode, Float, 16>(a, plan, launch);
        case 32: return launch_weight_only_tokens<kCode, Float, 32>(a, plan, launch);
        default: return launch_weight_only_tokens<kCode, Float, 64>(a, plan, launch);
    }
}

}  // namespace qbert::cuda
