// Bytes of several rows side by side, as products read them: transposed four bytes at a time with 128-bit registers, which
// every x86 CPU has and which are as fast here as longer ones.
#pragma once

#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

typedef uint8_t byte16 __attribute__((vector_size(16)));
typedef uint8_t byte16_anywhere __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t word4 __attribute__((vector_size(16)));
typedef uint64_t long2 __attribute__((vector_size(16)));
typedef uint16_t half8 __attribute__((vector_size(16)));
typedef int32_t index4 __attribute__((vector_size(16)));

QBERT_INLINE byte16 load16(const void* from) { return *static_cast<const byte16_anywhere*>(from); }
QBERT_INLINE void store16(void* to, byte16 v) { *static_cast<byte16_anywhere*>(to) = v; }

QBERT_INLINE byte16 load_some(const void* from, int64_t count) {
    uint8_t bytes[16] = {};
    memcpy(bytes, from, static_cast<size_t>(count));
    return load16(bytes);
}

// Words 0 ... 3 of four rows, to four vectors `step` bytes apart that hold one word of each row.
QBERT_INLINE void transpose_words(byte16 row0, byte16 row1, byte16 row2, byte16 row3, word4 flips, uint8_t* to, int64_t step) {
    const index4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    const long2 a = (long2)__builtin_shuffle((word4)row0, (word4)row1, low);
    const long2 b = (long2)__builtin_shuffle((word4)row0, (word4)row1, high);
    const long2 c = (long2)__builtin_shuffle((word4)row2, (word4)row3, low);
    const long2 d = (long2)__builtin_shuffle((word4)row2, (word4)row3, high);
    const long2 first = {0, 2}, second = {1, 3};
    store16(to, (byte16)((word4)__builtin_shuffle(a, c, first) ^ flips));
    store16(to + step, (byte16)((word4)__builtin_shuffle(a, c, second) ^ flips));
    store16(to + 2 * step, (byte16)((word4)__builtin_shuffle(b, d, first) ^ flips));
    store16(to + 3 * step, (byte16)((word4)__builtin_shuffle(b, d, second) ^ flips));
}

// Word r (four bytes) of 16 rows, each byte XORed with `flip`, to to[r * 64 ... r * 64 + 63] for r < quads. What lies beyond
// `rows` rows or `bytes` bytes counts as 0.
static void pack_words(const void* from, int64_t rows, int64_t bytes, int64_t stride, int64_t quads, uint8_t flip, void* to) {
    const uint8_t* row = static_cast<const uint8_t*>(from);
    uint8_t* out = static_cast<uint8_t*>(to);
    const word4 flips = word4{} + flip * 0x01010101u;
    int64_t at = 0;
    for (; at + 16 <= bytes && rows == 16; at += 16) {
        for (int64_t i = 0; i < 16; i += 4) {
            const uint8_t* four = row + i * stride + at;
            transpose_words(load16(four), load16(four + stride), load16(four + 2 * stride), load16(four + 3 * stride), flips,
                            out + at * 16 + i * 4, 64);
        }
    }
    for (; at < bytes; at += 16) {
        const int64_t count = bytes - at < 16 ? bytes - at : 16;
        alignas(16) uint8_t block[256] = {};  // of which only the words that there is room for are kept
        for (int64_t i = 0; i < 16; i += 4) {
            byte16 four[4] = {};
            for (int64_t j = 0; j < 4 && i + j < rows; ++j) four[j] = load_some(row + (i + j) * stride + at, count);
            transpose_words(four[0], four[1], four[2], four[3], flips, block + i * 4, 64);
        }
        const int64_t words = quads - at / 4 < 4 ? quads - at / 4 : 4;
        memcpy(out + at * 16, block, static_cast<size_t>(words * 64));
    }
    for (int64_t r = at / 4; r < quads; ++r) memset(out + r * 64, flip, 64);
}

// The first bytes of four rows, then the second ones, ...: 64 bytes.
QBERT_INLINE void interleave_bytes(byte16 row0, byte16 row1, byte16 row2, byte16 row3, void* to) {
    const byte16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
    const half8 low2 = {0, 8, 1, 9, 2, 10, 3, 11}, high2 = low2 + 4;
    const half8 a = (half8)__builtin_shuffle(row0, row1, low), b = (half8)__builtin_shuffle(row2, row3, low);
    const half8 c = (half8)__builtin_shuffle(row0, row1, high), d = (half8)__builtin_shuffle(row2, row3, high);
    uint8_t* out = static_cast<uint8_t*>(to);
    store16(out, (byte16)__builtin_shuffle(a, b, low2));
    store16(out + 16, (byte16)__builtin_shuffle(a, b, high2));
    store16(out + 32, (byte16)__builtin_shuffle(c, d, low2));
    store16(out + 48, (byte16)__builtin_shuffle(c, d, high2));
}

}  // namespace QBERT_ISA
}  // namespace qbert
