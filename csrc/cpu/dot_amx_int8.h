// Integer products with AMX-INT8: tiles of 16 rows of 64 bytes. One instruction multiplies 16 tokens by 16 channels over 64 input
// channels, signed or unsigned by signed, so codes need no shift and panels no sums.
//
// Two strips by two panels a pass: four sums, two loads of each operand for four products, which is what the load ports can feed.
#pragma once

#include "cpu/block_product.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace qbert {
namespace QBERT_ISA {

constexpr int kStripsPerDot = 2;
constexpr int kQuadMultiple = 16;  // whole tiles: 64 input channels

// `dot` works only while one of these lives. Telling the CPU the tiles' shape costs as much as a dozen products, so it is done once
// a task; releasing them keeps context switches of everything else small.
struct DotSession {
    DotSession() { tiles_configure(); }
    ~DotSession() { tiles_release(); }
};

// Strip: for each 64 input channels, 16 tokens times 64 bytes: a tile.
QBERT_INLINE int64_t strip_bytes_of(int64_t quads) { return quads * 64; }

QBERT_INLINE void pack_strip_of(const void* codes, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    const uint8_t* q = static_cast<const uint8_t*>(codes);
    uint8_t* out = static_cast<uint8_t*>(strip);
    for (int64_t at = 0; at < quads * 4; at += 64, out += 1024) {
        const int64_t inside = k - at < 64 ? (k - at > 0 ? k - at : 0) : 64;
        for (int64_t i = 0; i < kStripTokens; ++i) {
            if (i < rows && inside == 64) {
                memcpy(out + i * 64, q + i * stride + at, 64);
            } else {
                memset(out + i * 64, 0, 64);
                if (i < rows) memcpy(out + i * 64, q + i * stride + at, static_cast<size_t>(inside));
            }
        }
    }
}

QBERT_INLINE void pack_codes(const int8_t* q, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_strip_of(q, rows, k, stride, quads, strip);
}

QBERT_INLINE void pack_bytes(const uint8_t* p, int64_t rows, int64_t k, int64_t stride, int64_t quads, void* strip) {
    pack_strip_of(p, rows, k, stride, quads, strip);
}

// The codes of input channel c for the 16 tokens of a strip from pack_codes, as floats.
QBERT_INLINE f32x16 codes_of_column(const void* strip, uint64_t c) {
    const int8_t* from = static_cast<const int8_t*>(strip) + c / 64 * 1024 + c % 64 / 4 * 4;
    int32_t column[16];
    for (int i = 0; i < 16; ++i) memcpy(&column[i], from + 64 * i, 4);
    return to_float((load(column) << static_cast<int>(24 - 8 * (c % 4))) >> 24);
}

// Sums of kStrips strips times kPanels panels, each 1 or 2, over `quads` rows; added to what is in `acc` unless `fresh`. Tiles
// 0 ... 3 are the sums, 4 and 5 the strips, 6 and 7 the panels.
template <int kStrips, int kPanels, bool kUnsigned>
QBERT_NOINLINE void dot_pass(const uint8_t* strip, int64_t strip_stride, const int8_t* panels, int64_t panel_stride, int64_t quads,
                             bool fresh, int32_t* acc, int64_t acc_row) {
    const int64_t row = acc_row * static_cast<int64_t>(sizeof(int32_t));
    int32_t* second = acc + kStripTokens * acc_row;
    if (fresh) {
        tile_zero<0>();
        if constexpr (kPanels == 2) tile_zero<1>();
        if constexpr (kStrips == 2) tile_zero<2>();
        if constexpr (kStrips == 2 && kPanels == 2) tile_zero<3>();
    } else {
        tile_load<0>(acc, row);
        if constexpr (kPanels == 2) tile_load<1>(acc + kPanelLanes, row);
        if constexpr (kStrips == 2) tile_load<2>(second, row);
        if constexpr (kStrips == 2 && kPanels == 2) tile_load<3>(second + kPanelLanes, row);
    }
    for (int64_t r = 0; r < quads; r += kQuadMultiple) {
        tile_load<6>(panels + r * 64, 64);
        tile_load<4>(strip + r * 64, 64);
        tile_dot<0, 4, 6, kUnsigned>();
        if constexpr (kPanels == 2) {
            tile_load<7>(panels + panel_stride + r * 64, 64);
            tile_dot<1, 4, 7, kUnsigned>();
        }
        if constexpr (kStrips == 2) {
            tile_load<5>(strip + strip_stride + r * 64, 64);
            tile_dot<2, 5, 6, kUnsigned>();
        }
        if constexpr (kStrips == 2 && kPanels == 2) tile_dot<3, 5, 7, kUnsigned>();
    }
    tile_store<0>(acc, row);
    if constexpr (kPanels == 2) tile_store<1>(acc + kPanelLanes, row);
    if constexpr (kStrips == 2) tile_store<2>(second, row);
    if constexpr (kStrips == 2 && kPanels == 2) tile_store<3>(second + kPanelLanes, row);
}

// The same for numbers of strips and panels that are known only here.
template <bool kUnsigned>
QBERT_INLINE void dot_some(bool two_strips, bool two_panels, const uint8_t* strip, int64_t strip_stride, const int8_t* panels,
                           int64_t panel_stride, int64_t quads, bool fresh, int32_t* acc, int64_t acc_row) {
    const auto pass = two_strips ? (two_panels ? dot_pass<2, 2, kUnsigned> : dot_pass<2, 1, kUnsigned>)
                                 : (two_panels ? dot_pass<1, 2, kUnsigned> : dot_pass<1, 1, kUnsigned>);
    pass(strip, strip_stride, panels, panel_stride, quads, fresh, acc, acc_row);
}

// As in dot_avx512_vnni.h, for rows <= 32: of two strips that lie one behind the other. All rows of a strip are written.
// quads is a multiple of 16.
template <bool kUnsigned>
QBERT_INLINE void dot(const void* strips, int64_t rows, const int8_t* panels, int64_t panel_stride, int64_t panel_count,
                      int64_t quads, int64_t /*sums_row*/, int32_t* acc, const int8_t* /*ahead*/ = nullptr) {
    const uint8_t* strip = static_cast<const uint8_t*>(strips);
    for (int64_t p = 0; p < panel_count; p += 2) {
        dot_some<kUnsigned>(rows > kStripTokens, p + 2 <= panel_count, strip, strip_bytes_of(quads), panels + p * panel_stride,
                            panel_stride, quads, true, acc + p * kPanelLanes, kBlockChannels);
    }
}

// ---- a block of panels times many tokens ----
//
// Two panels stay in the first cache while all strips pass; longer rows are cut into pieces that do. The matrix unit is kept busy:
// sums leave their tiles while the next ones begin, and rows whose sums are done are finished while the next ones are multiplied.

constexpr int64_t kPairTokens = 2 * kStripTokens, kPairChannels = 2 * kPanelLanes, kPairSums = kPairTokens * kPairChannels;
constexpr int64_t kMaxPieceQuads = 16 * kQuadMultiple;  // 32 KB of two panels, of 48 KB that Intel's first caches have

// Rows of a panel that are multiplied before the next ones are fetched: pieces of about the same size.
QBERT_INLINE int64_t piece_quads(int64_t quads) {
    const int64_t pieces = (quads + kMaxPieceQuads - 1) / kMaxPieceQuads, tiles = quads / kQuadMultiple;
    return (tiles + pieces - 1) / pieces * kQuadMultiple;
}

// Numbers that `sums` of multiply_block must have room for: two pairs' take turns, or all strips' wait for the last piece.
QBERT_INLINE int64_t product_sums(int64_t quads) {
    return (quads <= kMaxPieceQuads ? 2 : kMaxStripsPerTask / 2) * kPairSums;
}

// Puts a sum of two strips times two panels where it belongs, if anywhere, so that its tile can be used again.
template <int kTile>
QBERT_INLINE void save_sum(int32_t* sums) {
    if (sums != nullptr) tile_store<kTile>(sums + kTile / 2 * kStripTokens * kPairChannels + kTile % 2 * kPanelLanes, kPairChannels * 4);
}

QBERT_INLINE void save_sums(int32_t* sums) {
    save_sum<0>(sums);
    save_sum<1>(sums);
    save_sum<2>(sums);
    save_sum<3>(sums);
}

// Two panels that are read next: asked for while these are multiplied, because what the caches fetch by themselves ends with a page.
struct NextPanels {
    const int8_t* at;      // null if there are none
    int64_t panel_stride;
    int64_t rows;          // that were not asked for yet
    int64_t share;         // rows to ask for after each tile

    QBERT_MEMBER void ask() {
        const int64_t now = rows < share ? rows : share;
        for (int64_t i = 0; i < now; ++i, at += 64) {
            __builtin_prefetch(at, 0, 2);
            __builtin_prefetch(at + panel_stride, 0, 2);
        }
        rows -= now;
    }
};

// A strip pair's tokens whose sums are done, in tiles 0 ... 3 or in memory, but not finished yet.
struct DoneRows {
    int64_t token = 0, end = 0, panel = 0, panels = 0;
    const int32_t* sums = nullptr;

    // At most `count` of them, all of one strip.
    template <class Finish>
    QBERT_MEMBER void finish_some(int64_t count, const Finish& finish) {
        const int64_t strip_end = (token / kStripTokens + 1) * kStripTokens, most = end < strip_end ? end : strip_end;
        const int64_t stop = most - token < count ? most : token + count;
        if (token >= stop) return;
        finish(token, stop, panel, panels, sums, kPairChannels);
        sums += (stop - token) * kPairChannels;
        token = stop;
    }
};

template <class Finish>
QBERT_NOINLINE void finish_all(DoneRows& done, const Finish& finish) {
    while (done.token < done.end) done.finish_some(kStripTokens, finish);
}

template <int kTile>
QBERT_INLINE void begin_sum(bool fresh, const int32_t* acc) {
    if (fresh) {
        tile_zero<kTile>();
    } else {
        tile_load<kTile>(acc + kTile / 2 * kStripTokens * kPairChannels + kTile % 2 * kPanelLanes, kPairChannels * 4);
    }
}

// Two strips times two panels, added to what is in `acc` unless `fresh`. The sums stay in the tiles; those that were there are saved
// to `unsaved`. After every 64 input channels but the first `meanwhile` is called: the matrix unit takes 64 cycles for their four
// products, in which the other units are free.
template <class Meanwhile>
QBERT_INLINE void dot_in_tiles(const uint8_t* strip, int64_t strip_stride, const int8_t* panels, int64_t panel_stride, int64_t quads,
                               bool fresh, const int32_t* acc, int32_t* unsaved, const Meanwhile& meanwhile) {
    tile_load<6>(panels, 64);
    tile_load_once<4>(strip, 64);
    save_sum<0>(unsaved);
    begin_sum<0>(fresh, acc);
    tile_dot<0, 4, 6, false>();
    tile_load<7>(panels + panel_stride, 64);
    save_sum<1>(unsaved);
    begin_sum<1>(fresh, acc);
    tile_dot<1, 4, 7, false>();
    tile_load_once<5>(strip + strip_stride, 64);
    save_sum<2>(unsaved);
    begin_sum<2>(fresh, acc);
    tile_dot<2, 5, 6, false>();
    save_sum<3>(unsaved);
    begin_sum<3>(fresh, acc);
    tile_dot<3, 5, 7, false>();
    for (int64_t r = kQuadMultiple; r < quads; r += kQuadMultiple) {
        tile_load<6>(panels + r * 64, 64);
        tile_load_once<4>(strip + r * 64, 64);
        tile_dot<0, 4, 6, false>();
        tile_load<7>(panels + panel_stride + r * 64, 64);
        tile_dot<1, 4, 7, false>();
        tile_load_once<5>(strip + strip_stride + r * 64, 64);
        tile_dot<2, 5, 6, false>();
        tile_dot<3, 5, 7, false>();
        meanwhile();
    }
}

// The same with a share of what is done, and of what is read next, after every tile.
template <class Finish>
QBERT_NOINLINE void dot_and_finish(const BlockProduct& p, const uint8_t* strip, const int8_t* panels, int64_t quads, bool fresh,
                                   const int32_t* acc, int32_t* unsaved, DoneRows& done, NextPanels& next, const Finish& finish) {
    const int64_t shares = quads / kQuadMultiple - 1, share = shares == 0 ? 0 : (kPairTokens + shares - 1) / shares;
    DoneRows rest = done;
    NextPanels later = next;
    dot_in_tiles(strip, p.strip_stride, panels, p.panel_stride, quads, fresh, acc, unsaved, [&]() __attribute__((always_inline)) {
        later.ask();
        rest.finish_some(share, finish);
    });
    done = rest;
    next = later;
}

QBERT_NOINLINE void dot_and_wait(const BlockProduct& p, const uint8_t* strip, const int8_t* panels, int64_t quads, bool fresh,
                                 const int32_t* acc, int32_t* unsaved, NextPanels& next) {
    NextPanels later = next;
    dot_in_tiles(strip, p.strip_stride, panels, p.panel_stride, quads, fresh, acc, unsaved,
                 [&]() __attribute__((always_inline)) { later.ask(); });
    next = later;
}

// Rows from ... from + quads - 1 of panel `panel` and the one after it.
struct Piece {
    int64_t panel, from, quads;
};

// All strips with one piece of two panels (or of the last one), added to the pieces before and finished if it is the panels' last.
template <class Finish>
QBERT_INLINE void multiply_piece(const BlockProduct& p, const Piece& piece, const int8_t* ahead, int32_t* sums, const Finish& finish) {
    const int8_t* panels = p.panels + piece.panel * p.panel_stride + piece.from * 64;
    const bool fresh = piece.from == 0, last = piece.from + piece.quads == p.quads;
    const int64_t panel_count = p.panel_count - piece.panel < 2 ? 1 : 2, places = fresh && last ? 2 : kMaxStripsPerTask / 2;
    const int64_t tiles = (p.tokens + kPairTokens - 1) / kPairTokens * (piece.quads / kQuadMultiple);
    NextPanels next{ahead, p.panel_stride, ahead == nullptr ? 0 : piece.quads, (piece.quads + tiles - 1) / tiles};
    int32_t* unsaved = nullptr;
    DoneRows done;
    for (int64_t token = 0; token < p.tokens; token += kPairTokens) {
        const uint8_t* strip = p.strips + token / kStripTokens * p.strip_stride + piece.from * 64;
        int32_t* acc = sums + token / kPairTokens % places * kPairSums;
        const bool two_strips = p.tokens - token > kStripTokens, whole = two_strips && panel_count == 2;
        if (whole && last) {
            dot_and_finish(p, strip, panels, piece.quads, fresh, acc, unsaved, done, next, finish);
        } else if (whole) {
            dot_and_wait(p, strip, panels, piece.quads, fresh, acc, unsaved, next);
        } else {
            save_sums(unsaved);
            dot_some<false>(two_strips, panel_count == 2, strip, p.strip_stride, panels, p.panel_stride, piece.quads, fresh, acc, kPairChannels);
        }
        if (last) finish_all(done, finish);
        unsaved = whole ? acc : nullptr;
        done = {token, p.tokens - token < kPairTokens ? p.tokens : token + kPairTokens, piece.panel, panel_count, acc};
    }
    save_sums(unsaved);
    if (last) finish_all(done, finish);
}

// As in multiply_by_strip.h, but all tokens of two panels come before those of the next two.
template <class Finish>
QBERT_INLINE void multiply_block(const BlockProduct& p, int32_t* sums, const Finish& finish) {
    const int64_t step = piece_quads(p.quads);
    for (int64_t panel = 0; panel < p.panel_count; panel += 2) {
        const int8_t* panels = p.panels + panel * p.panel_stride;
        for (int64_t from = 0; from < p.quads; from += step) {
            const int64_t left = p.quads - from;
            const int8_t* next_panels = panel + 2 < p.panel_count ? panels + 2 * p.panel_stride : p.ahead;
            const int8_t* ahead = left > step ? panels + (from + step) * 64 : next_panels;
            multiply_piece(p, {panel, from, left < step ? left : step}, ahead, sums, finish);
        }
    }
}

static int64_t peak_products(int64_t iterations) {
    alignas(64) uint8_t operand[1024];
    memset(operand, 1, sizeof operand);
    const DotSession session;
    tile_load<4>(operand, 64);
    tile_load<5>(operand, 64);
    tile_load<6>(operand, 64);
    tile_load<7>(operand, 64);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t it = 0; it < iterations; ++it) {
        tile_dot<0, 4, 6, false>();
        tile_dot<1, 4, 7, false>();
        tile_dot<2, 5, 6, false>();
        tile_dot<3, 5, 7, false>();
    }
    alignas(64) int32_t sums[256];
    tile_store<0>(sums, 64);
    return iterations * 4 * 16 * 16 * 64;
}

}  // namespace QBERT_ISA
}  // namespace qbert
