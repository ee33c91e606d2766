// Rows of floats: quantization per token, residual plus LayerNorm, look-ups. Codes and looked-up values exactly, norms against double.
#include "cpu/rows.h"

#include "cpu/outliers.h"

#include "check.h"
#include "data.h"

namespace {

using namespace qbert;
using data::Buffer;
using data::Floats;
using data::Random;

const FloatType kTypes[] = {FloatType::f32, FloatType::bf16, FloatType::f16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t some_k(Random& random) { return random.one_of<int64_t>({1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 100, 130}); }

Buffer<float> row_scratch(int64_t k) { return Buffer<float>(kScratchRows * scratch_row_floats(k)); }

// Values of a hidden state: some rows are tiny, huge, all zero, constant, or hold NaN or infinity.
Floats some_rows(Random& random, FloatType type, int64_t t, int64_t k, int64_t stride, bool finite) {
    Floats x(type, t == 0 ? 0 : (t - 1) * stride + k, random.between(0, 3));
    for (int64_t i = 0; i < (t == 0 ? 0 : (t - 1) * stride + k); ++i) x.set(i, kNan);  // what lies between rows is not theirs
    for (int64_t row = 0; row < t; ++row) {
        const double size = random.one_of({1.0, 1.0, 0.01, 1000.0}), constant = random.once_in(8) ? random.normal() : kNan;
        const bool zero = random.once_in(8);
        for (int64_t c = 0; c < k; ++c) {
            x.set(row * stride + c, zero ? 0 : std::isnan(constant) ? size * random.normal() : constant);
        }
        if (!finite && random.once_in(4)) {
            x.set(row * stride + random.between(0, k - 1), random.one_of<double>({kNan, INFINITY, -INFINITY}));
        }
    }
    return x;
}

Buffer<float> some_floats(Random& random, int64_t count, double mean, double deviation) {
    Buffer<float> out(count, random.between(0, 3));
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(mean + deviation * random.normal());
    return out;
}

// Codes and scale that quantize_per_token gives for a float32 row.
void quantize(const std::vector<float>& row, std::vector<int8_t>& codes, float& scale) {
    float absmax = 0;
    bool finite = true;
    for (float x : row) {
        finite &= std::isfinite(x);
        absmax = std::fmax(absmax, std::fabs(x));
    }
    codes.assign(row.size(), 0);
    scale = kNan;
    if (!finite) return;
    absmax = std::fmax(absmax, 0x1p-100f);
    const float inverse = 127.0f / absmax;
    scale = absmax / 127.0f;
    for (size_t c = 0; c < row.size(); ++c) {
        codes[c] = static_cast<int8_t>(std::fmax(-127.0f, std::fmin(127.0f, std::nearbyint(row[c] * inverse))));
    }
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void check_codes(const std::vector<float>& row, const int8_t* codes, float scale) {
    std::vector<int8_t> expected;
    float expected_scale;
    quantize(row, expected, expected_scale);
    CHECK(same(scale, expected_scale));
    for (size_t c = 0; c < row.size(); ++c) CHECK_EQ(codes[c], expected[c]);
}

// The rows of `out`, with codes and scales, are LayerNorm of `total` (t, k).
struct Normed {
    Floats out;
    Buffer<int8_t> codes;
    Buffer<float> scale;

    Normed(FloatType type, int64_t t, int64_t k) : out(type, t * k), codes(t * k), scale(t) {}

    bool operator==(const Normed& other) const {
        return std::memcmp(out.bytes.data(), other.out.bytes.data(), static_cast<size_t>(out.bytes.size())) == 0 &&
               std::memcmp(codes.data(), other.codes.data(), static_cast<size_t>(codes.size())) == 0 &&
               std::memcmp(scale.data(), other.scale.data(), static_cast<size_t>(scale.bytes())) == 0;
    }

    void check_row(int64_t t, const std::vector<double>& total, const float* gamma, const float* beta, double eps) const {
        const auto k = static_cast<int64_t>(total.size());
        double mean = 0, variance = 0, largest = 0;
        for (double x : total) mean += x / static_cast<double>(k);
        for (double x : total) variance += (x - mean) * (x - mean) / static_cast<double>(k);
        for (double x : total) largest = std::fmax(largest, std::fabs(x));
        const double inverse = 1 / std::sqrt(variance + eps);
        std::vector<float> row(total.size());
        for (int64_t c = 0; c < k; ++c) {
            const double y = (total[c] - mean) * inverse * gamma[c] + beta[c], found = out.get(t * k + c);
            row[c] = static_cast<float>(found);
            if (std::isnan(y)) {
                CHECK(std::isnan(found));
                continue;
            }
            // What float32 sums leave of the mean and of the difference from it, enlarged by 1 / deviation.
            const double allowed = std::fabs(gamma[c]) * (3e-6 * (std::fabs(y) + 1) + largest * inverse * 5e-7) + 1e-6 * std::fabs(beta[c]);
            if (std::fabs(found - y) > allowed + out.rounding(y)) {
                std::ostringstream message;
                message << "norm of k " << k << " channel " << c << ": " << found << ", exact " << y << " +- " << allowed;
                check::fail(__FILE__, __LINE__, message.str());
            }
        }
        // Codes are those of the norm before it is rounded to a half type, so only float32 tells them exactly.
        if (out.type == FloatType::f32) check_codes(row, codes.data() + t * k, scale[t]);
        if (std::isnan(row[0]) || out.type == FloatType::f32) return;
        for (int64_t c = 0; c < k; ++c) CHECK(std::fabs(codes[t * k + c] * scale[t] - row[c]) <= 0.51 * scale[t] + 0.01 * std::fabs(row[c]));
    }
};

struct Table {
    Weight weight{};
    Floats floats;
    Buffer<uint8_t> streams;
    Buffer<int8_t> int8_rows;
    Buffer<float> scale, codebook;
    Buffer<uint16_t> group_scale;
    data::Outliers outliers;
    std::vector<float> values;  // (rows, k)

    Table(Random& random, WeightFormat format, int64_t rows, int64_t k) {
        weight.n = rows;
        weight.k = k;
        weight.format = format;
        values.resize(static_cast<size_t>(rows * k));
        switch (format) {
            case WeightFormat::float_rows: make_floats(random); break;
            case WeightFormat::int8_rows: make_int8(random); break;
            case WeightFormat::int4_rows: make_int4(random); break;
            case WeightFormat::dict4_rows: make_dictionary(random, 4); break;
            default: make_dictionary(random, 3); break;
        }
    }

    void make_floats(Random& random) {
        weight.float_type = random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        floats = some_rows(random, weight.float_type, weight.n, weight.k, weight.k, false);
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(floats.get(static_cast<int64_t>(i)));
        weight.codes = floats.bytes.data();
    }

    void make_int8(Random& random) {
        int8_rows = Buffer<int8_t>(weight.n * weight.k, random.between(0, 3));
        scale = some_floats(random, weight.n, 0.01, 0.001);
        for (int64_t i = 0; i < int8_rows.size(); ++i) {
            int8_rows[i] = static_cast<int8_t>(random.between(-127, 127));
            values[i] = static_cast<float>(int8_rows[i]) * scale[i / weight.k];
        }
        weight.codes = int8_rows.data();
        weight.scale = scale.data();
    }

    std::vector<uint8_t> some_codes(Random& random, int bits) {
        std::vector<uint8_t> codes(values.size());
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.between(0, (1 << bits) - 1));
        streams = data::pack_streams(codes.data(), weight.n, weight.k, bits);
        weight.codes = streams.data();
        return codes;
    }

    void make_int4(Random& random) {
        const std::vector<uint8_t> codes = some_codes(random, 4);
        weight.groups = weight.k % 3 == 0 ? 3 : weight.k % 2 == 0 && random.once_in(2) ? weight.k / 2 : 1;
        group_scale = Buffer<uint16_t>(weight.n * weight.groups);
        for (int64_t i = 0; i < group_scale.size(); ++i) group_scale[i] = data::to_half(random.uniform(0.001, 0.1), FloatType::bf16);
        for (int64_t i = 0; i < weight.n * weight.k; ++i) {
            const uint16_t group = group_scale[i / weight.k * weight.groups + i % weight.k / (weight.k / weight.groups)];
            values[i] = static_cast<float>((codes[i] ^ 8) - 8) * static_cast<float>(data::to_double(group, FloatType::bf16));
        }
        weight.group_scale = group_scale.data();
    }

    void make_dictionary(Random& random, int bits) {
        const std::vector<uint8_t> codes = some_codes(random, bits);
        codebook = some_floats(random, 1 << bits, 0, 0.05);
        outliers = data::Outliers(random, weight.n, weight.k, 0.5);
        for (size_t i = 0; i < codes.size(); ++i) values[i] = codebook[codes[i]];
        for (int64_t row = 0; row < weight.n; ++row) {
            for (int64_t e = outliers.rowptr[row]; e < outliers.rowptr[row + 1]; ++e) values[row * weight.k + outliers.column(e)] += outliers.delta[e];
        }
        weight.codebook = codebook.data();
        weight.outliers = outliers.as_argument();
    }
};

const WeightFormat kTableFormats[] = {WeightFormat::float_rows, WeightFormat::int8_rows, WeightFormat::int4_rows,
                                      WeightFormat::dict4_rows, WeightFormat::dict3_rows};

Weight float_rows(const Floats& rows, int64_t n, int64_t k) {
    Weight weight{};
    weight.format = WeightFormat::float_rows;
    weight.n = n;
    weight.k = k;
    weight.codes = rows.bytes.data();
    weight.float_type = rows.type;
    return weight;
}

Buffer<int64_t> some_ids(Random& random, int64_t count, int64_t rows) {
    Buffer<int64_t> ids(count);
    for (int64_t i = 0; i < count; ++i) ids[i] = random.once_in(3) ? rows - 1 : random.between(0, rows - 1);
    return ids;
}

}  // namespace

TEST(rows_kernels_quantize_exactly) {
    Random random(11);
    for (int i = 0; i < 200; ++i) {
        const int64_t t = random.between(1, 5), k = some_k(random), stride = k + random.one_of<int64_t>({0, 0, 1, 19});
        const Floats x = some_rows(random, kTypes[i % 3], t, k, stride, false);
        for (const Kernels* kernels : data::usable_kernels()) {
            const Buffer<int8_t> codes(t * k);
            const Buffer<float> scale(t);
            QuantizeRowsArgs args{};
            args.k = k;
            args.x = x.bytes.data();
            args.x_stride = stride;
            args.x_type = x.type;
            args.codes = codes.data();
            args.scale = scale.data();
            const Buffer<float> row = row_scratch(k);
            kernels->quantize_rows(args, 0, t / 2, row.data());
            kernels->quantize_rows(args, t / 2, t, row.data());
            for (int64_t token = 0; token < t; ++token) {
                std::vector<float> values;
                for (int64_t c = 0; c < k; ++c) values.push_back(static_cast<float>(x.get(token * stride + c)));
                check_codes(values, codes.data() + token * k, scale[token]);
            }
        }
    }
}

TEST(rows_kernels_add_and_norm) {
    Random random(12);
    for (int i = 0; i < 200; ++i) {
        const int64_t t = random.between(1, 5), k = some_k(random);
        const Floats y = some_rows(random, kTypes[i % 3], t, k, k, false), residual = some_rows(random, kTypes[i / 3 % 3], t, k, k, false);
        const Buffer<float> gamma = some_floats(random, k, 1, 0.3), beta = some_floats(random, k, 0, 0.3);
        AddNormArgs args{};
        args.k = k;
        args.y = y.bytes.data();
        args.y_type = y.type;
        args.residual = residual.bytes.data();
        args.residual_type = residual.type;
        args.gamma = gamma.data();
        args.beta = beta.data();
        args.eps = 1e-6f;
        std::unique_ptr<Normed> first;
        for (const Kernels* kernels : data::usable_kernels()) {
            auto found = std::make_unique<Normed>(residual.type, t, k);
            args.out = found->out.bytes.data();
            args.codes = found->codes.data();
            args.scale = found->scale.data();
            const Buffer<float> row = row_scratch(k);
            kernels->add_norm_rows(args, 0, 1, row.data());
            kernels->add_norm_rows(args, 1, t, row.data());
            for (int64_t token = 0; token < t && first == nullptr; ++token) {
                std::vector<double> total;
                for (int64_t c = token * k; c < (token + 1) * k; ++c) {
                    total.push_back(static_cast<float>(y.get(c)) + static_cast<float>(residual.get(c)));
                }
                found->check_row(token, total, gamma.data(), beta.data(), args.eps);
            }
            if (first == nullptr) first = std::move(found);
            else CHECK(*first == *found);
        }
    }
}

TEST(rows_kernels_look_up_exactly) {
    Random random(13);
    for (int i = 0; i < 200; ++i) {
        const int64_t t = random.between(1, 6), k = some_k(random);
        const Table table(random, kTableFormats[i % 5], random.between(1, 9), k);
        const Buffer<int64_t> ids = some_ids(random, t, table.weight.n);
        for (const Kernels* kernels : data::usable_kernels()) {
            const Floats out(kTypes[i % 3], t * k, random.between(0, 3));
            LookUpArgs args{};
            args.table = table.weight;
            args.ids = ids.data();
            args.out = out.bytes.data();
            args.out_type = out.type;
            const Buffer<float> row = row_scratch(k);
            kernels->look_up_rows(args, 0, t, row.data());
            Floats expected(out.type, 1);
            for (int64_t e = 0; e < t * k; ++e) {
                expected.set(0, table.values[ids[e / k] * k + e % k]);
                CHECK(same(static_cast<float>(out.get(e)), static_cast<float>(expected.get(0))));
            }
        }
    }
}

TEST(rows_kernels_embed_and_norm) {
    Random random(14);
    for (int i = 0; i < 150; ++i) {
        const int64_t t = random.between(1, 5), k = some_k(random), places = random.between(1, 7), types = random.between(1, 2);
        const Table table(random, kTableFormats[i % 5], random.between(1, 9), k);
        const Floats positions = some_rows(random, kTypes[i % 3], places, k, k, true), kinds = some_rows(random, kTypes[i / 3 % 3], types, k, k, true);
        const Buffer<int64_t> ids = some_ids(random, t, table.weight.n), place = some_ids(random, t, places), kind = some_ids(random, t, types);
        const Buffer<float> gamma = some_floats(random, k, 1, 0.3), beta = some_floats(random, k, 0, 0.3);
        EmbedNormArgs args{};
        args.words = table.weight;
        args.ids = ids.data();
        args.position_ids = place.data();
        args.token_type_ids = kind.data();
        args.positions = float_rows(positions, places, k);
        args.token_types = float_rows(kinds, types, k);
        args.gamma = gamma.data();
        args.beta = beta.data();
        args.eps = 1e-6f;
        std::unique_ptr<Normed> first;
        for (const Kernels* kernels : data::usable_kernels()) {
            auto found = std::make_unique<Normed>(positions.type, t, k);
            args.out = found->out.bytes.data();
            args.codes = found->codes.data();
            args.scale = found->scale.data();
            const Buffer<float> row = row_scratch(k);
            kernels->embed_norm_rows(args, 0, t, row.data());
            for (int64_t token = 0; token < t && first == nullptr; ++token) {
                std::vector<double> total;
                for (int64_t c = 0; c < k; ++c) {
                    const float sum = table.values[ids[token] * k + c] + static_cast<float>(kinds.get(kind[token] * k + c));
                    total.push_back(sum + static_cast<float>(positions.get(place[token] * k + c)));
                }
                found->check_row(token, total, gamma.data(), beta.data(), args.eps);
            }
            if (first == nullptr) first = std::move(found);
            else CHECK(*first == *found);
        }
    }
}

TEST(rows_drivers_give_the_same_bits_with_any_number_of_threads) {
    Random random(15);
    const int64_t t = 700, k = 100, rows = 30;
    const Floats x = some_rows(random, FloatType::f32, t, k, k, false), residual = some_rows(random, FloatType::bf16, t, k, k, false);
    const Table table(random, WeightFormat::dict3_rows, rows, k);
    const Buffer<int64_t> ids = some_ids(random, t, rows);
    const Buffer<float> gamma = some_floats(random, k, 1, 0.3), beta = some_floats(random, k, 0, 0.3);
    std::unique_ptr<Normed> first_codes, first_norm, first_embedding;
    for (int threads : {1, 2, 5}) {
        auto codes = std::make_unique<Normed>(FloatType::f32, t, k), norm = std::make_unique<Normed>(FloatType::bf16, t, k);
        auto embedding = std::make_unique<Normed>(FloatType::f32, t, k);
        const QuantizeRowsArgs quantize_args{k, x.bytes.data(), k, x.type, codes->codes.data(), codes->scale.data()};
        quantize_rows(quantize_args, t, threads);
        const LookUpArgs look_up_args{table.weight, ids.data(), codes->out.bytes.data(), FloatType::f32};
        look_up_rows(look_up_args, t, threads);
        const AddNormArgs add_args{k, x.bytes.data(), x.type, residual.bytes.data(), residual.type, gamma.data(), beta.data(), 1e-5f,
                                   Keeps::norm, norm->out.bytes.data(), norm->codes.data(), norm->scale.data()};
        add_norm_rows(add_args, t, threads);
        EmbedNormArgs embed_args{};
        embed_args.words = table.weight;
        embed_args.ids = embed_args.position_ids = embed_args.token_type_ids = ids.data();
        embed_args.positions = embed_args.token_types = float_rows(x, t, k);
        embed_args.gamma = gamma.data();
        embed_args.beta = beta.data();
        embed_args.eps = 1e-5f;
        embed_args.out = embedding->out.bytes.data();
        embed_args.codes = embedding->codes.data();
        embed_args.scale = embedding->scale.data();
        embed_norm_rows(embed_args, t, threads);
        CHECK(first_codes == nullptr || *first_codes == *codes);
        CHECK(first_norm == nullptr || *first_norm == *norm);
        CHECK(first_embedding == nullptr || *first_embedding == *embedding);
        first_codes = std::move(codes);
        first_norm = std::move(norm);
        first_embedding = std::move(embedding);
    }
}

TEST(rows_indices_are_judged) {
    Random random(16);
    const int64_t rows = 6, k = 20;
    for (int64_t wrong : {int64_t{-1}, rows, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
        const Buffer<int64_t> ids = some_ids(random, 50, rows);
        CHECK(ids_are_inside(ids.data(), ids.size(), rows));
        ids[random.between(0, 49)] = wrong;
        CHECK(!ids_are_inside(ids.data(), ids.size(), rows));
    }
    Buffer<int64_t> ids(rows);
    for (int64_t i = 0; i < rows; ++i) ids[i] = i;
    Table table(random, WeightFormat::dict4_rows, rows, k);
    while (table.outliers.delta.size() < 2) table = Table(random, WeightFormat::dict4_rows, rows, k);
    const data::Outliers& outliers = table.outliers;
    const auto judged_good = [&] { return outliers_are_inside(table.weight, ids.data(), rows); };
    CHECK(judged_good());
    for (int64_t row = 0; row <= rows; ++row) {
        const int32_t right = outliers.rowptr[row];
        for (int32_t wrong : {std::numeric_limits<int32_t>::min(), -1, static_cast<int32_t>(outliers.delta.size()) + 1}) {
            outliers.rowptr[row] = wrong;
            CHECK(!judged_good());
        }
        outliers.rowptr[row] = right;
    }
    for (int32_t wrong : {-1, static_cast<int32_t>(k), 32767}) {
        (outliers.is_wide ? void(outliers.wide[1] = wrong) : void(outliers.narrow[1] = static_cast<int16_t>(wrong)));
        CHECK(!judged_good());
    }
}
