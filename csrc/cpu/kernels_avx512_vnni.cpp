// Compiled with the flags of its instruction set (setup.py); without them it has nothing to offer.
#include "cpu/kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QBERT_ISA avx512_vnni
#include "cpu/dot_avx512_vnni.h"
#include "cpu/table.h"

const qbert::Kernels* qbert::kernels_avx512_vnni() {
    static constexpr Kernels kernels = avx512_vnni::table(Isa{3});
    return &kernels;
}
#else
const qbert::Kernels* qbert::kernels_avx512_vnni() { return nullptr; }
#endif
