// Compiled with the flags of its instruction set (setup.py); without them it has nothing to offer.
#include "cpu/kernels.h"

#if defined(__AMX_INT8__) && defined(__AVX512VBMI__)
#define QBERT_ISA amx_int8
#include "cpu/dot_amx_int8.h"
#include "cpu/table.h"

const qbert::Kernels* qbert::kernels_amx_int8() {
    static constexpr Kernels kernels = amx_int8::table(Isa{4});
    return &kernels;
}
#else
const qbert::Kernels* qbert::kernels_amx_int8() { return nullptr; }
#endif
