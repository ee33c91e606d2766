// Compiled with the flags of its instruction set (setup.py); without them it has nothing to offer.
#include "cpu/kernels.h"

#if defined(__AVXVNNI__)
#define QBERT_ISA avx_vnni
#include "cpu/dot_avx_vnni.h"
#include "cpu/table.h"

const qbert::Kernels* qbert::kernels_avx_vnni() {
    static constexpr Kernels kernels = avx_vnni::table(Isa{2});
    return &kernels;
}
#else
const qbert::Kernels* qbert::kernels_avx_vnni() { return nullptr; }
#endif
