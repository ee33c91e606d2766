// The enums that Python has too (qbert/ops/abi.py), with the same numbers: members are counted from 0. Each is one list, of which
// both the enum and the names that Python compares (bind_enums.h) are made.
#pragma once

namespace qbert {

#define QBERT_ACTIVATIONS(member)  \
    member(none, NONE)             \
    member(gelu, GELU)             \
    member(gelu_tanh, GELU_TANH)   \
    member(relu, RELU)             \
    member(silu, SILU)

// What the float result of an addition and its norm is.
#define QBERT_KEEPS(member) member(norm, NORM) member(sum, SUM)

#define QBERT_FLOAT_TYPES(member) member(f32, FLOAT32) member(bf16, BFLOAT16) member(f16, FLOAT16)

// How a weight lies in memory. Panels are for products: qbert/weight/layout/panels.py. Rows are (n, k), those of low-bit codes
// PLAIN bit streams that start on a byte; embeddings are looked up in them, and an integer product takes int8 ones too.
#define QBERT_WEIGHT_FORMATS(member)   \
    member(int8_panels, INT8_PANELS)   \
    member(int8_rows, INT8_ROWS)       \
    member(int4_panels, INT4_PANELS)   \
    member(dict4_panels, DICT4_PANELS) \
    member(dict3_panels, DICT3_PANELS) \
    member(float_rows, FLOAT_ROWS)     \
    member(int4_rows, INT4_ROWS)       \
    member(dict4_rows, DICT4_ROWS)     \
    member(dict3_rows, DICT3_ROWS)

#define QBERT_ENUMERATOR(name, name_in_python) name,

enum class Activation : int { QBERT_ACTIVATIONS(QBERT_ENUMERATOR) };
enum class Keeps : int { QBERT_KEEPS(QBERT_ENUMERATOR) };
enum class FloatType : int { QBERT_FLOAT_TYPES(QBERT_ENUMERATOR) };
enum class WeightFormat : int { QBERT_WEIGHT_FORMATS(QBERT_ENUMERATOR) };

#undef QBERT_ENUMERATOR

}  // namespace qbert
