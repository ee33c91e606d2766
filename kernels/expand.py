"""Packed weights to the int8 operand of an integer product, in registers: four weights an instruction or few.

A block of 128 weights of a row lies in 64 bytes (`qbert.weight.layout.rows`), so that a register of four bytes becomes two
registers of four int8 each, of the block's first and second 64 weights, and no weight moves to another thread. `join_halves`
puts the two side by side along k. Each function has two roads with the same results: PRMT for NVIDIA GPUs, in inline assembly,
and plain arithmetic for everything else (Triton's interpreter has no assembly).

Instructions for eight weights, two registers of the operand, by the first road:

    int4            7   the shift, two masks, two multiply-adds, two XORs
    3-bit codes     3   the shift, two `prmt`
    4-bit codes    11   three shifts, two logical operations, six `prmt`
"""

import triton
import triton.language as tl

HALF = tl.constexpr(64)  # weights of a block that share their bytes with as many others
BLOCK = tl.constexpr(128)


@triton.jit
def join_halves(first, second):
    """(n, 64) and (n, 64) to (n, 128), the second after the first: a renaming of registers."""
    return tl.join(first, second).permute(0, 2, 1).reshape(first.shape[0], BLOCK)


@triton.jit
def expand_int4(packed, first_scale, second_scale, PRMT: tl.constexpr):
    """Nibble halves to code * scale, int8.

    With u = code + 8 in each byte of a word, u * scale + (128 - 8 * scale) in all four bytes at once is one 32-bit
    multiply-add: each byte's final value, 128 + code * scale, is in 0 ... 255, so no carry is left between bytes whatever
    happened on the way (LiquidGEMM, Hu et al., 2025). An XOR with 128 makes it two's complement.

    Args:
        packed: (n, 64) uint8.
        first_scale, second_scale: int32 in 1 ... 18, of the two halves, of shapes that broadcast to (n, 64).

    Returns:
        Two (n, 64) int8, the first and the second 64 weights of each row.
    """
    if PRMT:
        first_scale, first_offset = tl.broadcast_to(first_scale, packed.shape), _offset(first_scale, packed)
        second_scale, second_offset = tl.broadcast_to(second_scale, packed.shape), _offset(second_scale, packed)
        # The last argument of lop3 is the truth table of (a & b) ^ c.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            lop3.b32 low, $2, 0x0F0F0F0F, 0x08080808, 0x6A;
            shr.u32 high, $2, 4;
            lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;
            mad.lo.u32 low, low, $3, $7;
            mad.lo.u32 high, high, $11, $15;
            xor.b32 $0, low, 0x80808080;
            xor.b32 $1, high, 0x80808080;
            }""",
            "=r,=r,r" + ",r" * 16, [packed, first_scale, first_offset, second_scale, second_offset],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = packed.to(tl.int32)
        first = ((((codes & 15) ^ 8) - 8) * first_scale).to(tl.int8)
        second = ((((codes >> 4) ^ 8) - 8) * second_scale).to(tl.int8)
    return first, second


@triton.jit
def _offset(scale, packed):
    """128 - 8 * scale in each of a word's four bytes, modulo 2**32."""
    return tl.broadcast_to(scale * -0x08080808 - 0x7F7F7F80, packed.shape)


@triton.jit
def expand_dictionary(packed, t0, t1, t2, t3, BITS: tl.constexpr, PRMT: tl.constexpr):
    """Select halves to dictionary[code], int8.

    `prmt` picks four of eight bytes, held in two registers, by the four nibbles of a register's low half: four look-ups
    into eight entries, and packed codes are selectors as they lie. Bit 3 of a nibble would replicate a sign instead; with
    16 entries it is masked out, both halves of the dictionary are looked up, and a third `prmt` selects by it.

    Args:
        packed: (n, 64) uint8.
        t0, t1, t2, t3: (n, 1) int32, four entries of the row's dictionary each, little-endian; with BITS = 3 the last two
            are not looked at.

    Returns:
        Two (n, 64) int8, the first and the second 64 weights of each row.
    """
    if PRMT:
        first, second = _look_up_words(packed, t0, t1, t2, t3, BITS)
    else:
        first, second = _select_nibbles(packed)
        first, second = _look_up(first, t0, t1, t2, t3, BITS), _look_up(second, t0, t1, t2, t3, BITS)
    return first, second


@triton.jit
def _look_up_words(packed, t0, t1, t2, t3, BITS: tl.constexpr):
    t0, t1 = tl.broadcast_to(t0, packed.shape), tl.broadcast_to(t1, packed.shape)
    if BITS == 3:
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 high;
            shr.u32 high, $2, 16;
            prmt.b32 $0, $3, $7, $2;
            prmt.b32 $1, $3, $7, high;
            }""",
            "=&r,=r,r" + ",r" * 8, [packed, t0, t1], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        t2, t3 = tl.broadcast_to(t2, packed.shape), tl.broadcast_to(t3, packed.shape)
        # `which` has nibble i = i, plus 4 where bit 3 of code i is set: lop3's truth table is of (a & b) | c.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 entry, which, lower, upper;
            and.b32 entry, $2, 0x77777777;
            shr.u32 which, $2, 1;
            lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;
            prmt.b32 lower, $3, $7, entry;
            prmt.b32 upper, $11, $15, entry;
            prmt.b32 $0, lower, upper, which;
            shr.u32 entry, entry, 16;
            shr.u32 which, which, 16;
            prmt.b32 lower, $3, $7, entry;
            prmt.b32 upper, $11, $15, entry;
            prmt.b32 $1, lower, upper, which;
            }""",
            "=&r,=r,r" + ",r" * 16, [packed, t0, t1, t2, t3], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return first, second


@triton.jit
def _select_nibbles(packed):
    """Codes (n, 64) int32 of the first and of the second half."""
    n: tl.constexpr = packed.shape[0]
    place = tl.arange(0, 4)[None, None, :]
    words = tl.sum(packed.reshape(n, HALF // 4, 4).to(tl.int32) << (8 * place), axis=2)[:, :, None]
    first, second = (words >> (4 * place)) & 15, (words >> (16 + 4 * place)) & 15
    return first.reshape(n, HALF), second.reshape(n, HALF)


@triton.jit
def _look_up(codes, t0, t1, t2, t3, BITS: tl.constexpr):
    word = tl.where((codes & 4) != 0, t1, t0)
    if BITS == 4:
        word = tl.where((codes & 8) != 0, tl.where((codes & 4) != 0, t3, t2), word)
    return (word >> (8 * (codes & 3))).to(tl.int8)
