// What every operation asks of its arguments before a launch: nothing here needs a GPU. All throw Error.
#pragma once

#include <cstdint>

#include "enums.h"

namespace qbert::cuda {

constexpr int64_t bytes_of(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// Bytes: what the copy engine asks of addresses and row pitches, and the widest load and store.
inline constexpr int64_t kAlignment = 16;

// 1 ... limit.
void check_extent(const char* name, int64_t extent, int64_t limit, const char* because = "");

// Whole tiles beyond the edge must still be int32, and so must the count of tiles.
inline constexpr int64_t kMaxExtent = INT32_MAX - 1024;

// Tokens and output channels of a product.
void check_tokens_and_channels(int64_t t, int64_t n);

// A problem without tensors, on which a model is asked for a tile.
void check_problem(int64_t t, int64_t n, int64_t k, int sm_count);

// Rows that do not overlap, near enough for 64-bit addresses. Pitch and columns in elements.
void check_pitch(const char* name, int64_t columns, int64_t pitch, int64_t element_bytes);

// An aligned address, and rows that start aligned too and do not overlap. Pitch and columns in elements.
void check_matrix(const char* name, const void* address, int64_t columns, int64_t pitch, int64_t element_bytes);

// An address that is a multiple of `alignment`.
void check_vector(const char* name, const void* address, int64_t alignment);

// An enum's code, which came from Python as a number.
void check_code(const char* name, int code, int count);
inline void check_type(const char* name, FloatType type) { check_code(name, static_cast<int>(type), 3); }

}  // namespace qbert::cuda
