// Random problems in memory of exactly the size that a kernel may touch, and packed as qbert/weight/layout packs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace data {

using qbert::FloatType;

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}

    uint64_t bits() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1)); }
    bool once_in(int64_t times) { return between(1, times) == 1; }
    double uniform(double low, double high) { return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53; }
    double normal() {
        double sum = 0;
        for (int i = 0; i < 12; ++i) sum += uniform(-0.5, 0.5);
        return sum;
    }
    template <class T>
    T one_of(std::initializer_list<T> values) {
        return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
    }

private:
    uint64_t state_;
};

// `count` elements in a heap block that ends with the last one, so that AddressSanitizer sees a read of one byte more. The block
// begins on a cache line plus `shift` elements, since torch hands out slices that begin anywhere.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t count = 0, int64_t shift = 0) : count_(count) {
        void* block = nullptr;
        const size_t bytes = static_cast<size_t>(count + shift) * sizeof(T);
        if (posix_memalign(&block, 64, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
        std::memset(block, 0xff, bytes);  // NaN, if taken for a float: nobody may need what is there before
        block_.reset(block);
        data_ = static_cast<T*>(block) + shift;
    }
    T* data() const { return data_; }
    int64_t size() const { return count_; }
    int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
    T& operator[](int64_t i) const { return data_[i]; }

private:
    struct Free {
        void operator()(void* block) const { std::free(block); }
    };
    std::unique_ptr<void, Free> block_;
    T* data_ = nullptr;
    int64_t count_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---- half types, by the definition: the nearest value, of two the even one ----

inline double to_double(uint16_t half, FloatType type) {
    const int exponent_bits = type == FloatType::bf16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (half & 0x7fff) >> mantissa_bits, mantissa = half & ((1 << mantissa_bits) - 1);
    double value;
    if (exponent == (1 << exponent_bits) - 1) {
        value = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
        value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
    } else {
        value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    return half & 0x8000 ? -value : value;
}

inline uint16_t to_half(double value, FloatType type) {
    const int exponent_bits = type == FloatType::bf16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1, infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
    value = std::fabs(value);
    if (value == 0) return static_cast<uint16_t>(sign);
    int exponent = std::isinf(value) ? 2048 : std::ilogb(value);
    if (exponent > bias) return static_cast<uint16_t>(sign | infinity);
    exponent = exponent < 1 - bias ? 1 - bias : exponent;
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(value, mantissa_bits - exponent)));  // with the hidden bit
    const int code = ((exponent + bias - 1) << mantissa_bits) + units;  // a carry moves into the exponent by itself
    return static_cast<uint16_t>(sign | (code > infinity ? infinity : code));
}

inline int64_t size_of(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// Values of any float type, of exactly the size, as bytes.
struct Floats {
    FloatType type = FloatType::f32;
    Buffer<uint8_t> bytes;

    Floats() = default;
    Floats(FloatType t, int64_t count, int64_t shift = 0) : type(t), bytes(count * size_of(t), shift * size_of(t)) {}
    double get(int64_t i) const {
        if (type != FloatType::f32) {
            uint16_t half;
            std::memcpy(&half, bytes.data() + 2 * i, 2);
            return to_double(half, type);
        }
        float value;
        std::memcpy(&value, bytes.data() + 4 * i, 4);
        return value;
    }
    void set(int64_t i, double value) {
        if (type != FloatType::f32) {
            const uint16_t half = to_half(value, type);
            std::memcpy(bytes.data() + 2 * i, &half, 2);
        } else {
            const float rounded = static_cast<float>(value);
            std::memcpy(bytes.data() + 4 * i, &rounded, 4);
        }
    }
    // At least half a unit in the last place of `value`.
    double rounding(double value) const {
        const double relative = type == FloatType::f32 ? 0x1p-24 : type == FloatType::bf16 ? 0x1p-8 : 0x1p-11;
        return std::fabs(value) * relative + (type == FloatType::f16 ? 0x1p-25 : 0x1p-140);
    }
};

// ---- packing ----

// Codes (n, k), row-major, at k = 4 * quad + i of a lane; 0 outside.
template <class Code>
Code code_at(const Code* codes, int64_t n, int64_t k, int64_t panel, int64_t lane, int64_t channel) {
    const int64_t row = panel * qbert::kPanelLanes + lane;
    return row < n && channel < k ? codes[row * k + channel] : Code{0};
}

inline Buffer<int8_t> pack_int8_panels(const int8_t* values, int64_t n, int64_t k) {
    const int64_t panels = round_up(n, 16) / 16, quads = round_up(k, 64) / 4;
    Buffer<int8_t> out(panels * (quads + 1) * 64);
    for (int64_t p = 0; p < panels; ++p) {
        int8_t* panel = out.data() + p * (quads + 1) * 64;
        for (int64_t lane = 0; lane < 16; ++lane) {
            int32_t sum = 0;
            for (int64_t c = 0; c < quads * 4; ++c) {
                const int8_t value = code_at(values, n, k, p, lane, c);
                panel[c / 4 * 64 + lane * 4 + c % 4] = value;
                sum += value;
            }
            std::memcpy(panel + quads * 64 + lane * 4, &sum, 4);
        }
    }
    return out;
}

inline Buffer<uint8_t> pack_int4_panels(const uint8_t* codes, int64_t n, int64_t k) {
    const int64_t panels = round_up(n, 16) / 16, rows = round_up(k, 64) / 8;
    Buffer<uint8_t> out(panels * rows * 64);
    for (int64_t p = 0; p < panels; ++p) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t at = 0; at < 64; ++at) {
                const uint8_t low = code_at(codes, n, k, p, at / 4, 8 * r + at % 4), high = code_at(codes, n, k, p, at / 4, 8 * r + 4 + at % 4);
                out[(p * rows + r) * 64 + at] = static_cast<uint8_t>(low | high << 4);
            }
        }
    }
    return out;
}

inline Buffer<uint8_t> pack_int3_panels(const uint8_t* codes, int64_t n, int64_t k) {
    const int64_t panels = round_up(n, 16) / 16, rows = round_up(k, 64) / 32;
    Buffer<uint8_t> out(panels * rows * 192);
    std::memset(out.data(), 0, static_cast<size_t>(out.size()));
    for (int64_t p = 0; p < panels; ++p) {
        for (int64_t r = 0; r < rows; ++r) {
            uint8_t* planes = out.data() + (p * rows + r) * 192;
            for (int64_t at = 0; at < 64; ++at) {
                for (int64_t j = 0; j < 8; ++j) {
                    const uint8_t code = code_at(codes, n, k, p, at / 4, 32 * r + 4 * j + at % 4);
                    planes[j / 4 * 64 + at] |= static_cast<uint8_t>((code & 3) << (2 * (j % 4)));
                    planes[128 + at] |= static_cast<uint8_t>((code >> 2) << j);
                }
            }
        }
    }
    return out;
}

// Rows of codes of `bits` bits, each a little-endian stream that starts on a byte.
inline Buffer<uint8_t> pack_streams(const uint8_t* codes, int64_t rows, int64_t k, int bits) {
    const int64_t width = (k * bits + 7) / 8;
    Buffer<uint8_t> out(rows * width);
    std::memset(out.data(), 0, static_cast<size_t>(out.size()));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t bit = 0; bit < k * bits; ++bit) {
            const int value = codes[row * k + bit / bits] >> (bit % bits) & 1;
            out[row * width + bit / 8] |= static_cast<uint8_t>(value << (bit % 8));
        }
    }
    return out;
}

// Compressed sparse rows of random values, columns ascending.
struct Outliers {
    Buffer<int32_t> rowptr, wide;
    Buffer<int16_t> narrow;
    Buffer<float> delta;
    bool is_wide = false;

    Outliers() = default;
    Outliers(Random& random, int64_t n, int64_t k, double scale) : rowptr(n + 1), is_wide(random.once_in(2)) {
        std::vector<int64_t> columns;
        rowptr[0] = 0;
        for (int64_t row = 0; row < n; ++row) {
            const bool many = random.once_in(8);
            for (int64_t c = 0; c < k; ++c) {
                if (random.once_in(many ? 2 : 40)) columns.push_back(c);
            }
            rowptr[row + 1] = static_cast<int32_t>(columns.size());
        }
        const auto count = static_cast<int64_t>(columns.size());
        (is_wide ? void(wide = Buffer<int32_t>(count)) : void(narrow = Buffer<int16_t>(count)));
        delta = Buffer<float>(count);
        for (int64_t i = 0; i < count; ++i) {
            if (is_wide) {
                wide[i] = static_cast<int32_t>(columns[i]);
            } else {
                narrow[i] = static_cast<int16_t>(columns[i]);
            }
            delta[i] = static_cast<float>(random.normal() * scale);
        }
    }
    qbert::Outliers as_argument() const {
        const void* columns = is_wide ? static_cast<const void*>(wide.data()) : narrow.data();
        return {rowptr.data(), columns, is_wide, delta.data(), delta.size()};
    }
    int64_t column(int64_t entry) const { return is_wide ? wide[entry] : narrow[entry]; }
};

// ---- kernels ----

inline const qbert::Kernels* kernels_of(qbert::Isa isa) {
    switch (isa) {
        case qbert::Isa::generic: return qbert::kernels_generic();
#if defined(__x86_64__)
        case qbert::Isa::avx2: return qbert::kernels_avx2();
        case qbert::Isa::avx_vnni: return qbert::kernels_avx_vnni();
        case qbert::Isa::avx512_vnni: return qbert::kernels_avx512_vnni();
        case qbert::Isa::amx_int8: return qbert::kernels_amx_int8();
#endif
        default: return nullptr;
    }
}

// All that this CPU can run, and where it has AVX-512 VNNI those that build.py makes it emulate.
inline std::vector<const qbert::Kernels*> usable_kernels() {
    std::vector<qbert::Isa> isas = qbert::supported_isas();
    const auto has = [&](qbert::Isa isa) { return std::find(isas.begin(), isas.end(), isa) != isas.end(); };
#if defined(QBERT_EMULATE_AVX_VNNI)
    if (has(qbert::Isa::avx512_vnni) && !has(qbert::Isa::avx_vnni)) isas.push_back(qbert::Isa::avx_vnni);
#endif
#if defined(QBERT_EMULATE_AMX)
    if (has(qbert::Isa::avx512_vnni) && !has(qbert::Isa::amx_int8)) isas.push_back(qbert::Isa::amx_int8);
#endif
    std::vector<const qbert::Kernels*> found;
    for (qbert::Isa isa : isas) {
        if (kernels_of(isa) != nullptr) found.push_back(kernels_of(isa));
    }
    return found;
}

}  // namespace data
