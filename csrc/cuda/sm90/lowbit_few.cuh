// Low-bit weights with few int8 tokens: codes become wgmma's int8 operand on their way (stream.cuh), sums are exact.
#pragma once

#include "cuda/sm90/lowbit_few.h"
#include "cuda/sm90/stream.cuh"

namespace qbert::cuda {

template <Code kOf>
struct LowbitFew {
    static constexpr Code kCode = kOf;
    static constexpr bool kHasCodebook = kOf != Code::int4;
    static constexpr int kTableBytes = 0;
    using Operand = int8_t;

    struct Arguments {
        LowbitLinear linear;
        int rows_of_scale;
        bool wide;
    };
    struct NoScales {
        __device__ NoScales(const uint8_t*, int64_t, int64_t, int64_t, int, int) {}
    };
    using Scales = std::conditional_t<kHasCodebook, NoScales, GroupScales<uint8_t>>;

    RowMeaning<kOf> rows[2];  // of the thread's rows g and g + 8
    Scales scales;

    __device__ LowbitFew(const Arguments& arguments, const unsigned char*, int row, int block)
        : scales(arguments.linear.group_scale, arguments.linear.groups, arguments.linear.k, arguments.linear.n, row, block) {
        if constexpr (kHasCodebook) {
            const int last = static_cast<int>(arguments.linear.n) - 1;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                rows[h] = load_codebook<kOf>(arguments.linear.codebook, min(row + 8 * h, last) / arguments.rows_of_scale);
            }
        }
    }

    __device__ void expand(const uint32_t (&words)[thread_words(kOf)], int step, uint32_t (&a)[4]) {
        if (step == 0) take_scales();
        expand_step(words, rows[0], rows[1], step, a);
    }

    __device__ void fetch_scales() {
        if constexpr (!kHasCodebook) scales.fetch();
    }
    __device__ void take_scales() {
        if constexpr (!kHasCodebook) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                rows[h].scales = scales.of(h, 0) | uint32_t{scales.of(h, 1)} << 8 | uint32_t{scales.of(h, 2)} << 16 |
                                 uint32_t{scales.of(h, 3)} << 24;
            }
        }
    }

    static __device__ void prefetch(const Arguments& arguments, int first, int channels) {
        const LowbitLinear& a = arguments.linear;
        if constexpr (kHasCodebook) {
            prefetch_outliers(a.outliers, first, channels);
        } else {
            prefetch_elements(a.group_scale, 1, first * a.groups, channels * a.groups);
            prefetch_elements(a.scale, 4, first, channels);
        }
        if (a.bias != nullptr) prefetch_elements(a.bias, a.bias_type == FloatType::f32 ? 4 : 2, first, channels);
    }

    static __device__ void finish(const Arguments& arguments, const int32_t (&sums)[kQuadChannels], int token, int channel) {
        const LowbitLinear& a = arguments.linear;
        const int channels = min(kQuadChannels, static_cast<int>(a.n) - channel), last = channel + channels - 1;
        float y[kQuadChannels];
#pragma unroll
        for (int i = 0; i < kQuadChannels; ++i) {
            const int row = min(channel + i, last);
            y[i] = __fmul_rn(static_cast<float>(sums[i]), a.scale[kHasCodebook ? row / arguments.rows_of_scale : row]);
        }
        if constexpr (kHasCodebook) {
            const int8_t* q = a.q + token * a.q_pitch;
            add_outliers(a.outliers, channel, channels, [q](int column) { return static_cast<float>(q[column]); }, y);
        }
        const float s = a.s[token];
#pragma unroll
        for (float& each : y) each = __fmul_rn(each, s);
        add_bias(y, a.bias, a.bias_type, channel, last);
        if (a.finish.activation == Activation::gelu) apply_gelu(y);
        const int64_t at = token * a.out_pitch + channel;
        if (a.requantize) {
            store_int8(a.out, a.finish, at, y, channels, arguments.wide);
        } else {
            store_floats(a.out, a.finish.float_type, at, y, channels, arguments.wide);
        }
    }
};

template <Code kCode, int kTokens>
void launch_lowbit_few_tokens(const LowbitLinear& a, const StreamPlan& plan, const Launch& launch) {
    const typename LowbitFew<kCode>::Arguments arguments{a, static_cast<int>(a.rows_of_scale()),
                                                         stores_quads(a.out, a.out_pitch, a.out_bytes())};
    const StreamProblem problem = few_problem(a.t, a.n, a.k, kCode);
    launch_stream<LowbitFew<kCode>, kTokens>(plan, problem, a.q, a.q_pitch, a.codes, arguments, launch,
                                             "lowbit linear of few tokens");
}

template <Code kCode>
void launch_lowbit_few_of(const LowbitLinear& a, const StreamPlan& plan, const Launch& launch) {
    switch (plan.tokens) {
        case 16: return launch_lowbit_few_tokens<kCode, 16>(a, plan, launch);
        case 32: return launch_lowbit_few_tokens<kCode, 32>(a, plan, launch);
        case 64: return launch_lowbit_few_tokens<kCode, 64>(a, plan, launch);
        default: return launch_lowbit_few_tokens<kCode, 128>(a, plan, launch);
    }
}

}  // namespace qbert::cuda
