// Bindings of the operations on rows and of attention. Shapes and types are checked on the Python side (qbert/ops), before
// addresses are taken; numbers in tensors that say where to read (ids, bounds, outliers) are checked here.
#include <pybind11/pybind11.h>

#include "cpu/attention.h"
#include "cpu/rows.h"

namespace py = pybind11;

namespace qbert {
void bind_rows(py::module_& m);

namespace {

template <class T>
const T* at(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

template <class T>
T* to(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void call_quantize_rows(uintptr_t x, int64_t x_stride, int x_type, uintptr_t codes, uintptr_t scale, int64_t t, int64_t k,
                        int threads) {
    const QuantizeRowsArgs args{k, at<void>(x), x_stride, static_cast<FloatType>(x_type), to<int8_t>(codes), to<float>(scale)};
    quantize_rows(args, t, threads);
}

void call_add_norm_rows(uintptr_t y, int y_type, uintptr_t residual, int residual_type, uintptr_t gamma, uintptr_t beta,
                        float eps, uintptr_t out, uintptr_t codes, uintptr_t scale, int64_t t, int64_t k, int threads) {
    AddNormArgs args{};
    args.k = k;
    args.y = at<void>(y);
    args.y_type = static_cast<FloatType>(y_type);
    args.residual = at<void>(residual);
    args.residual_type = static_cast<FloatType>(residual_type);
    args.gamma = at<float>(gamma);
    args.beta = at<float>(beta);
    args.eps = eps;
    args.out = to<void>(out);
    args.codes = to<int8_t>(codes);
    args.scale = to<float>(scale);
    add_norm_rows(args, t, threads);
}

// A table of embeddings; made in Python for each call, which is cheaper than a call with twice as many arguments.
struct Table {
    TableArgs args{};
    int64_t outliers = 0;
};

Table make_table(int64_t rows, int64_t k, int format, uintptr_t data, int float_type, uintptr_t scale, int64_t groups,
                 uintptr_t codebook, uintptr_t outlier_rowptr, uintptr_t outlier_col, bool outlier_col_wide,
                 uintptr_t outlier_delta, int64_t outliers) {
    Table table;
    table.args.rows = rows;
    table.args.k = k;
    table.args.format = static_cast<TableFormat>(format);
    table.args.data = at<void>(data);
    table.args.float_type = static_cast<FloatType>(float_type);
    table.args.scale = at<void>(scale);
    table.args.groups = groups;
    table.args.codebook = at<float>(codebook);
    table.args.outlier_rowptr = at<int32_t>(outlier_rowptr);
    table.args.outlier_col = at<void>(outlier_col);
    table.args.outlier_col_wide = outlier_col_wide;
    table.args.outlier_delta = at<float>(outlier_delta);
    table.outliers = outliers;
    return table;
}

bool is_inside(const Table& table, const int64_t* ids, int64_t t) {
    return ids_are_inside(ids, t, table.args.rows) && outliers_are_inside(table.args, ids, t, table.outliers);
}

bool call_look_up_rows(const Table& table, uintptr_t ids, uintptr_t out, int out_type, int64_t t, int threads) {
    if (!is_inside(table, at<int64_t>(ids), t)) return false;
    const LookUpArgs args{table.args, at<int64_t>(ids), to<void>(out), static_cast<FloatType>(out_type)};
    look_up_rows(args, t, threads);
    return true;
}

bool call_embed_norm_rows(const Table& words, uintptr_t ids, uintptr_t position_ids, uintptr_t token_type_ids,
                          uintptr_t positions, int64_t position_rows, int positions_type, uintptr_t token_types,
                          int64_t token_type_rows, int token_types_type, uintptr_t gamma, uintptr_t beta, float eps,
                          uintptr_t out, uintptr_t codes, uintptr_t scale, int64_t t, int threads) {
    EmbedNormArgs args{};
    args.words = words.args;
    args.ids = at<int64_t>(ids);
    args.position_ids = at<int64_t>(position_ids);
    args.token_type_ids = at<int64_t>(token_type_ids);
    args.positions = at<void>(positions);
    args.token_types = at<void>(token_types);
    args.positions_type = static_cast<FloatType>(positions_type);
    args.token_types_type = static_cast<FloatType>(token_types_type);
    args.gamma = at<float>(gamma);
    args.beta = at<float>(beta);
    args.eps = eps;
    args.out = to<void>(out);
    args.codes = to<int8_t>(codes);
    args.scale = to<float>(scale);
    if (!is_inside(words, args.ids, t) || !ids_are_inside(args.position_ids, t, position_rows)) return false;
    if (!ids_are_inside(args.token_type_ids, t, token_type_rows)) return false;
    embed_norm_rows(args, t, threads);
    return true;
}

// out_type is a FloatType, or -1 for int8 with one static scale.
bool call_attention(uintptr_t qkv, uintptr_t scales, bool scales_per_token, uintptr_t cu_seqlens, int64_t sequences, int64_t t,
                    int64_t heads, int64_t head_dim, float softmax_scale, uintptr_t out, int out_type, float inverse_out_scale,
                    int threads) {
    if (!bounds_cover(at<int32_t>(cu_seqlens), sequences, t)) return false;
    AttentionArgs args{};
    args.qkv = at<int8_t>(qkv);
    args.scales = at<float>(scales);
    args.scales_per_token = scales_per_token;
    args.heads = heads;
    args.head_dim = head_dim;
    args.softmax_scale = softmax_scale;
    args.out = to<void>(out);
    args.requantize = out_type < 0;
    args.float_type = args.requantize ? FloatType::f32 : static_cast<FloatType>(out_type);
    args.inverse_out_scale = inverse_out_scale;
    attention(args, at<int32_t>(cu_seqlens), sequences, threads);
    return true;
}

}  // namespace

void bind_rows(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    py::class_<Table>(m, "Table", "A table of embeddings: see TableArgs in csrc/cpu/kernels.h; pointers are integers, or 0.")
        .def(py::init(&make_table));
    m.def("quantize_rows", &call_quantize_rows, Free(), "See QuantizeRowsArgs in csrc/cpu/kernels.h; pointers are integers.");
    m.def("add_norm_rows", &call_add_norm_rows, Free(), "See AddNormArgs in csrc/cpu/kernels.h; pointers are integers.");
    m.def("look_up_rows", &call_look_up_rows, Free(),
          "Rows of a Table; false, with nothing done, if an id or an outlier lies outside.");
    m.def("embed_norm_rows", &call_embed_norm_rows, Free(),
          "See EmbedNormArgs in csrc/cpu/kernels.h; false, with nothing done, if an id or an outlier lies outside.");
    m.def("attention", &call_attention, Free(),
          "See AttentionArgs in csrc/cpu/kernels.h; false, with nothing done, if cu_seqlens does not ascend from 0 to t.");
    m.attr("MAX_ATTENTION_TERMS") = kMaxAttentionTerms;
}

}  // namespace qbert
