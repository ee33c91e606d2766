// Attention of int8 codes and of floats, with windows, biases and rotations: every kernel, odd lengths and head sizes, against the
// definition in double; the same bits from all kernels, whatever the parts and the threads.
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

enum class Kind { codes, floats, any };

struct Problem {
    AttentionArgs args{};
    int64_t t = 0;
    std::vector<int64_t> starts{0};  // of each sequence, and the end
    Buffer<int8_t> qkv;              // codes: those of the problem, or what its floats must be rounded to
    Buffer<float> scales, bias, rotary;
    Floats floats;
    std::vector<float> rounded_scales;  // of floats whose scales are taken inside: (t, 3, heads)
    std::string name;

    explicit Problem(Random& random, Kind kind = Kind::any) {
        for (int64_t sequences = random.between(1, 3); sequences > 0; --sequences) {
            starts.push_back(starts.back() + random.one_of<int64_t>({1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 130}));
        }
        t = starts.back();
        args.heads = random.between(1, 3);
        args.head_dim = random.one_of<int64_t>({1, 8, 20, 32, 64, 64, 80});
        args.softmax_scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
        args.floats = kind == Kind::floats || (kind == Kind::any && random.once_in(3));
        args.scales_per_token = !args.floats && random.once_in(2);
        args.requantize = random.once_in(3);
        args.float_type = args.requantize ? FloatType::f32 : random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        args.inverse_out_scale = static_cast<float>(random.uniform(20, 100));
        make_distances(random);
        make_scales(random);
        qkv = Buffer<int8_t>(t * 3 * args.heads * args.head_dim, random.between(0, 3));
        args.floats ? make_floats(random) : make_codes(random);
        name = "heads " + std::to_string(args.heads) + " head_dim " + std::to_string(args.head_dim) + " t " + std::to_string(t) + " sequences " +
               std::to_string(starts.size() - 1) + " window " + std::to_string(args.window) + (args.scales_per_token ? " scales per token" : "") +
               (args.floats ? " floats" : "") + (args.scales == nullptr ? " scaled inside" : "") + (args.rotary ? " rotary" : "") +
               (args.bias ? " reach " + std::to_string(args.reach) : "");
    }

    void make_distances(Random& random) {
        args.window = random.once_in(2) ? -1 : random.one_of<int64_t>({0, 1, 3, 16, 40, 64, 129, 1000});
        if (random.once_in(2)) {
            args.reach = random.one_of<int64_t>({0, 1, 5, 20, 200});
            bias = Buffer<float>(args.heads * (2 * args.reach + 1));
            for (int64_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(random.normal());
            args.bias = bias.data();
        }
        if (args.floats && args.head_dim % 2 == 0 && random.once_in(2)) {
            rotary = Buffer<float>(130 * args.head_dim);
            for (int64_t i = 0; i < rotary.size(); ++i) {
                const double angle = static_cast<double>(i / args.head_dim) / static_cast<double>(1 + i % (args.head_dim / 2));
                rotary[i] = static_cast<float>(i % args.head_dim < args.head_dim / 2 ? std::cos(angle) : std::sin(angle));
            }
            args.rotary = rotary.data();
        }
    }

    void make_codes(Random& random) {
        const bool extreme = random.once_in(6);
        for (int64_t i = 0; i < qkv.size(); ++i) qkv[i] = static_cast<int8_t>(extreme ? random.one_of({-127, 127}) : random.between(-127, 127));
        args.qkv = qkv.data();
    }

    void make_scales(Random& random) {
        if (args.floats && random.once_in(2)) return;  // they are taken inside
        scales = Buffer<float>(args.scales_per_token ? 3 * t : 3);
        // From nearly uniform to nearly one key a query. Biases are added to float32 scores, whose error grows with them.
        const double sharpness = args.bias == nullptr ? random.one_of({0.1, 1.0, 4.0}) : random.one_of({0.1, 1.0});
        for (int64_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<float>(random.uniform(0.01, 0.02) * (i % 3 == 2 ? 1 : sharpness));
        if (args.scales_per_token && random.once_in(2)) scales[random.between(0, scales.size() - 1)] = kNan;
        args.scales = scales.data();
    }

    void make_floats(Random& random) {
        args.qkv_type = random.one_of({FloatType::f32, FloatType::bf16, FloatType::f16});
        floats = Floats(args.qkv_type, qkv.size(), random.between(0, 3));
        for (int64_t i = 0; i < qkv.size(); ++i) floats.set(i, random.normal());
        if (random.once_in(3)) floats.set(random.between(0, qkv.size() - 1), random.one_of<double>({kNan, INFINITY, -INFINITY}));
        args.qkv = floats.bytes.data();
        rounded_scales.resize(static_cast<size_t>(t * 3 * args.heads));
        for (size_t s = 0; s + 1 < starts.size(); ++s) {
            for (int64_t token = starts[s]; token < starts[s + 1]; ++token) {
                for (int64_t row = token * 3 * args.heads; row < (token + 1) * 3 * args.heads; ++row) round(row, token - starts[s]);
            }
        }
    }

    // Row (token, which, head) of floats to codes, in float32 with every operation rounded.
    void round(int64_t row, int64_t position) {
        const int64_t d = args.head_dim, half = d / 2, which = row / args.heads % 3;
        std::vector<float> x(static_cast<size_t>(d));
        for (int64_t c = 0; c < d; ++c) x[static_cast<size_t>(c)] = static_cast<float>(floats.get(row * d + c));
        const float* cosine = rotary.data() + position * d;
        for (int64_t c = 0; c < half && which < 2 && args.rotary != nullptr; ++c) {
            const float first = x[static_cast<size_t>(c)], second = x[static_cast<size_t>(half + c)];
            const float parts[4] = {first * cosine[c], second * cosine[half + c], second * cosine[c], first * cosine[half + c]};
            x[static_cast<size_t>(c)] = parts[0] - parts[1];
            x[static_cast<size_t>(half + c)] = parts[2] + parts[3];
        }
        float absmax = 0x1p-100f;
        bool finite = true;
        for (float value : x) {
            finite &= std::isfinite(value);
            absmax = std::fmax(absmax, std::fabs(value));
        }
        const bool inside = args.scales == nullptr;
        const float factor = inside ? 127 / absmax : 1 / args.scales[which];
        rounded_scales[static_cast<size_t>(row)] = finite ? absmax / 127 : kNan;
        for (int64_t c = 0; c < d; ++c) {
            const float code = std::nearbyint(x[static_cast<size_t>(c)] * factor);
            const bool none = std::isnan(code) || (inside && !finite);
            qkv[row * d + c] = static_cast<int8_t>(none ? 0 : std::fmax(-127.0f, std::fmin(127.0f, code)));
        }
    }

    double scale(int64_t token, int which, int64_t head) const {
        if (args.scales == nullptr) return rounded_scales[static_cast<size_t>((token * 3 + which) * args.heads + head)];
        return scales[(args.scales_per_token ? 3 * token : 0) + which];
    }
    const int8_t* codes(int64_t token, int which, int64_t head) const {
        return qkv.data() + (token * 3 + which) * args.heads * args.head_dim + head * args.head_dim;
    }
    double bias_of(int64_t head, int64_t distance) const {
        if (args.bias == nullptr) return 0;
        return bias[head * (2 * args.reach + 1) + args.reach + std::max(-args.reach, std::min(args.reach, distance))];
    }

    // One row of the result, and how far from it a kernel may be.
    void exact(int64_t start, int64_t stop, int64_t i, int64_t head, std::vector<double>& y, std::vector<double>& allowed) const {
        const int64_t d = args.head_dim;
        if (args.window >= 0) {  // the keys that it sees
            start = std::max(start, i - args.window);
            stop = std::min(stop, i + args.window + 1);
        }
        const int64_t length = stop - start;
        std::vector<double> score(length), weight(length);
        double highest = -INFINITY, largest = 0, total = 0;
        bool nan = std::isnan(scale(i, 0, head));
        for (int64_t j = 0; j < length; ++j) {
            double product = 0;
            for (int64_t c = 0; c < d; ++c) product += codes(i, 0, head)[c] * codes(start + j, 1, head)[c];
            score[j] = product * (scale(i, 0, head) * scale(start + j, 1, head) * args.softmax_scale) + bias_of(head, start + j - i);
            highest = std::fmax(highest, score[j]);
            nan |= std::isnan(scale(start + j, 1, head)) || std::isnan(scale(start + j, 2, head));
        }
        for (int64_t j = 0; j < length; ++j) {
            const double power = std::exp(score[j] - highest);
            total += power;
            weight[j] = power * scale(start + j, 2, head);
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

// All heads of all sequences, in parts of up to `queries`.
std::vector<uint8_t> run_kernel(const Kernels& kernels, const Problem& problem, int64_t queries = 1 << 20) {
    AttentionArgs args = problem.args;
    const int64_t size = problem.t * args.heads * args.head_dim * (args.requantize ? 1 : data::size_of(args.float_type));
    const Buffer<uint8_t> out(size);
    args.out = out.data();
    for (size_t s = 0; s + 1 < problem.starts.size(); ++s) {
        const int64_t start = problem.starts[s], length = problem.starts[s + 1] - start;
        for (int64_t head = 0; head < args.heads; ++head) {
            for (int64_t first = 0; first < length; first += queries) {
                const int64_t last = std::min(first + queries, length);
                const Buffer<uint8_t> scratch(kernels.attention_scratch_bytes(args, length, last - first));
                kernels.attention_part(args, {start, length, head, first, last}, scratch.data());
            }
        }
    }
    return {out.data(), out.data() + size};
}

void check_every_kernel(const Problem& problem) {
    std::vector<uint8_t> first;
    for (const Kernels* kernels : data::usable_kernels()) {
        const std::vector<uint8_t> bytes = run_kernel(*kernels, problem);
        if (first.empty()) problem.check_against_definition(bytes);
        if (first.empty()) first = bytes;
        if (bytes != first) check::fail(__FILE__, __LINE__, std::string(name(kernels->isa)) + " differs: " + problem.name);
    }
}

}  // namespace

TEST(attention_kernels_agree_with_the_definition_and_each_other) {
    Random random(31);
    for (int i = 0; i < 120; ++i) check_every_kernel(Problem(random, Kind::codes));
}

TEST(attention_kernels_round_floats_as_the_definition_does) {
    Random random(33);
    for (int i = 0; i < 120; ++i) check_every_kernel(Problem(random, Kind::floats));
}

TEST(attention_kernels_give_the_same_bits_in_parts) {
    Random random(34);
    for (int i = 0; i < 40; ++i) {
        const Problem problem(random);
        for (const Kernels* kernels : data::usable_kernels()) {
            const std::vector<uint8_t> whole = run_kernel(*kernels, problem);
            for (int64_t queries : {1, 16, 23, 64}) {
                if (run_kernel(*kernels, problem, queries) == whole) continue;
                check::fail(__FILE__, __LINE__, std::string(name(kernels->isa)) + " in parts of " + std::to_string(queries) + ": " + problem.name);
            }
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
