// What one instruction set offers: plain functions on plain pointers, one task of a parallel loop each. The drivers (linear.cpp,
// rows.cpp, attention.cpp) cut the work into tasks, give each worker its scratch memory and call these; they do not know the
// instruction set, and the kernels do not know of threads.
#pragma once

#include <stdint.h>

#include "enums.h"

namespace qbert {

enum class Isa : int;  // cpu/isa.h, which the kernels may not include: it brings the standard library along

constexpr int kStripTokens = 16;  // activations are packed by this many tokens
constexpr int kPanelLanes = 16;   // weights are packed by this many output channels
constexpr int kBlockPanels = 4;   // panels that a task of a product computes together
constexpr int kBlockChannels = kPanelLanes * kBlockPanels;
constexpr int kGatedPairs = kBlockPanels / 2;  // pairs of panels, one of each half, that a task of a gated product computes together
constexpr int kGatedChannels = kPanelLanes * kGatedPairs;
constexpr int kPanelInputs = 64;  // input channels of a packed weight are padded to a multiple of this
constexpr int kMaxStripsPerTask = 64;  // strips that a task of a product takes at most
constexpr int kWeightOnlyTokens = 64;  // tokens that a task of a weight-only product takes at most

// What is added to a weight's codes, row by row.
struct Outliers {
    const int32_t* rowptr;  // (n + 1,), or null if there are none
    const void* col;        // (count,) int16, or int32 if wide
    bool wide;
    const float* delta;     // (count,)
    int64_t count;
};

static inline int64_t column_of(const Outliers& outliers, int64_t entry) {
    return outliers.wide ? static_cast<const int32_t*>(outliers.col)[entry] : static_cast<const int16_t*>(outliers.col)[entry];
}

// The weight (n, k) of a product, or a table of n rows of embeddings. What a format has no use for is null or 0.
struct Weight {
    WeightFormat format;
    int64_t n, k;
    const void* codes;        // in `format`
    const void* codebook;     // (matrices, 16 or 8) of dictionary formats: int8 for integer products, else float32
    int64_t matrices;         // stacked, of n / matrices rows each; each has its own codebook and scale in dictionary formats
    const void* group_scale;  // (n, groups) of int4: uint8 for integer products, else bfloat16
    int64_t groups;
    const float* scale;       // (n,), or (matrices,) of dictionary formats
    Outliers outliers;        // of dictionary formats
    FloatType float_type;     // of float_rows
};

// y = activation(s (scale * (q . w) + outliers) + bias); all pointers row-major and dense unless a stride is given.
//
// The weight is in panels or int8 rows. All formats but int8 panels are expanded to these, a block of channels at a time, into the
// worker's scratch, where they stay in the cache while all tokens pass.
struct LinearArgs {
    Weight weight;
    int64_t t;              // tokens
    const int8_t* q;        // (t, k) codes
    const float* s;         // (t,) scale of each token
    const float* bias;      // (n,) float32 or null
    Activation activation;
    bool gated;             // y = activation(first half of the channels) * second half; n is a multiple of 2 kPanelLanes
    void* out;              // (t, n), or (t, n / 2) of a gated product
    int64_t blocks_ahead;   // the block so many further is read into the cache meanwhile
    bool requantize;        // to int8 with inverse_out_scale and zero; else to float_type
    FloatType float_type;
    float inverse_out_scale;
    int zero;               // code of 0
};

// Weight-only product of few tokens: y = activation(x . dequantized(w) + bias).
struct WeightOnlyArgs {
    Weight weight;           // panels; a group of int4 is a multiple of 32 channels
    int64_t t;
    const void* x;           // (t, k) with row stride x_stride elements
    int64_t x_stride;
    FloatType float_type;    // of x and out
    const float* wide_x;     // the same as (t, k_padded) float32, zeros beyond k; k_padded a multiple of kPanelInputs
    int64_t wide_stride;
    const void* bias;        // (n,) or null
    FloatType bias_type;
    Activation activation;
    void* out;               // (t, n)
};

struct AttentionArgs {
    const void* qkv;            // (t, 3 * heads * head_dim) int8 codes, or floats that are rounded to them first
    const void* queries;        // (sequences, heads * head_dim) of each first token alone; qkv are keys and values then. Or null
    const float* query_scales;  // (sequences,) of those, where qkv's scales are per token
    bool floats;
    FloatType qkv_type;         // of floats
    const float* scales;        // (3,), or of codes (t, 3); null: floats, whose scales are taken here, one for each row of a head
    bool scales_per_token;      // (t, 3), or (t, 2) beside `queries`
    int64_t heads, head_dim;
    float softmax_scale;
    int64_t window;             // a token sees keys at most so far away; below 0: all of its sequence
    const float* bias;          // (heads, 2 * reach + 1) added to scores by distance, or null
    int64_t reach;
    const float* rotary;        // (positions, head_dim) cosines and sines, of floats; or null
    void* out;                  // (t, heads * head_dim), or (sequences, ...) beside `queries`
    bool requantize;
    FloatType float_type;
    float inverse_out_scale;
};

// Queries of a sequence of so many tokens.
static inline int64_t queries_of(const AttentionArgs& args, int64_t length) { return args.queries != nullptr && length > 0 ? 1 : length; }

// Whether some query of a sequence of so many tokens does not see all of it.
static inline bool is_windowed(const AttentionArgs& args, int64_t length) { return args.window >= 0 && args.window < length - 1; }

// Queries first ... last - 1 of one head of one sequence of `length` tokens that starts at token `start`.
struct AttentionPart {
    int64_t start, length, head, first, last;
    int64_t sequence;  // its number in the batch
};

// Rows in, rows out: one task is a range of tokens.
constexpr int kScratchRows = 3;
static constexpr int64_t scratch_row_floats(int64_t k) { return (k + 15) / 16 * 16; }

struct QuantizeRowsArgs {
    int64_t k;
    const void* x;              // (t, k) with row stride x_stride elements
    int64_t x_stride;
    FloatType x_type;
    int8_t* codes;              // (t, k)
    float* scale;               // (t,)
};

struct AddNormArgs {
    int64_t k;
    const void* y;              // (t, k)
    FloatType y_type;
    const void* residual;       // (t, k)
    FloatType residual_type;    // and of `out`
    const float* gamma;
    const float* beta;
    float eps;
    Keeps keeps;                // what `out` gets: the norm, or the sum
    void* out;                  // (t, k)
    int8_t* codes;
    float* scale;
};

struct LookUpArgs {
    Weight table;               // rows
    const int64_t* ids;         // (t,), checked by the caller
    void* out;                  // (t, k)
    FloatType out_type;
};

struct EmbedNormArgs {
    Weight words;                   // rows
    Weight positions;               // float_rows, whose type `out` has too
    Weight token_types;             // float_rows
    const int64_t* ids;             // (t,)
    const int64_t* position_ids;    // (t,)
    const int64_t* token_type_ids;  // (t,)
    const float* gamma;
    const float* beta;
    float eps;
    void* out;
    int8_t* codes;
    float* scale;
};

struct Kernels {
    Isa isa;
    // Integer products. A strip is 16 tokens of q, packed as this instruction set reads them.
    int64_t (*strip_bytes)(int64_t k);
    void (*pack_strip)(const int8_t* q, int64_t rows, int64_t k, void* strip);
    int64_t (*linear_scratch_bytes)(const LinearArgs& args);
    // Output channels block * kBlockChannels ..., for strips strip_begin ... strip_end - 1, of which `strips` is the first.
    void (*linear_block)(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end,
                         void* scratch);
    // Of a gated product, results block * kGatedChannels ...
    void (*gated_block)(const LinearArgs& args, int64_t block, const void* strips, int64_t strip_begin, int64_t strip_end,
                        void* scratch);
    // Multiplies in registers only; returns how many products of two numbers it made.
    int64_t (*peak_products)(int64_t iterations);
    // Weight-only products. Tokens begin ... end - 1 of args.x to the same rows of `wide`, as args.wide_x wants them.
    void (*weight_only_widen)(const WeightOnlyArgs& args, int64_t begin, int64_t end, float* wide);
    int64_t (*weight_only_scratch_bytes)(const WeightOnlyArgs& args);
    // Output channels panel_begin * kPanelLanes ... of at most kWeightOnlyTokens tokens token_begin ... token_end - 1.
    void (*weight_only_panels)(const WeightOnlyArgs& args, int64_t panel_begin, int64_t panel_end, int64_t token_begin,
                               int64_t token_end, void* scratch);
    // Of parts of up to so many queries in sequences of up to so many tokens.
    int64_t (*attention_scratch_bytes)(const AttentionArgs& args, int64_t length, int64_t queries);
    void (*attention_part)(const AttentionArgs& args, const AttentionPart& part, void* scratch);
    // Tokens begin ... end - 1, with kScratchRows rows of scratch_row_floats(k) floats.
    void (*quantize_rows)(const QuantizeRowsArgs& args, int64_t begin, int64_t end, float* scratch);
    void (*add_norm_rows)(const AddNormArgs& args, int64_t begin, int64_t end, float* scratch);
    void (*look_up_rows)(const LookUpArgs& args, int64_t begin, int64_t end, float* scratch);
    void (*embed_norm_rows)(const EmbedNormArgs& args, int64_t begin, int64_t end, float* scratch);
};

// The kernels of an instruction set; null where this build has none for it.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx_vnni();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_amx_int8();

// The kernels in use: those of selected_isa(), or of the next lower one that this build has.
const Kernels& kernels();

}  // namespace qbert
