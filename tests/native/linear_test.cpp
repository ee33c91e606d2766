// Integer linears: every kernel, every weight format, odd shapes, against loops in double; and the same bits from all kernels.
#include "cpu/linear.h"

#include "check.h"
#include "data.h"

namespace {

using namespace qbert;
using data::Buffer;
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

const std::initializer_list<Activation> kActivations = {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu,
                                                        Activation::silu};

struct Problem {
    LinearArgs args{};
    std::vector<int8_t> operand;  // (n, k)
    Buffer<int8_t> q, int8_weight, codebook;
    Buffer<uint8_t> packed_weight, group_scale;
    Buffer<float> s, scale, bias;
    data::Outliers outliers;
    std::string name;

    Problem(Random& random, WeightFormat format) {
        args.weight.format = format;
        args.t = random.one_of<int64_t>({1, 2, 15, 16, 17, 31, 33, 50});
        args.weight.matrices = 1;
        choose_shape(random);
        make_activations(random);
        make_weight(random);
        make_rest(random);
        const Weight& w = args.weight;
        name = "format " + std::to_string(static_cast<int>(format)) + " t " + std::to_string(args.t) + " n " + std::to_string(w.n) +
               " k " + std::to_string(w.k) + " matrices " + std::to_string(w.matrices) + (args.gated ? " gated" : "");
    }

    bool is_dictionary() const {
        return args.weight.format == WeightFormat::dict4_panels || args.weight.format == WeightFormat::dict3_panels;
    }

    void choose_shape(Random& random) {
        Weight& w = args.weight;
        w.n = random.one_of<int64_t>({1, 3, 15, 16, 17, 48, 63, 64, 65, 100, 150});
        w.k = random.one_of<int64_t>({1, 2, 3, 5, 63, 64, 65, 100, 127, 130, 257});
        if (w.format == WeightFormat::int4_panels) {
            const int64_t group = random.one_of<int64_t>({8, 16, 32, 64, 128});
            w.groups = random.between(1, 3);
            w.k = group * w.groups;
        }
        if (is_dictionary() && random.once_in(2)) {
            w.matrices = random.between(2, 3);
            w.n = w.matrices * random.between(1, 60);
        }
        args.gated = random.once_in(3);
        if (args.gated) w.n = 2 * kPanelLanes * random.between(1, 5) * w.matrices;
    }

    void make_activations(Random& random) {
        const bool extreme = random.once_in(4);
        q = Buffer<int8_t>(args.t * args.weight.k, random.between(0, 3));
        for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<int8_t>(extreme ? random.one_of({-127, 127}) : random.between(-127, 127));
        if (extreme && random.once_in(2)) std::memset(q.data(), 127, static_cast<size_t>(q.size()));
        s = Buffer<float>(args.t);
        for (int64_t i = 0; i < args.t; ++i) s[i] = static_cast<float>(random.uniform(0.001, 0.1));
        if (random.once_in(4)) s[random.between(0, args.t - 1)] = std::numeric_limits<float>::quiet_NaN();
        args.q = q.data();
        args.s = s.data();
    }

    void make_weight(Random& random) {
        Weight& weight = args.weight;
        const int64_t n = weight.n, k = weight.k;
        operand.resize(static_cast<size_t>(n * k));
        if (weight.format == WeightFormat::int8_panels || weight.format == WeightFormat::int8_rows) {
            const bool extreme = random.once_in(4);
            for (int8_t& w : operand) w = static_cast<int8_t>(extreme ? random.one_of({-127, 127, 127, 127}) : random.between(-127, 127));
            int8_weight = weight.format == WeightFormat::int8_panels ? data::pack_int8_panels(operand.data(), n, k) : Buffer<int8_t>(n * k);
            if (weight.format == WeightFormat::int8_rows) std::memcpy(int8_weight.data(), operand.data(), operand.size());
            weight.codes = int8_weight.data();
            return;
        }
        std::vector<uint8_t> codes(operand.size());
        const int bits = weight.format == WeightFormat::dict3_panels ? 3 : 4;
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.between(0, (1 << bits) - 1));
        if (weight.format == WeightFormat::int4_panels) {
            group_scale = Buffer<uint8_t>(n * weight.groups);
            for (int64_t i = 0; i < group_scale.size(); ++i) group_scale[i] = static_cast<uint8_t>(random.between(1, 18));
            for (int64_t i = 0; i < n * k; ++i) {
                const int group = group_scale[i / k * weight.groups + i % k / (k / weight.groups)];
                if (codes[i] == 8 && group > 15) codes[i] = 9;  // |code| * scale stays within int8, as the format promises
                operand[i] = static_cast<int8_t>((static_cast<int>(codes[i] ^ 8) - 8) * group);
            }
            weight.group_scale = group_scale.data();
        } else {
            const int entries = 1 << bits;
            codebook = Buffer<int8_t>(weight.matrices * entries);
            for (int64_t i = 0; i < codebook.size(); ++i) codebook[i] = static_cast<int8_t>(random.between(-127, 127));
            for (int64_t i = 0; i < n * k; ++i) operand[i] = codebook[i / k * weight.matrices / n * entries + codes[i]];
            weight.codebook = codebook.data();
        }
        packed_weight = bits == 3 ? data::pack_int3_panels(codes.data(), n, k) : data::pack_int4_panels(codes.data(), n, k);
        weight.codes = packed_weight.data();
    }

    void make_rest(Random& random) {
        scale = Buffer<float>(is_dictionary() ? args.weight.matrices : args.weight.n);
        for (int64_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(random.uniform(0.0001, 0.002));
        args.weight.scale = scale.data();
        if (is_dictionary() && !random.once_in(4)) {
            outliers = data::Outliers(random, args.weight.n, args.weight.k, 0.05);
            args.weight.outliers = outliers.as_argument();
        }
        if (random.once_in(2)) {
            bias = Buffer<float>(args.weight.n);
            for (int64_t i = 0; i < args.weight.n; ++i) bias[i] = static_cast<float>(random.normal());
            args.bias = bias.data();
        }
        args.activation = random.one_of(kActivations);
        args.requantize = random.once_in(3);
        args.float_type = args.requantize ? FloatType::f32 : random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        args.inverse_out_scale = static_cast<float>(random.uniform(1, 40));
        args.zero = args.requantize && random.once_in(2) ? static_cast<int>(random.uniform(-127, 127)) : 0;
    }

    int64_t channels() const { return args.gated ? args.weight.n / 2 : args.weight.n; }

    // The exact result, and what its error is relative to.
    void exact(int64_t token, int64_t channel, double& y, double& magnitude) const {
        sum(token, channel, y, magnitude);
        y = activated(args.activation, y);
        if (!args.gated) return;
        double gate, size;
        sum(token, args.weight.n / 2 + channel, gate, size);
        magnitude = magnitude * size;
        y *= gate;
    }

    // A row's sum, and the sum of the magnitudes that it was added up from.
    void sum(int64_t token, int64_t channel, double& y, double& magnitude) const {
        const Weight& w = args.weight;
        const bool has_outliers = w.outliers.rowptr != nullptr;
        int64_t acc = 0;
        for (int64_t c = 0; c < w.k; ++c) acc += q[token * w.k + c] * operand[channel * w.k + c];
        y = static_cast<double>(acc) * scale[is_dictionary() ? channel * w.matrices / w.n : channel];
        magnitude = std::fabs(y);
        for (int64_t e = has_outliers ? outliers.rowptr[channel] : 0; e < (has_outliers ? outliers.rowptr[channel + 1] : 0); ++e) {
            const double term = static_cast<double>(outliers.delta[e]) * q[token * w.k + outliers.column(e)];
            y += term;
            magnitude += std::fabs(term);
        }
        y *= s[token];
        magnitude *= s[token];
        if (args.bias) {
            y += bias[channel];
            magnitude += std::fabs(bias[channel]);
        }
    }

    data::Floats output() const {
        return args.requantize ? data::Floats{} : data::Floats(args.float_type, args.t * channels());
    }
};

// Runs `compute` into memory of exactly the output's size and returns its bytes.
template <class Compute>
std::vector<uint8_t> bytes_of(Problem& problem, Compute compute) {
    LinearArgs args = problem.args;
    const int64_t size = args.t * problem.channels() * (args.requantize ? 1 : data::size_of(args.float_type));
    Buffer<uint8_t> out(size);
    args.out = out.data();
    compute(args);
    return {out.data(), out.data() + size};
}

// What the driver does, in one thread, with memory of exactly the sizes that the kernels asked for.
void run_kernel(const Kernels& kernels, const LinearArgs& args, int64_t strips_per_task) {
    const int64_t n = args.weight.n, k = args.weight.k, strips = data::round_up(args.t, 16) / 16, bytes = kernels.strip_bytes(k);
    Buffer<uint8_t> packed(strips * bytes);
    for (int64_t i = 0; i < strips; ++i) {
        const int64_t rows = args.t - i * 16 < 16 ? args.t - i * 16 : 16;
        kernels.pack_strip(args.q + i * 16 * k, rows, k, packed.data() + i * bytes);
    }
    const int64_t channels = args.gated ? n / 2 : n, per_block = args.gated ? kGatedChannels : kBlockChannels;
    const auto compute = args.gated ? kernels.gated_block : kernels.linear_block;
    for (int64_t block = 0; block * per_block < channels; ++block) {
        for (int64_t first = 0; first < strips; first += strips_per_task) {
            Buffer<uint8_t> scratch(kernels.linear_scratch_bytes(args));
            const int64_t stop = first + strips_per_task < strips ? first + strips_per_task : strips;
            compute(args, block, packed.data() + first * bytes, first, stop, scratch.data());
        }
    }
}

void check_against_loops(const Problem& problem, const std::vector<uint8_t>& bytes, const std::string& isa) {
    const LinearArgs& args = problem.args;
    const int64_t n = problem.channels();
    data::Floats out = problem.output();
    if (!args.requantize) std::memcpy(out.bytes.data(), bytes.data(), bytes.size());
    for (int64_t i = 0; i < args.t * n; ++i) {
        double y, magnitude;
        problem.exact(i / n, i % n, y, magnitude);
        double found = args.requantize ? static_cast<int8_t>(bytes[static_cast<size_t>(i)]) : out.get(i), allowed;
        if (args.requantize) {
            allowed = std::isnan(y) ? 0 : 0.5 + 1e-5 * magnitude * args.inverse_out_scale;
            y = std::isnan(y) ? args.zero : std::fmax(-127, std::fmin(127, y * args.inverse_out_scale + args.zero));
        } else {
            allowed = 4e-6 * magnitude + out.rounding(y);
        }
        if (std::isnan(y) ? std::isnan(found) : std::fabs(found - y) <= allowed) continue;
        std::ostringstream message;
        message << isa << " " << problem.name << ", token " << i / n << " channel " << i % n << ": " << found << ", exact " << y;
        check::fail(__FILE__, __LINE__, message.str());
    }
}

const WeightFormat kFormats[] = {WeightFormat::int8_panels, WeightFormat::int8_rows, WeightFormat::int4_panels,
                                 WeightFormat::dict4_panels, WeightFormat::dict3_panels};

}  // namespace

TEST(linear_kernels_agree_with_loops_and_each_other) {
    Random random(1);
    for (int i = 0; i < 150; ++i) {
        Problem problem(random, kFormats[i % 5]);
        std::vector<uint8_t> first;
        for (const Kernels* kernels : data::usable_kernels()) {
            for (int64_t strips_per_task : {2, 100}) {
                const auto bytes = bytes_of(problem, [&](const LinearArgs& args) { run_kernel(*kernels, args, strips_per_task); });
                if (first.empty()) check_against_loops(problem, bytes, name(kernels->isa));
                if (first.empty()) first = bytes;
                if (bytes != first) check::fail(__FILE__, __LINE__, std::string(name(kernels->isa)) + " differs: " + problem.name);
            }
        }
    }
}

TEST(linear_driver_gives_the_same_bits_with_any_number_of_threads) {
    Random random(2);
    for (int i = 0; i < 40; ++i) {
        Problem problem(random, kFormats[i % 5]);
        std::vector<uint8_t> first;
        for (Isa isa : usable_isas()) {
            use_isa_named(name(isa));
            for (int threads : {1, 2, 5}) {
                const auto bytes = bytes_of(problem, [&](const LinearArgs& args) { linear(args, threads); });
                if (first.empty()) check_against_loops(problem, bytes, "driver");
                if (first.empty()) first = bytes;
                CHECK(bytes == first);
            }
        }
    }
    use_isa_named(name(usable_isas().back()));
}

TEST(linear_driver_refuses_outliers_that_would_lead_it_astray) {
    Random random(3);
    Problem problem(random, WeightFormat::dict3_panels);
    while (problem.args.weight.outliers.count < 2) problem = Problem(random, WeightFormat::dict3_panels);
    const auto refuses = [&] {
        try {
            bytes_of(problem, [](const LinearArgs& args) { linear(args, 1); });
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    CHECK(!refuses());
    const data::Outliers& outliers = problem.outliers;
    const auto set_column = [&](int64_t column) {
        (outliers.is_wide ? void(outliers.wide[1] = static_cast<int32_t>(column)) : void(outliers.narrow[1] = static_cast<int16_t>(column)));
    };
    const int64_t column = outliers.column(1);
    for (int64_t wrong : {int64_t{-1}, problem.args.weight.k, int64_t{32767}, int64_t{-32768}}) {
        set_column(wrong);
        CHECK(refuses());
    }
    set_column(column);
    for (int64_t row : {int64_t{0}, problem.args.weight.n / 2, problem.args.weight.n}) {
        const int32_t right = outliers.rowptr[row];
        for (int32_t wrong : {-1, 1 << 30, std::numeric_limits<int32_t>::min()}) {
            outliers.rowptr[row] = wrong;
            CHECK(refuses());
        }
        outliers.rowptr[row] = right;
    }
    CHECK(!refuses());
}

TEST(linear_driver_takes_no_tokens) {
    LinearArgs args{};
    args.weight.n = 5;
    args.weight.k = 7;
    linear(args, 2);
}

TEST(linear_peak_is_a_rate) {
    for (const Kernels* kernels : data::usable_kernels()) CHECK(kernels->peak_products(1000) >= 1000);
}
