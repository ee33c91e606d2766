// Bindings of the operations on rows and of attention. Shapes and types are checked on the Python side (qbert/ops), before
// addresses are taken; numbers in tensors that say where to read (ids, bounds, outliers) are checked here.
#include "cpu/bind.h"

#include <algorithm>

#include "cpu/attention.h"
#include "cpu/outliers.h"
#include "cpu/rows.h"

namespace py = pybind11;

namespace qbert {
namespace {

void call_quantize_rows(uintptr_t x, int64_t x_stride, int x_type, uintptr_t codes, uintptr_t scale, int64_t t, int64_t k,
                        int threads) {
    const auto type = static_cast<FloatType>(x_type);
    const QuantizeRowsArgs args{k, at<const void>(x), x_stride, type, at<int8_t>(codes), at<float>(scale)};
    quantize_rows(args, t, threads);
}

void call_add_norm_rows(uintptr_t y, int y_type, uintptr_t residual, int residual_type, uintptr_t gamma, uintptr_t beta,
                        float eps, int keeps, uintptr_t out, uintptr_t codes, uintptr_t scale, int64_t t, int64_t k, int threads) {
    AddNormArgs args{};
    args.k = k;
    args.y = at<const void>(y);
    args.y_type = static_cast<FloatType>(y_type);
    args.residual = at<const void>(residual);
    args.residual_type = static_cast<FloatType>(residual_type);
    args.gamma = at<const float>(gamma);
    args.beta = at<const float>(beta);
    args.eps = eps;
    args.keeps = static_cast<Keeps>(keeps);
    args.out = at<void>(out);
    args.codes = at<int8_t>(codes);
    args.scale = at<float>(scale);
    add_norm_rows(args, t, threads);
}

bool is_inside(const Weight& table, const int64_t* ids, int64_t t) {
    return ids_are_inside(ids, t, table.n) && outliers_are_inside(table, ids, t);
}

bool call_look_up_rows(const Weight& weight, uintptr_t ids, uintptr_t out, int out_type, int64_t t, int threads) {
    const LookUpArgs args{weight, at<const int64_t>(ids), at<void>(out), static_cast<FloatType>(out_type)};
    if (!is_inside(args.table, args.ids, t)) return false;
    look_up_rows(args, t, threads);
    return true;
}

bool call_embed_norm_rows(const Weight& words, const Weight& positions, const Weight& token_types, uintptr_t ids,
                          uintptr_t position_ids, uintptr_t token_type_ids, uintptr_t gamma, uintptr_t beta, float eps,
                          uintptr_t out, uintptr_t codes, uintptr_t scale, int64_t t, int threads) {
    EmbedNormArgs args{};
    args.words = words;
    args.positions = positions;
    args.token_types = token_types;
    args.ids = at<const int64_t>(ids);
    args.position_ids = at<const int64_t>(position_ids);
    args.token_type_ids = at<const int64_t>(token_type_ids);
    args.gamma = at<const float>(gamma);
    args.beta = at<const float>(beta);
    args.eps = eps;
    args.out = at<void>(out);
    args.codes = at<int8_t>(codes);
    args.scale = at<float>(scale);
    if (!is_inside(words, args.ids, t)) return false;
    if (!is_inside(positions, args.position_ids, t) || !is_inside(token_types, args.token_type_ids, t)) return false;
    embed_norm_rows(args, t, threads);
    return true;
}

// qkv_type and out_type are a FloatType, or -1 for int8; window is below 0 for none.
bool call_attention(uintptr_t qkv, int qkv_type, uintptr_t scales, bool scales_per_token, uintptr_t queries,
                    uintptr_t query_scales, uintptr_t cu_seqlens, int64_t sequences, int64_t t, int64_t heads, int64_t head_dim,
                    float softmax_scale, int64_t window, uintptr_t bias, int64_t reach, uintptr_t rotary, int64_t positions,
                    uintptr_t out, int out_type, float inverse_out_scale, int threads) {
    if (!bounds_cover(at<const int32_t>(cu_seqlens), sequences, t)) return false;
    if (rotary != 0 && !positions_cover(at<const int32_t>(cu_seqlens), sequences, positions)) return false;
    AttentionArgs args{};
    args.qkv = at<const void>(qkv);
    args.queries = at<const void>(queries);
    args.query_scales = at<const float>(query_scales);
    args.floats = qkv_type >= 0;
    args.qkv_type = args.floats ? static_cast<FloatType>(qkv_type) : FloatType::f32;
    args.window = std::min(window, int64_t{1} << 31);  // longer than any sequence, and far from where sums overflow
    args.bias = at<const float>(bias);
    args.reach = reach;
    args.rotary = at<const float>(rotary);
    args.scales = at<const float>(scales);
    args.scales_per_token = scales_per_token;
    args.heads = heads;
    args.head_dim = head_dim;
    args.softmax_scale = softmax_scale;
    args.out = at<void>(out);
    args.requantize = out_type < 0;
    args.float_type = args.requantize ? FloatType::f32 : static_cast<FloatType>(out_type);
    args.inverse_out_scale = inverse_out_scale;
    attention(args, at<const int32_t>(cu_seqlens), sequences, threads);
    return true;
}

}  // namespace

void bind_rows(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    m.def("quantize_rows", &call_quantize_rows, Free(), "See QuantizeRowsArgs in csrc/cpu/kernels.h.");
    m.def("add_norm_rows", &call_add_norm_rows, Free(), "See AddNormArgs in csrc/cpu/kernels.h.");
    m.def("look_up_rows", &call_look_up_rows, Free(),
          "See LookUpArgs in csrc/cpu/kernels.h; false, with nothing done, if an id or an outlier lies outside.");
    m.def("embed_norm_rows", &call_embed_norm_rows, Free(),
          "See EmbedNormArgs in csrc/cpu/kernels.h; false, with nothing done, if an id or an outlier lies outside.");
    m.def("attention", &call_attention, Free(),
          "See AttentionArgs in csrc/cpu/kernels.h; false, with nothing done, if cu_seqlens does not ascend from 0 to t, or if "
          "a sequence has more tokens than rotary has positions.");
    m.attr("MAX_ATTENTION_TERMS") = kMaxAttentionTerms;
}

}  // namespace qbert
