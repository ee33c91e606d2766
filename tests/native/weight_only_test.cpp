// Weight-only linears: every kernel, every weight format, odd shapes, against loops in double; the same bits from all kernels, and
// for a token alone and among others.
#include "cpu/weight_only.h"

#include <algorithm>

#include "check.h"
#include "data.h"

namespace {

using namespace qbert;
using data::Buffer;
using data::Floats;
using data::Random;

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::gelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
        case Activation::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x > 0 ? x : x * 0;
        case Activation::silu: return x / (1 + std::exp(-x));
        default: return x;
    }
}

struct Problem {
    WeightOnlyArgs args{};
    std::vector<double> weight;  // (n, k)
    Buffer<int8_t> int8_weight;
    Buffer<uint8_t> packed_weight;
    Buffer<uint16_t> group_scale;
    Buffer<float> scale, codebook;
    Floats x, bias;
    data::Outliers outliers;
    std::string name;

    Problem(Random& random, WeightFormat format, int64_t t) {
        Weight& w = args.weight;
        w.format = format;
        args.t = t;
        w.n = random.one_of<int64_t>({1, 15, 16, 17, 33, 48, 64, 65, 100, 150});
        w.k = random.one_of<int64_t>({1, 3, 63, 64, 65, 100, 128, 130, 192, 257});
        if (format == WeightFormat::int4_panels) {
            w.groups = random.between(1, 3);
            w.k = w.groups * random.one_of<int64_t>({32, 64, 96, 128});
        }
        make_weight(random);
        make_floats(random);
        name = "format " + std::to_string(static_cast<int>(format)) + " t " + std::to_string(t) + " n " + std::to_string(w.n) + " k " +
               std::to_string(w.k) + " groups " + std::to_string(w.groups) + " type " + std::to_string(static_cast<int>(x.type));
    }

    void make_weight(Random& random) {
        const int64_t n = args.weight.n, k = args.weight.k;
        weight.resize(static_cast<size_t>(n * k));
        if (args.weight.format == WeightFormat::int8_panels) {
            std::vector<int8_t> values(weight.size());
            for (int8_t& value : values) value = static_cast<int8_t>(random.between(-127, 127));
            scale = Buffer<float>(n);
            for (int64_t i = 0; i < n; ++i) scale[i] = static_cast<float>(random.uniform(0.001, 0.01));
            for (int64_t i = 0; i < n * k; ++i) weight[i] = values[i] * static_cast<double>(scale[i / k]);
            int8_weight = data::pack_int8_panels(values.data(), n, k);
            args.weight.codes = int8_weight.data();
            args.weight.scale = scale.data();
            return;
        }
        const int bits = args.weight.format == WeightFormat::dict3_panels ? 3 : 4;
        std::vector<uint8_t> codes(weight.size());
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.between(0, (1 << bits) - 1));
        packed_weight = bits == 3 ? data::pack_int3_panels(codes.data(), n, k) : data::pack_int4_panels(codes.data(), n, k);
        args.weight.codes = packed_weight.data();
        if (args.weight.format == WeightFormat::int4_panels) {
            group_scale = Buffer<uint16_t>(n * args.weight.groups);
            for (int64_t i = 0; i < group_scale.size(); ++i) group_scale[i] = data::to_half(random.uniform(0.01, 0.1), FloatType::bf16);
            for (int64_t i = 0; i < n * k; ++i) {
                const uint16_t group = group_scale[i / k * args.weight.groups + i % k / (k / args.weight.groups)];
                weight[i] = ((codes[i] ^ 8) - 8) * data::to_double(group, FloatType::bf16);
            }
            args.weight.group_scale = group_scale.data();
            return;
        }
        codebook = Buffer<float>(1 << bits);
        for (int64_t i = 0; i < codebook.size(); ++i) codebook[i] = static_cast<float>(random.normal());
        for (int64_t i = 0; i < n * k; ++i) weight[i] = codebook[codes[i]];
        args.weight.codebook = codebook.data();
        if (random.once_in(4)) return;
        outliers = data::Outliers(random, n, k, 3);
        for (int64_t row = 0; row < n; ++row) {
            for (int64_t e = outliers.rowptr[row]; e < outliers.rowptr[row + 1]; ++e) weight[row * k + outliers.column(e)] += outliers.delta[e];
        }
        args.weight.outliers = outliers.as_argument();
    }

    void make_floats(Random& random) {
        args.x_stride = args.weight.k + random.one_of<int64_t>({0, 0, 1, 40});
        args.float_type = random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        const int64_t size = (args.t - 1) * args.x_stride + args.weight.k;
        x = Floats(args.float_type, size, random.between(0, 3));
        const int64_t bad = random.once_in(3) ? random.between(0, args.t - 1) : -1;
        for (int64_t i = 0; i < size; ++i) {
            const bool inside = i % args.x_stride < args.weight.k;
            x.set(i, inside && i / args.x_stride != bad ? random.normal() : std::numeric_limits<double>::quiet_NaN());
        }
        args.x = x.bytes.data();
        if (random.once_in(2)) {
            args.bias_type = random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
            bias = Floats(args.bias_type, args.weight.n);
            for (int64_t i = 0; i < args.weight.n; ++i) bias.set(i, random.normal());
            args.bias = bias.bytes.data();
        }
        args.activation = random.one_of({Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::silu});
    }

    void check_against_loops(const Floats& out) const {
        const int64_t n = args.weight.n, k = args.weight.k;
        for (int64_t i = 0; i < args.t * n; ++i) {
            const int64_t token = i / n, channel = i % n;
            double y = args.bias ? bias.get(channel) : 0, magnitude = std::fabs(y);
            for (int64_t c = 0; c < k; ++c) {
                const double term = x.get(token * args.x_stride + c) * weight[channel * k + c];
                y += term;
                magnitude += std::fabs(term);
            }
            y = activated(args.activation, y);
            const double found = out.get(i);
            if (std::isnan(y) ? std::isnan(found) : std::fabs(found - y) <= 4e-6 * magnitude + out.rounding(y)) continue;
            std::ostringstream message;
            message << name << ", token " << token << " channel " << channel << ": " << found << ", exact " << y;
            check::fail(__FILE__, __LINE__, message.str());
        }
    }
};

bool same(const Floats& a, const Floats& b) {
    return std::memcmp(a.bytes.data(), b.bytes.data(), static_cast<size_t>(a.bytes.size())) == 0;
}

const WeightFormat kFormats[] = {WeightFormat::int8_panels, WeightFormat::int4_panels, WeightFormat::dict4_panels, WeightFormat::dict3_panels};

// What the driver does, in one thread, with memory of exactly the sizes that the kernels asked for.
Floats run_kernel(const Kernels& kernels, WeightOnlyArgs args, int64_t tokens_per_task, int64_t panels_per_task) {
    Floats out(args.float_type, args.t * args.weight.n);
    args.out = out.bytes.data();
    const int64_t padded = data::round_up(args.weight.k, kPanelInputs), panels = data::round_up(args.weight.n, kPanelLanes) / kPanelLanes;
    const Buffer<float> wide(args.t * padded);
    kernels.weight_only_widen(args, 0, args.t, wide.data());
    args.wide_x = wide.data();
    args.wide_stride = padded;
    for (int64_t panel = 0; panel < panels; panel += panels_per_task) {
        for (int64_t token = 0; token < args.t; token += tokens_per_task) {
            const Buffer<uint8_t> scratch(kernels.weight_only_scratch_bytes(args));
            kernels.weight_only_panels(args, panel, std::min(panels, panel + panels_per_task), token,
                                       std::min(args.t, token + tokens_per_task), scratch.data());
        }
    }
    return out;
}

}  // namespace

TEST(weight_only_kernels_agree_with_loops_and_each_other) {
    Random random(21);
    for (int i = 0; i < 160; ++i) {
        const Problem problem(random, kFormats[i % 4], random.one_of<int64_t>({1, 1, 2, 3, 4, 5, 6, 7, 11, 13}));
        std::unique_ptr<Floats> first;
        for (const Kernels* kernels : data::usable_kernels()) {
            for (int64_t tokens : {kWeightOnlyTokens, 1}) {
                for (int64_t panels : {int64_t{1000}, int64_t{3}}) {
                    Floats out = run_kernel(*kernels, problem.args, tokens, panels);
                    if (first == nullptr) problem.check_against_loops(out);
                    if (first == nullptr) first = std::make_unique<Floats>(std::move(out));
                    else if (!same(*first, out)) check::fail(__FILE__, __LINE__, std::string(name(kernels->isa)) + " differs: " + problem.name);
                }
            }
        }
    }
}

TEST(weight_only_driver_gives_the_same_bits_with_any_number_of_threads) {
    Random random(22);
    for (int i = 0; i < 24; ++i) {
        Problem problem(random, kFormats[i % 4], random.one_of<int64_t>({1, 5, 33, 70, 700}));
        std::unique_ptr<Floats> first;
        for (int threads : {1, 2, 5}) {
            Floats out(problem.args.float_type, problem.args.t * problem.args.weight.n);
            problem.args.out = out.bytes.data();
            weight_only(problem.args, threads);
            if (first == nullptr) problem.check_against_loops(out);
            if (first == nullptr) first = std::make_unique<Floats>(std::move(out));
            else CHECK(same(*first, out));
        }
    }
}

TEST(weight_only_driver_refuses_outliers_that_would_lead_it_astray) {
    Random random(23);
    Problem problem(random, WeightFormat::dict4_panels, 3);
    while (problem.args.weight.outliers.count < 2) problem = Problem(random, WeightFormat::dict4_panels, 3);
    const data::Outliers& outliers = problem.outliers;
    const Floats out(problem.args.float_type, problem.args.t * problem.args.weight.n);
    problem.args.out = out.bytes.data();
    const auto refuses = [&] {
        try {
            weight_only(problem.args, 2);
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    CHECK(!refuses());
    outliers.rowptr[1] = -1;
    CHECK(refuses());
    outliers.rowptr[1] = 1 << 30;
    CHECK(refuses());
    outliers.rowptr[1] = 0;
    (outliers.is_wide ? void(outliers.wide[1] = -1) : void(outliers.narrow[1] = -1));
    CHECK(refuses());
}
