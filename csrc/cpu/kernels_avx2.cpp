// Compiled with the flags of its instruction set (setup.py); without them it has nothing to offer.
#include "cpu/kernels.h"

#if defined(__AVX2__) && defined(__F16C__)
#define QBERT_ISA avx2
#include "cpu/dot_avx2.h"
#include "cpu/table.h"

const qbert::Kernels* qbert::kernels_avx2() {
    static constexpr Kernels kernels = avx2::table(Isa{1});
    return &kernels;
}
#else
const qbert::Kernels* qbert::kernels_avx2() { return nullptr; }
#endif
