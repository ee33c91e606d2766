// Packed codes to 16-bit floats in registers, as wgmma takes its A operand: Layout.FRAGMENTS_F16 (qbert/weight/layout/fragments.py).
//
// A thread has words of a block of 64 x 128; step s of its eight multiplies 16 columns and takes four registers of two weights:
// a[h] and a[h + 2] of row g + 8 h. Integers become floats by way of the bits of 2**e + integer, less 2**e: conversions have a
// fraction of these instructions' rate.
//
// Instructions of the expansion alone for a weight, of which prmt, logic and shifts go at 64 a cycle and SM, loads
// from shared memory at 32, the rest at 128 (an H100's memory brings 14.5 codes of 8 bits, 29 of 4 or 39 of 3 bits in a cycle):
//
//                prmt, logic, shifts      sums, products      loads of a table
//     int8       0.75 (bf16 1.5)          0.5                 -
//     int4       0.9                      1.0                 -
//     dict4      1.0                      -                   0.5
//     dict3      1.4                      -                   -
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/sm90/expand_float.h"
#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

// ---- two 16-bit floats in a register ----------------------------------------------------------------------------------

template <class Float>
struct PairOf;
template <>
struct PairOf<sm90::Half> {
    using Type = __half2;
    static constexpr uint32_t kOneUlp = 0x6400;  // 1024, whose last bit counts 1
    static __device__ uint16_t round(float value) { return __half_as_ushort(__float2half_rn(value)); }
};
template <>
struct PairOf<sm90::BFloat> {
    using Type = __nv_bfloat162;
    static constexpr uint32_t kOneUlp = 0x4300;  // 128
    static __device__ uint16_t round(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

template <class Float>
__device__ typename PairOf<Float>::Type as_pair(uint32_t bits) {
    typename PairOf<Float>::Type pair;
    memcpy(&pair, &bits, sizeof(bits));
    return pair;
}
template <class Pair>
__device__ uint32_t bits_of(const Pair& pair) {
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
template <class Float>
__device__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    return bits_of(__hsub2(as_pair<Float>(a), as_pair<Float>(b)));
}
template <class Float>
__device__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return bits_of(__hmul2(as_pair<Float>(a), as_pair<Float>(b)));
}
// A bfloat16 number twice.
template <class Float>
__device__ uint32_t both(uint16_t bfloat) {
    if constexpr (std::is_same_v<Float, sm90::BFloat>) {
        return bfloat * 0x10001u;
    } else {
        return bits_of(__float2half2_rn(__uint_as_float(uint32_t{bfloat} << 16)));
    }
}

// ---- int8 -------------------------------------------------------------------------------------------------------------

template <class Float>
__device__ void expand_int8(uint32_t word, uint32_t& low, uint32_t& high);
// The sign bits flipped, a byte is code + 128, behind the bits of 1024.
template <>
__device__ inline void expand_int8<sm90::Half>(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t flipped = word ^ 0x80808080;
    low = subtract_pairs<sm90::Half>(sm90::prmt(flipped, 0x64646464, 0x4140), 0x64806480);
    high = subtract_pairs<sm90::Half>(sm90::prmt(flipped, 0x64646464, 0x4342), 0x64806480);
}
// bfloat16 has room for seven bits: 128 + those, less 128, or 256 where the eighth is set (it is the exponent's last).
template <>
__device__ inline void expand_int8<sm90::BFloat>(uint32_t word, uint32_t& low, uint32_t& high) {
    const auto value = [](uint32_t bytes) {
        return subtract_pairs<sm90::BFloat>(bytes & 0xff7fff7f, bytes & 0xff80ff80);
    };
    low = value(sm90::prmt(word, 0x43434343, 0x4140));
    high = value(sm90::prmt(word, 0x43434343, 0x4342));
}

// ---- int4 -------------------------------------------------------------------------------------------------------------

// Codes of a word at nibbles `kAt` and `kAt` + 4: code + 8 behind the bits of 1024 or 128, less 1032 or 136.
template <class Float, int kAt>
__device__ uint32_t expand_int4(uint32_t word) {
    constexpr uint32_t kZero = (PairOf<Float>::kOneUlp + 8) * 0x10001u;
    return subtract_pairs<Float>(sm90::lop3_and_xor(word >> (4 * kAt), 0x000f000f, kZero), kZero);
}

// ---- codebooks -----------------------------------------------------------------------------------------------------

// A codebook of eight numbers in four registers: their first bytes and their second bytes.
struct Codebook8 {
    uint32_t first[2], second[2];
};
template <class Float>
__device__ Codebook8 load_codebook8(const float* codebook) {
    Codebook8 made{};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = PairOf<Float>::round(codebook[i]);
        made.first[i / 4] |= (bits & 0xff) << (i % 4 * 8);
        made.second[i / 4] |= (bits >> 8) << (i % 4 * 8);
    }
    return made;
}
// The word of which three words' fourth bits are.
__device__ inline uint32_t fourth_word(const uint32_t* words) {
    return (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
}
// By multiplication: a shift would share prmt's lanes.
__device__ inline uint32_t high_half(uint32_t word) { return __umulhi(word, 0x10000); }
// The numbers of four codes, in nibbles (below 8) of the selector's low half.
__device__ inline void look_up(const Codebook8& codebook, uint32_t selector, uint32_t& low, uint32_t& high) {
    const uint32_t first = sm90::prmt(codebook.first[0], codebook.first[1], selector);
    const uint32_t second = sm90::prmt(codebook.second[0], codebook.second[1], selector);
    low = sm90::prmt(first, second, 0x5140);
    high = sm90::prmt(first, second, 0x7362);
}

// Sixteen numbers do not fit prmt (it would take 2.6 instructions a weight), so pairs of them are looked up in shared memory:
// an entry for each byte of codes, a copy for each lane, so that no two lanes ever want the same bank. Filled by so many
// threads, a multiple of 8, of which this is `thread`; a barrier follows.
template <class Float>
__device__ void fill_pair_table(unsigned char* table, const float* codebook, int thread, int threads) {
    constexpr int kStores = kPairStride / 16;  // of an entry
#pragma unroll 4
    for (int entry = thread / kStores; entry < kPairEntries; entry += threads / kStores) {
        const uint32_t pair = PairOf<Float>::round(codebook[entry % 16]) |
                              uint32_t{PairOf<Float>::round(codebook[entry / 16])} << 16;
        *reinterpret_cast<uint4*>(table + entry * kPairStride + thread % kStores * 16) = uint4{pair, pair, pair, pair};
    }
}
// Byte kByte of a word of codes as two numbers; `lane_bytes` is 4 times the lane.
template <int kByte>
__device__ uint32_t look_up_pair(const unsigned char* table, uint32_t word, uint32_t lane_bytes) {
    const uint32_t aligned = kByte == 0 ? word << 7 : word >> (8 * kByte - 7);  // the byte times the stride
    return *reinterpret_cast<const uint32_t*>(table + ((aligned & (kPairTableBytes - kPairStride)) | lane_bytes));
}

}  // namespace qbert::cuda
