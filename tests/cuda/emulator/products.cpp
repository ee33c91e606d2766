// Products of warpgroups: issued by 128 threads, executed batch by batch, by pointers to what the threads call registers.
#include "emulator/machine.h"

namespace qbert::cuda::emulator {
namespace {

using sm90::Operands;

constexpr int kRows = 64, kMaxTokens = 256, kStepBytes = 32;  // along k, of either type

// Rows of an operand in shared memory, without the swizzle.
void read_operand(Block& block, uint64_t descriptor, uint32_t rows, unsigned char (*to)[kStepBytes]) {
    const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const auto eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const auto base = static_cast<uint32_t>(descriptor >> 49 & 7), swizzle = static_cast<uint32_t>(descriptor >> 62);
    require(swizzle == 1 && base == 0, "an operand with swizzle ", swizzle, " and base offset ", base, "; emulated: 1 and 0");
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t byte = 0; byte < kStepBytes; byte += 16) {
            const uint32_t plain = start + row / 8 * eight_rows + row % 8 * 128 + byte;
            const uint32_t address = plain ^ ((plain >> 7 & 7) << 4);
            std::memcpy(to[row] + byte, shared_at(block, address, 16, "a product's operand"), 16);
        }
    }
}

// The 16 bytes of a thread are four words: word i is of row 16 w + l / 4 + 8 (i % 2), bytes 16 (i / 2) + 4 (l % 4) + 0 ... 3.
void read_registers(const Product& product, unsigned char (*to)[kStepBytes]) {
    for (unsigned thread = 0; thread < kWarpGroup; ++thread) {
        const unsigned warp = thread / kWarp, lane = thread % kWarp;
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = 16 * warp + lane / 4 + 8 * (i % 2);
            std::memcpy(to[row] + 16 * (i / 2) + 4 * (lane % 4), &product.a_registers[thread][i], 4);
        }
    }
}

// Of all 16-bit patterns, the number that each stands for.
template <class Widen>
std::vector<float> table_of(const Widen& widen) {
    std::vector<float> values(1 << 16);
    for (unsigned bits = 0; bits < values.size(); ++bits) values[bits] = widen(static_cast<unsigned short>(bits));
    return values;
}

const std::vector<float>& floats_of(Operands operands) {
    static const auto half = table_of([](unsigned short bits) { return __half2float(__ushort_as_half(bits)); });
    static const auto bfloat = table_of([](unsigned short bits) { return __uint_as_float(unsigned{bits} << 16); });
    return operands == Operands::f16 ? half : bfloat;
}

void widen(Operands, const unsigned char (*from)[kStepBytes], int rows, int16_t (*to)[kStepBytes]) {
    for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < kStepBytes; ++k) to[row][k] = static_cast<int8_t>(from[row][k]);
    }
}
void widen(Operands operands, const unsigned char (*from)[kStepBytes], int rows, float (*to)[kStepBytes / 2]) {
    const std::vector<float>& floats = floats_of(operands);
    for (int row = 0; row < rows; ++row) {
        for (int k = 0; k < kStepBytes / 2; ++k) {
            uint16_t pattern;
            std::memcpy(&pattern, from[row] + 2 * k, 2);
            to[row][k] = floats[pattern];
        }
    }
}

// Sum is int32_t of int16_t, or float of float; kK elements of 32 bytes.
template <class Sum, class Element, int kK>
void execute(const Product& product, Block& block) {
    unsigned char bytes[kMaxTokens][kStepBytes];
    Element a[kRows][kK], b[kMaxTokens][kK];
    if (product.a_in_registers) {
        read_registers(product, bytes);
    } else {
        read_operand(block, product.a, kRows, bytes);
    }
    widen(product.operands, bytes, kRows, a);
    read_operand(block, product.b, static_cast<uint32_t>(product.tokens), bytes);
    widen(product.operands, bytes, product.tokens, b);
    for (unsigned thread = 0; thread < kWarpGroup; ++thread) {
        const unsigned warp = thread / kWarp, lane = thread % kWarp;
        auto* d = static_cast<Sum*>(product.d[thread]);
        for (int at = 0; at < product.tokens / 2; ++at) {
            const int j = at / 4, i = at / 2 % 2, e = at % 2;
            const Element* row = a[16 * warp + lane / 4 + 8 * static_cast<unsigned>(i)];
            const Element* token = b[8 * j + 2 * static_cast<int>(lane % 4) + e];
            Sum sum = 0;
            for (int k = 0; k < kK; ++k) sum += static_cast<Sum>(row[k]) * static_cast<Sum>(token[k]);
            d[at] = product.accumulate ? d[at] + sum : sum;
        }
    }
}

}  // namespace

void execute_batch(WarpGroup& group) {
    const size_t end = group.batches.front().end;
    for (; group.first_product < end; ++group.first_product) {
        const Product& product = group.products.front();
        if (product.operands == Operands::s8) {
            execute<int32_t, int16_t, kStepBytes>(product, *group.block);
        } else {
            execute<float, float, kStepBytes / 2>(product, *group.block);
        }
        group.products.pop_front();
    }
    group.batches.pop_front();
    ++group.first_batch;
    group.wake();
}

std::string WarpGroup::missing(unsigned most) const {
    std::ostringstream text;
    text << "warpgroup_wait<" << most << "> (" << batches.size() << " batches are under way";
    if (!batches.empty()) text << ", the first committed by " << batches.front().committed << " of 128 threads";
    return text.str() + ")";
}

}  // namespace qbert::cuda::emulator

namespace qbert::cuda::sm90 {

using namespace emulator;

static WarpGroup& own_group() {
    require(machine.current->group != nullptr, "products need a whole warpgroup of 128 threads");
    return *machine.current->group;
}

void warpgroup_arrive() {
    machine.current->products_begun = true;
    for (auto& [at, words] : machine.current->a_registers) std::memcpy(words.data(), at, sizeof(words));
}

// The matrix units may not see what was written to registers after warpgroup_arrive. Known from the second product on that
// reads the same registers.
static void check_registers(Thread& thread, const uint32_t* a) {
    for (const auto& [at, words] : thread.a_registers) {
        if (at != a) continue;
        require(std::memcmp(words.data(), a, sizeof(words)) == 0, "a product's registers were written after warpgroup_arrive");
        return;
    }
    thread.a_registers.push_back({a, {a[0], a[1], a[2], a[3]}});
}

void issue_wgmma(Operands operands, int tokens, void* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 bool accumulate) {
    Thread& thread = *machine.current;
    WarpGroup& group = own_group();
    require(thread.products_begun, "the first product of a batch without warpgroup_arrive");
    if (a_registers != nullptr) check_registers(thread, a_registers);
    const size_t at = thread.products_issued++ - group.first_product;
    if (at == group.products.size()) group.products.push_back({operands, tokens, a_registers != nullptr, accumulate, a, b});
    Product& product = group.products[at];
    require(product.operands == operands && product.tokens == tokens && product.a_in_registers == (a_registers != nullptr) &&
                product.accumulate == accumulate && product.a == a && product.b == b,
            "threads of a warpgroup disagree about their product ", thread.products_issued - 1);
    product.a_registers[thread.index % kWarpGroup] = a_registers;
    product.d[thread.index % kWarpGroup] = d;
    ++product.issued;
}

void warpgroup_commit() {
    Thread& thread = *machine.current;
    WarpGroup& group = own_group();
    thread.products_begun = false;
    const size_t at = thread.batches_committed++ - group.first_batch;
    if (at == group.batches.size()) group.batches.push_back({thread.products_issued, 0});
    WarpGroup::Batch& batch = group.batches[at];
    require(batch.end == thread.products_issued, "threads of a warpgroup disagree about the products of their batch ",
            thread.batches_committed - 1);
    if (++batch.committed == kWarpGroup && at == 0) machine.batch_is_ready(group);
    machine.yield();
}

void wait_for_warpgroup(unsigned batches) {
    Thread& thread = *machine.current;
    WarpGroup& group = own_group();
    while (thread.batches_committed > group.first_batch + batches) group.park(batches);
}

}  // namespace qbert::cuda::sm90
