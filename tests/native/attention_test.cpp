// Attention on int8 codes: every kernel, odd lengths and head sizes, against the definition in double; the same bits from all kernels.
#include "cpu/attention.h"

#include <algorithm>

#include "check.h"
#include "data.h"

namespace {

using namespace qbert;
using data::Buffer;
using data::Floats;
using data::Random;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Problem {
    AttentionArgs args{};
    int64_t t = 0;
    std::vector<int64_t> starts{0};  // of each sequence, and the end
    Buffer<int8_t> qkv;
    Buffer<float> scales;
    std::string name;

    explicit Problem(Random& random) {
        for (int64_t sequences = random.between(1, 3); sequences > 0; --sequences) {
            starts.push_back(starts.back() + random.one_of<int64_t>({1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 130}));
        }
        t = starts.back();
        args.heads = random.between(1, 3);
        args.head_dim = random.one_of<int64_t>({1, 8, 20, 32, 64, 64, 80});
        args.softmax_scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
        args.window = -1;
        args.scales_per_token = random.once_in(2);
        args.requantize = random.once_in(3);
        args.float_type = args.requantize ? FloatType::f32 : random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        args.inverse_out_scale = static_cast<float>(random.uniform(20, 100));
        make_codes(random);
        make_scales(random);
        name = "heads " + std::to_string(args.heads) + " head_dim " + std::to_string(args.head_dim) + " t " + std::to_string(t) + " sequences " +
               std::to_string(starts.size() - 1) + (args.scales_per_token ? " scales per token" : "");
    }

    void make_codes(Random& random) {
        const bool extreme = random.once_in(6);
        qkv = Buffer<int8_t>(t * 3 * args.heads * args.head_dim, random.between(0, 3));
        for (int64_t i = 0; i < qkv.size(); ++i) qkv[i] = static_cast<int8_t>(extreme ? random.one_of({-127, 127}) : random.between(-127, 127));
        args.qkv = qkv.data();
    }

    void make_scales(Random& random) {
        scales = Buffer<float>(args.scales_per_token ? 3 * t : 3);
        const double sharpness = random.one_of({0.1, 1.0, 4.0});  // from nearly uniform to nearly one key a query
        for (int64_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<float>(random.uniform(0.01, 0.02) * (i % 3 == 2 ? 1 : sharpness));
        if (args.scales_per_token && random.once_in(2)) scales[random.between(0, scales.size() - 1)] = kNan;
        args.scales = scales.data();
    }

    double scale(int64_t token, int which) const { return scales[(args.scales_per_token ? 3 * token : 0) + which]; }
    const int8_t* codes(int64_t token, int which, int64_t head) const {
        return qkv.data() + (token * 3 + which) * args.heads * args.head_dim + head * args.head_dim;
    }

    // One row of the result, and how far from it a kernel may be.
    void exact(int64_t start, int64_t stop, int64_t i, int64_t head, std::vector<double>& y, std::vector<double>& allowed) const {
        const int64_t length = stop - start, d = args.head_dim;
        std::vector<double> score(length), weight(length);
        double highest = -INFINITY, largest = 0, total = 0;
        bool nan = std::isnan(scale(i, 0));
        for (int64_t j = 0; j < length; ++j) {
            double product = 0;
            for (int64_t c = 0; c < d; ++c) product += codes(i, 0, head)[c] * codes(start + j, 1, head)[c];
            score[j] = product * (scale(i, 0) * scale(start + j, 1) * args.softmax_scale);
            highest = std::fmax(highest, score[j]);
            nan |= std::isnan(scale(start + j, 1)) || std::isnan(scale(start + j, 2));
        }
        for (int64_t j = 0; j < length; ++j) {
            const double power = std::exp(score[j] - highest);
            total += power;
            weight[j] = power * scale(start + j, 2);
            largest = std::fmax(largest, weight[j]);
        }
        const double factor = largest / 255 / total;
        y.assign(d, nan ? kNan : 0);
        allowed.assign(d, 0);
        for (int64_t j = 0; j < length && !nan; ++j) {
            const double p = weight[j] * (255 / largest);
            const bool ambiguous = std::fabs(p - std::floor(p) - 0.5) < 1e-3;  // float32 may round the other way
            for (int64_t c = 0; c < d; ++c) {
                const double value = codes(start + j, 2, head)[c] * factor;
                y[c] += std::nearbyint(p) * value;
                allowed[c] += (ambiguous ? 1.001 : 0) * std::fabs(value) + 1e-5 * std::fabs(std::nearbyint(p) * value);
            }
        }
    }

    void check_against_definition(const std::vector<uint8_t>& bytes) const {
        Floats out(args.float_type, args.requantize ? 0 : t * args.heads * args.head_dim);
        if (!args.requantize) std::memcpy(out.bytes.data(), bytes.data(), bytes.size());
        std::vector<double> y, allowed;
        for (size_t s = 0; s + 1 < starts.size(); ++s) {
            for (int64_t i = starts[s]; i < starts[s + 1]; ++i) {
                for (int64_t head = 0; head < args.heads; ++head) {
                    exact(starts[s], starts[s + 1], i, head, y, allowed);
                    for (int64_t c = 0; c < args.head_dim; ++c) check_one((i * args.heads + head) * args.head_dim + c, y[c], allowed[c], bytes, out);
                }
            }
        }
    }

    void check_one(int64_t at, double y, double allowed, const std::vector<uint8_t>& bytes, const Floats& out) const {
        const double found = args.requantize ? static_cast<int8_t>(bytes[static_cast<size_t>(at)]) : out.get(at);
        if (args.requantize) {
            allowed = std::isnan(y) ? 0 : 0.5 + 1e-5 + allowed * args.inverse_out_scale;
            y = std::isnan(y) ? 0 : std::fmax(-127, std::fmin(127, y * args.inverse_out_scale));
        } else {
            allowed += out.rounding(y);
        }
        if (std::isnan(y) ? std::isnan(found) : std::fabs(found - y) <= allowed) return;
        std::ostringstream message;
        message << name << ", output " << at << ": " << found << ", exact " << y << " +- " << allowed;
        check::fail(__FILE__, __LINE__, message.str());
    }
};

std::vector<uint8_t> run_kernel(const Kernels& kernels, const Problem& problem) {
    AttentionArgs args = problem.args;
    const int64_t size = problem.t * args.heads * args.head_dim * (args.requantize ? 1 : data::size_of(args.float_type));
    const Buffer<uint8_t> out(size);
    args.out = out.data();
    for (size_t s = 0; s + 1 < problem.starts.size(); ++s) {
        const int64_t start = problem.starts[s], length = problem.starts[s + 1] - start;
        for (int64_t head = 0; head < args.heads; ++head) {
            const Buffer<uint8_t> scratch(kernels.attention_scratch_bytes(args, length, length));
            kernels.attention_part(args, {start, length, head, 0, length}, scratch.data());
        }
    }
    return {out.data(), out.data() + size};
}

}  // namespace

TEST(attention_kernels_agree_with_the_definition_and_each_other) {
    Random random(31);
    for (int i = 0; i < 100; ++i) {
        const Problem problem(random);
        std::vector<uint8_t> first;
        for (const Kernels* kernels : data::usable_kernels()) {
            const std::vector<uint8_t> bytes = run_kernel(*kernels, problem);
            if (first.empty()) problem.check_against_definition(bytes);
            if (first.empty()) first = bytes;
            if (bytes != first) check::fail(__FILE__, __LINE__, std::string(name(kernels->isa)) + " differs: " + problem.name);
        }
    }
}

TEST(attention_driver_gives_the_same_bits_with_any_number_of_threads) {
    Random random(32);
    for (int i = 0; i < 30; ++i) {
        const Problem problem(random);
        Buffer<int32_t> bounds(static_cast<int64_t>(problem.starts.size()) + 1);
        bounds[0] = 0;  // and an empty sequence in front
        for (size_t s = 0; s < problem.starts.size(); ++s) bounds[static_cast<int64_t>(s) + 1] = static_cast<int32_t>(problem.starts[s]);
        const std::vector<uint8_t> expected = run_kernel(kernels(), problem);
        for (int threads : {1, 2, 5}) {
            AttentionArgs args = problem.args;
            const Buffer<uint8_t> out(static_cast<int64_t>(expected.size()));
            args.out = out.data();
            attention(args, bounds.data(), bounds.size() - 1, threads);
            CHECK(std::equal(expected.begin(), expected.end(), out.data()));
        }
    }
}

TEST(attention_bounds_are_judged) {
    const std::vector<int32_t> good{0, 3, 3, 7}, falling{0, 5, 3, 7}, late{1, 3, 3, 7}, negative{0, -1, 3, 7};
    CHECK(bounds_cover(good.data(), 3, 7));
    CHECK(!bounds_cover(good.data(), 3, 8));
    for (const std::vector<int32_t>& bad : {falling, late, negative}) CHECK(!bounds_cover(bad.data(), 3, 7));
}
