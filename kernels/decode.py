"""Packed codes to floats, in registers: words of codes in, weights of the activations' type out, in their lane.

Two roads with the same results: inline assembly for NVIDIA GPUs, whose instructions take four bytes at a time, and plain
arithmetic for Triton's interpreter, which has no assembly. Integers become floats by way of the bits of 2**e + integer, less
2**e: instructions that convert have a quarter of the others' rate at best. Dictionaries are looked up by `prmt`, which picks
four of the eight bytes of two registers by the four nibbles of a third: one byte of the entries of four codes at a time.

Instructions for a weight, by the activations' type; all but additions and multiplications go at 64 a cycle and multiprocessor:

                                fp16    bf16    float32
    int8_rows                   1.25    2.0     2.25
    nibble_halves               1.25    1.5     3.0
    select_halves, 3 bits       1.25    1.25    3.25
    select_halves, 4 bits       2.6     2.6     5.6
    dict3_words                 1.4     1.4     3.4
"""

import triton
import triton.language as tl

INT8, NIBBLES, SELECT, WORDS3 = (
    tl.constexpr(name) for name in ("int8_rows", "nibble_halves", "select_halves", "dict3_words")
)
WORD = tl.constexpr(4)  # bytes of a register
_PARTS = {"int8_rows": 1, "nibble_halves": 2, "select_halves": 2, "dict3_words": 8}


@triton.constexpr_function
def parts_of(layout):
    """Codes for each byte of a row; in `dict3_words` for each byte of a plane."""
    return _PARTS[layout]


@triton.jit
def decode(
    words, tables, codebook_ptr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, PRMT: tl.constexpr
):
    """Codes to weights before scaling.

    Args:
        words: a tuple of one (m, w) int32 tensor of packed codes; three, one of each plane, in `dict3_words`.
        tables: what `tables_of` returned.
        codebook_ptr: (2**BITS,) float32; of dictionaries.

    Returns:
        A tuple of 4 `parts_of(LAYOUT)` tensors (m, w) of DTYPE. A part has a weight for each byte; those of bytes 0 ... 3 of
        word i are, in float32, element i of the part's four tensors. A register, though, holds two elements of a 16-bit
        type and has two weights of one word. So there tensor 2 a + b has as elements 2 u and 2 u + 1 the weights 2 b and
        2 b + 1 of word 2 u + a. The weight of part p and byte e of a block of 64 is input channel 64 p + e, in `dict3_words`
        32 (e // 4) + 4 p + e % 4.
    """
    PAIR: tl.constexpr = 1 if DTYPE.primitive_bitwidth == 32 else 2
    if PRMT:
        return tl.inline_asm_elementwise(
            _assembly(LAYOUT, BITS, DTYPE), _constraints(LAYOUT, BITS, DTYPE), words + tables,
            dtype=_types(LAYOUT, DTYPE), is_pure=True, pack=PAIR,
        )  # fmt: skip
    else:
        results = ()
        for index in tl.static_range(4 * parts_of(LAYOUT)):
            codes = _codes(words, LAYOUT, BITS, index // 4, index % 4, PAIR)
            values = codes.to(tl.float32) if LAYOUT == INT8 or LAYOUT == NIBBLES else tl.load(codebook_ptr + codes)  # noqa: SIM109
            results += (values.to(DTYPE),)
        return results


@triton.jit
def _codes(
    words, LAYOUT: tl.constexpr, BITS: tl.constexpr, part: tl.constexpr, index: tl.constexpr, PAIR: tl.constexpr
):
    """Codes (m, w) int32 of result `index` of a part, in plain arithmetic."""
    if LAYOUT == WORDS3 and part >= 6:
        packed = words[0] >> 3 & 0x11111111 | words[1] >> 2 & 0x22222222 | words[2] >> 1 & 0x44444444
    elif LAYOUT == WORDS3:
        packed = words[part // 2]
    else:
        packed = words[0]
    place = index
    if PAIR == 2:
        m: tl.constexpr = packed.shape[0]
        w: tl.constexpr = packed.shape[1]
        even, odd = tl.split(packed.reshape(m, w // 2, 2))
        packed = tl.broadcast_to((even if index < 2 else odd)[:, :, None], (m, w // 2, 2)).reshape(m, w)
        place = index % 2 * 2 + (tl.arange(0, w) % 2)[None, :]
    if LAYOUT == INT8:
        return packed << (24 - 8 * place) >> 24
    elif LAYOUT == NIBBLES:
        return packed << (28 - 8 * place - 4 * part) >> 28
    elif LAYOUT == SELECT:
        return packed >> (4 * place + 16 * part) & (2**BITS - 1)
    else:
        return packed >> (4 * place + 16 * (part % 2)) & 7


@triton.jit
def tables_of(codebook_ptr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, PRMT: tl.constexpr):
    """The bytes of a dictionary's entries as DTYPE: of each four entries an int32 of first bytes, one of second bytes ..."""
    tables = ()
    if PRMT and not (LAYOUT == INT8 or LAYOUT == NIBBLES):  # noqa: SIM109
        for first in tl.static_range(0, 2**BITS, WORD):
            for byte in tl.static_range(DTYPE.primitive_bitwidth // 8):
                table = 0
                for entry in tl.static_range(WORD):
                    value = tl.load(codebook_ptr + first + entry).to(DTYPE)
                    table |= ((_bits(value) >> (8 * byte)) & 255) << (8 * entry)
                tables += (table,)
    return tables


@triton.jit
def _bits(value):
    if value.dtype == tl.float32:
        return value.to(tl.int32, bitcast=True)
    else:
        return value.to(tl.int16, bitcast=True).to(tl.int32)


# ---- assembly -------------------------------------------------------------------------------------------------------
# A call takes two words of codes (one for float32), so that its results fill registers of two 16-bit types. Operands: four
# results a part, then the words, then the tables, which like all scalars come as often as there are words.


@triton.constexpr_function
def _types(layout, dtype):
    return (dtype,) * (4 * _PARTS[layout])


@triton.constexpr_function
def _counts(layout, bits, dtype):
    """Operands of a call: results, kinds of words, tables; and how many words of each kind."""
    size = dtype.primitive_bitwidth // 8
    tables = size * 2**bits // 4 if layout in ("select_halves", "dict3_words") else 0
    return 4 * _PARTS[layout], 3 if layout == "dict3_words" else 1, tables, 4 // size


@triton.constexpr_function
def _constraints(layout, bits, dtype):
    results, words, tables, pair = _counts(layout, bits, dtype)
    return ",".join(["=&r"] * results + ["r"] * (pair * (words + tables)))


@triton.constexpr_function
def _assembly(layout, bits, dtype):
    results, words, _, pair = _counts(layout, bits, dtype)
    size = dtype.primitive_bitwidth // 8
    lines = [".reg .b32 s, t, u, minus, times, which, b0, b1, b2, b3;"]
    for i in range(pair):
        out = [f"${4 * part + size * i + j}" for part in range(_PARTS[layout]) for j in range(size)]
        codes = [f"${results + pair * word + i}" for word in range(words)]
        if layout == "int8_rows":
            lines += _int8(out, codes[0], dtype.name)
        elif layout == "nibble_halves":
            lines += _int4(out, codes[0], dtype.name)
        else:
            lines += _dictionary(out, codes, (results + pair * words, pair), bits, size)
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _int8(out, codes, dtype):
    """Bytes, sign bits flipped, behind the bits of 1024 or 2**23; for bfloat16 seven bits of them behind those of 128."""
    lines = [f"xor.b32 s, {codes}, 0x80808080;"]
    if dtype == "fp16":
        lines.append("mov.b32 minus, 0x64806480;")  # 1024 + 128
        for result, pick in zip(out, ("0x4140", "0x4342"), strict=True):
            lines += [f"prmt.b32 t, s, 0x64646464, {pick};", f"sub.f16x2 {result}, t, minus;"]
    elif dtype == "fp32":
        for byte, result in enumerate(out):  # 2**23 + 128
            lines += [f"prmt.b32 t, s, 0x4B000000, 0x744{byte};", f"sub.f32 {result}, t, 0f4B000080;"]
    else:  # the low seven bits, less 128 or, with the sign bit as it was, 256
        lines = ["mov.b32 minus, 0xBF80BF80;"]  # -1
        for result, pick in zip(out, ("0x4140", "0x4342"), strict=True):
            lines += [f"prmt.b32 s, {codes}, 0x43434343, {pick};", "and.b32 t, s, 0xFF7FFF7F;"]
            lines += ["and.b32 u, s, 0xFF80FF80;", f"fma.rn.bf16x2 {result}, u, minus, t;"]
    return lines


@triton.constexpr_function
def _int4(out, codes, dtype):
    """Nibbles behind the bits of 1024, 128 or 2**23, their sign bits flipped by lop3: 0x6A is the table of (a & b) ^ c."""
    lines = []
    if dtype == "fp32":
        for i, result in enumerate(out):
            lines += [f"shr.u32 s, {codes}, {8 * (i % 4) + 4 * (i // 4)};", "lop3.b32 s, s, 0xF, 0x4B000008, 0x6A;"]
            lines.append(f"sub.f32 {result}, s, 0f4B000008;")
        return lines
    for low, high, pick in ((out[0], out[2], "0x4140"), (out[1], out[3], "0x4342")):
        lines.append(f"prmt.b32 s, {codes}, 0, {pick};")
        if dtype == "fp16":  # a high nibble counts 16: (1024 + 16 u) / 16 - (64 + 8)
            lines += ["lop3.b32 t, s, 0x000F000F, 0x64086408, 0x6A;", "lop3.b32 u, s, 0x00F000F0, 0x64806480, 0x6A;"]
            lines += ["mov.b32 minus, 0x64086408;", f"sub.f16x2 {low}, t, minus;"]
            lines += ["mov.b32 times, 0x2C002C00;", "mov.b32 minus, 0xD480D480;"]
            lines.append(f"fma.rn.f16x2 {high}, u, times, minus;")
        else:
            lines += ["shr.u32 u, s, 4;", "mov.b32 times, 0x3F803F80;", "mov.b32 minus, 0xC308C308;"]  # 1, -(128 + 8)
            for nibble, result in (("s", low), ("u", high)):
                lines.append(f"lop3.b32 t, {nibble}, 0x000F000F, 0x43084308, 0x6A;")
                lines.append(f"fma.rn.bf16x2 {result}, t, times, minus;")
    return lines


@triton.constexpr_function
def _dictionary(out, codes, tables, bits, size):
    """A word is two selectors, of four nibbles each; the fourth bits of three words are another word's.

    Args:
        tables: the number of the first table's operand, and from one table's to the next.
    """
    lines = []
    for i, word in enumerate(codes):
        lines.append(f"and.b32 s, {word}, 0x77777777;")
        if (
            bits == 4
        ):  # nibble i of `which`: i, and 4 more where the code is 8 or more; 0xEA is the table of (a & b) | c
            lines += [f"shr.u32 which, {word}, 1;", "lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;"]
        lines += _look_up_word(out[2 * size * i :], tables, bits, size)
    if len(codes) == 3:  # 0xE4: a's bits where c has ones, b's elsewhere
        lines.append(f"shr.u32 s, {codes[0]}, 1;")
        for word in codes[1:]:
            lines += [f"lop3.b32 s, {word}, s, 0x88888888, 0xE4;", "shr.u32 s, s, 1;"]
        lines += ["and.b32 s, s, 0x77777777;", *_look_up_word(out[6 * size :], tables, bits, size)]
    return lines


@triton.constexpr_function
def _look_up_word(out, tables, bits, size):
    """Entries of the eight codes in s. Its high half comes down by multiplication: shifts would share prmt's lanes."""
    down = [f"mul.hi.u32 {register}, {register}, 0x10000;" for register in ("s", "which")[: bits - 2]]
    return [*_look_up(out, tables, bits, size), *down, *_look_up(out[size:], tables, bits, size)]


@triton.constexpr_function
def _look_up(out, tables, bits, size):
    """Entries of the four codes in s's low half: their bytes in turn, with 16 entries by halves, then put together."""
    lines = []
    for byte in range(size):
        low, high, low8, high8 = (f"${tables[0] + tables[1] * (size * four + byte)}" for four in range(4))
        lines.append(f"prmt.b32 b{byte}, {low}, {high}, s;")
        if bits == 4:
            lines += [f"prmt.b32 t, {low8}, {high8}, s;", f"prmt.b32 b{byte}, b{byte}, t, which;"]
    if size == 2:
        return [*lines, f"prmt.b32 {out[0]}, b0, b1, 0x5140;", f"prmt.b32 {out[1]}, b0, b1, 0x7362;"]
    for half, pick in enumerate(("0x5140", "0x7362")):
        lines += [f"prmt.b32 t, b0, b1, {pick};", f"prmt.b32 u, b2, b3, {pick};"]
        lines += [f"prmt.b32 {out[2 * half]}, t, u, 0x5410;", f"prmt.b32 {out[2 * half + 1]}, t, u, 0x7632;"]
    return lines
