#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qbert {
namespace {

#if defined(__x86_64__)

struct Cpuid {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
    Cpuid r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf does not exist
    return r;
}

bool bit(uint32_t word, int position) { return (word >> position) & 1; }

// Which register states the operating system saves: a CPU feature is of no use where its registers are not kept.
uint64_t xcr0() {
    if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE: without it xgetbv itself would fault
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux keeps the eight kilobytes of tile state from processes that have not asked for them; the answer may be no.
bool tiles_permitted() {
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
    return false;
#endif
}

std::vector<Isa> detect() {
    constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;
    const uint64_t saved = xcr0();
    const Cpuid basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
    std::vector<Isa> found{Isa::generic};
    const bool fma = bit(basic.ecx, 12), avx2 = bit(extended.ebx, 5);
    if (!(fma && avx2 && (saved & kAvxState) == kAvxState)) return found;
    found.push_back(Isa::avx2);
    if (bit(extended1.eax, 4)) found.push_back(Isa::avx_vnni);
    const bool f = bit(extended.ebx, 16), bw = bit(extended.ebx, 30), vl = bit(extended.ebx, 31), dq = bit(extended.ebx, 17);
    const bool vbmi = bit(extended.ecx, 1), vnni = bit(extended.ecx, 11);
    if (!(f && bw && vl && dq && vbmi && vnni && (saved & kAvx512State) == kAvx512State)) return found;
    found.push_back(Isa::avx512_vnni);
    const bool tile = bit(extended.edx, 24), int8 = bit(extended.edx, 25);
    if (tile && int8 && (saved & kTileState) == kTileState && tiles_permitted()) found.push_back(Isa::amx_int8);
    return found;
}

#else

std::vector<Isa> detect() { return {Isa::generic}; }

#endif

std::string names_of(const std::vector<Isa>& isas) {
    std::string names;
    for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(name(isa));
    return names;
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::generic: return "generic";
        case Isa::avx2: return "avx2";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx512_vnni: return "avx512_vnni";
        case Isa::amx_int8: return "amx_int8";
    }
    return "unknown";
}

const std::vector<Isa>& supported_isas() {
    static const std::vector<Isa> found = detect();
    return found;
}

Isa selected_isa() {
    const char* wanted = std::getenv("QBERT_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return supported_isas().back();
    for (Isa isa : supported_isas()) {
        if (wanted == std::string(name(isa))) return isa;
    }
    throw std::invalid_argument("QBERT_CPU_ISA is '" + std::string(wanted) + "'; allowed on this CPU: " + names_of(supported_isas()));
}

}  // namespace qbert
