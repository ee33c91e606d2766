// Sixty-four bytes of numbers, in as many registers as this instruction set takes for them.
//
// The compiler's own vectors of 64 bytes would do where registers are that long. Where they are not, GCC keeps them in memory
// across loops and takes comparisons, selections and conversions apart lane by lane; registers in a structure it handles well.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QBERT_INLINE static inline __attribute__((always_inline))
#define QBERT_NOINLINE static __attribute__((noinline))  // inner loops of their own, so that they get all registers
#define QBERT_FRIEND friend inline __attribute__((always_inline))
#define QBERT_MEMBER inline __attribute__((always_inline))

namespace qbert {
namespace QBERT_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kRegisters = 64 / kRegisterBytes;

// What a comparison gives: -1 where it holds, else 0.
template <int kBytes>
struct MaskElement;
template <>
struct MaskElement<1> { typedef int8_t type; };
template <>
struct MaskElement<2> { typedef int16_t type; };
template <>
struct MaskElement<4> { typedef int32_t type; };

template <class Element>
struct Lanes {
    typedef Element Register __attribute__((vector_size(kRegisterBytes)));
    typedef Element Anywhere __attribute__((vector_size(kRegisterBytes), aligned(1), may_alias));
    typedef Lanes<typename MaskElement<sizeof(Element)>::type> Mask;

    Register part[kRegisters];

    Lanes() = default;
    template <class... More>
    QBERT_MEMBER Lanes(Element first, Element second, More... more) : Lanes() {
        static_assert(2 + sizeof...(More) == 64 / sizeof(Element), "one value for each lane");
        const Element each[] = {first, second, static_cast<Element>(more)...};
        memcpy(part, each, sizeof part);
    }
#if defined(__AVX512F__)
    QBERT_MEMBER explicit Lanes(__m512 v) : part{(Register)v} {}
    QBERT_MEMBER explicit Lanes(__m512i v) : part{(Register)v} {}
#endif

    // One lane; through memory, so not for inner loops.
    QBERT_MEMBER Element& operator[](int i) { return reinterpret_cast<Element*>(part)[i]; }
    QBERT_MEMBER Element operator[](int i) const { return reinterpret_cast<const Element*>(part)[i]; }

    // The same bits as other numbers.
    template <class Other>
    QBERT_MEMBER explicit operator Lanes<Other>() const {
        Lanes<Other> other;
        for (int i = 0; i < kRegisters; ++i) other.part[i] = (typename Lanes<Other>::Register)part[i];
        return other;
    }

#define QBERT_BINARY(op)                                                                            \
    QBERT_FRIEND Lanes operator op(Lanes a, Lanes b) {                                              \
        for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] op b.part[i];                    \
        return a;                                                                                   \
    }                                                                                               \
    QBERT_FRIEND Lanes operator op(Lanes a, Element b) { return a op Lanes::all(b); }               \
    QBERT_FRIEND Lanes operator op(Element a, Lanes b) { return Lanes::all(a) op b; }               \
    QBERT_MEMBER Lanes& operator op##=(Lanes b) { return *this = *this op b; }                      \
    QBERT_MEMBER Lanes& operator op##=(Element b) { return *this = *this op Lanes::all(b); }
    QBERT_BINARY(+)
    QBERT_BINARY(-)
    QBERT_BINARY(*)
    QBERT_BINARY(/)
    QBERT_BINARY(&)
    QBERT_BINARY(|)
    QBERT_BINARY(^)
#undef QBERT_BINARY

#define QBERT_COMPARISON(op)                                                                        \
    QBERT_FRIEND Mask operator op(Lanes a, Lanes b) {                                               \
        Mask mask;                                                                                  \
        for (int i = 0; i < kRegisters; ++i) mask.part[i] = (typename Mask::Register)(a.part[i] op b.part[i]); \
        return mask;                                                                                \
    }                                                                                               \
    QBERT_FRIEND Mask operator op(Lanes a, Element b) { return a op Lanes::all(b); }
    QBERT_COMPARISON(<)
    QBERT_COMPARISON(<=)
    QBERT_COMPARISON(>)
    QBERT_COMPARISON(>=)
    QBERT_COMPARISON(==)
#undef QBERT_COMPARISON

#define QBERT_SHIFT(op)                                                                             \
    QBERT_FRIEND Lanes operator op(Lanes a, int bits) {                                             \
        for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] op bits;                         \
        return a;                                                                                   \
    }                                                                                               \
    QBERT_FRIEND Lanes operator op(Lanes a, Lanes bits) {                                           \
        for (int i = 0; i < kRegisters; ++i) a.part[i] = a.part[i] op bits.part[i];                 \
        return a;                                                                                   \
    }
    QBERT_SHIFT(<<)
    QBERT_SHIFT(>>)
#undef QBERT_SHIFT

    QBERT_FRIEND Lanes operator-(Lanes a) {
        for (int i = 0; i < kRegisters; ++i) a.part[i] = -a.part[i];
        return a;
    }
    QBERT_FRIEND Lanes operator~(Lanes a) {
        for (int i = 0; i < kRegisters; ++i) a.part[i] = ~a.part[i];
        return a;
    }

#if defined(__AVX512F__)
    QBERT_MEMBER explicit operator __m512() const { return (__m512)part[0]; }
    QBERT_MEMBER explicit operator __m512i() const { return (__m512i)part[0]; }
#endif

    QBERT_MEMBER static Lanes all(Element x) {
        Lanes v;
        for (int i = 0; i < kRegisters; ++i) v.part[i] = x - Register{};  // not +, which would make 0 of -0
        return v;
    }
};

template <class Vector>
struct IsLanes { static constexpr bool value = false; };
template <class Element>
struct IsLanes<Lanes<Element>> { static constexpr bool value = true; };

// Lanes of `yes` where the mask is -1, of `no` where it is 0.
template <class Element>
QBERT_INLINE Lanes<Element> select(typename Lanes<Element>::Mask mask, Lanes<Element> yes, Lanes<Element> no) {
    for (int i = 0; i < kRegisters; ++i) no.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    return no;
}

typedef Lanes<float> f32x16;
typedef Lanes<int32_t> i32x16;
typedef Lanes<uint32_t> u32x16;
}  // namespace QBERT_ISA
}  // namespace qbert
