// Low-bit codes to wgmma's int8 A operand, in registers: four weights an instruction or few. A thread has words of a block
// (fragments.h); step s of its four multiplies 32 columns and takes four registers of four weights, those of words 2 s and
// 2 s + 1. Registers 0 and 2 are of row g, 1 and 3 of row g + 8 of the thread's warp.
//
// Instructions for eight weights; a block has eight times as many a thread:
//
//     dict3    5.25   a shift, a mask and two prmt a word; of four such words one is put together from three, with 5 more
//     dict4   11      two look-ups and a selection for each half, the selectors of both made at once
//     int4     9      a shift, two masks, two multiply-adds, two XORs; two more for the group scale of each half
#pragma once

#include "cuda/sm90/fragments.h"
#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

inline constexpr int kSteps = 4;          // of a block
inline constexpr int kStepRegisters = 4;  // of the operand
inline constexpr int kStepColumns = 32;

// Words 4 piece ... of a thread, from a block in shared memory: one load.
template <Code kCode>
__device__ inline void load_piece(const unsigned char* block, int thread, int piece, uint32_t (&words)[thread_words(kCode)]) {
    const unsigned char* at = block + piece_start(kCode, piece, thread);
    uint32_t* to = words + 4 * piece;
    if (thread_words(kCode) - 4 * piece >= 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(at);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        to[0] = two.x, to[1] = two.y;
    }
}

// What a row's codes of a block mean. dict3, dict4: its centroids, four a register. int4: its group scales, 1 ... 18, byte s
// for step s.
template <Code kCode>
struct RowMeaning {
    uint32_t entries[1 << (code_bits(kCode) - 2)];
};
template <>
struct RowMeaning<Code::int4> {
    uint32_t scales;
};

template <Code kCode>
__device__ inline RowMeaning<kCode> load_codebook(const int8_t* codebook, int64_t matrix) {
    return reinterpret_cast<const RowMeaning<kCode>*>(codebook)[matrix];
}

// Two registers, of rows g and g + 8, by one word.
__device__ inline void expand_word(uint32_t word, const RowMeaning<Code::dict3>& row, const RowMeaning<Code::dict3>& row8, int,
                                   uint32_t* to) {
    const uint32_t selectors = word & 0x77777777;  // bit 3 would replicate a sign, and is of other codes
    to[0] = sm90::prmt(row.entries[0], row.entries[1], selectors);
    to[1] = sm90::prmt(row8.entries[0], row8.entries[1], selectors >> 16);
}

__device__ inline uint32_t look_up_16(const RowMeaning<Code::dict4>& row, uint32_t selectors, uint32_t which) {
    return sm90::prmt(sm90::prmt(row.entries[0], row.entries[1], selectors),
                      sm90::prmt(row.entries[2], row.entries[3], selectors), which);
}
__device__ inline void expand_word(uint32_t word, const RowMeaning<Code::dict4>& row, const RowMeaning<Code::dict4>& row8, int,
                                   uint32_t* to) {
    const uint32_t selectors = word & 0x77777777;
    // Byte i is of the answers of the first or the second eight entries: nibble i, plus 4 where bit 3 of code i is set.
    const uint32_t which = (word >> 1 & 0x44444444) | 0x32103210;
    to[0] = look_up_16(row, selectors, which);
    to[1] = look_up_16(row8, selectors >> 16, which >> 16);
}

// With u = code + 8 in each byte of a word, u * scale + (128 - 8 * scale) in all four bytes at once is one 32-bit multiply-add:
// each byte's final value, 128 + code * scale, is in 0 ... 255, so no carry is left between bytes whatever happened on the way
// (LiquidGEMM, Hu et al., 2025). An XOR with 128 makes it two's complement.
__device__ inline uint32_t scale_codes(uint32_t nibbles, uint32_t scale) {
    const uint32_t shifted = (nibbles & 0x0f0f0f0f) ^ 0x08080808;
    return (shifted * scale + (scale * 0xf7f7f7f8u + 0x80808080u)) ^ 0x80808080;  // modulo 2**32
}
__device__ inline void expand_word(uint32_t word, const RowMeaning<Code::int4>& row, const RowMeaning<Code::int4>& row8,
                                   int step, uint32_t* to) {
    to[0] = scale_codes(word, row.scales >> 8 * step & 0xff);
    to[1] = scale_codes(word >> 4, row8.scales >> 8 * step & 0xff);
}

// The registers of a step from the thread's words of the block.
template <Code kCode>
__device__ inline void expand_step(const uint32_t (&words)[thread_words(kCode)], const RowMeaning<kCode>& row,
                                   const RowMeaning<kCode>& row8, int step, uint32_t (&to)[kStepRegisters]) {
    if constexpr (kCode == Code::dict3) {
        const uint32_t* of_half = words + step / 2 * 3;
        if (step % 2 == 0) {
            expand_word(of_half[0], row, row8, step, to);
            expand_word(of_half[1], row, row8, step, to + 2);
        } else {
            const uint32_t fourth =
                (of_half[0] >> 3 & 0x11111111) | (of_half[1] >> 2 & 0x22222222) | (of_half[2] >> 1 & 0x44444444);
            expand_word(of_half[2], row, row8, step, to);
            expand_word(fourth, row, row8, step, to + 2);
        }
    } else {
        expand_word(words[2 * step], row, row8, step, to);
        expand_word(words[2 * step + 1], row, row8, step, to + 2);
    }
}

}  // namespace qbert::cuda
