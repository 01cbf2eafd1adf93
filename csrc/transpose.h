// From rows of cells to the columns of a panel (product.h).
#pragma once

#include "product.h"

// Four cells of LANES rows: columns[i][lane] = rows[lane * stride + i].
//
// A vector takes 128 bits of every fourth row; a 4 x 4 transpose within the 128-bit lanes then leaves each vector with
// one cell of all rows, in order.
inline __attribute__((always_inline)) void transpose_four(const cell* rows, ptrdiff_t stride, u32v columns[4]) {
#if defined(__AVX512F__)
    auto four = [=](int row) { return _mm_loadu_si128((const __m128i*)(rows + row * stride)); };
    __m512i quad[4];
    for (int r = 0; r < 4; ++r) {
        __m512i v = _mm512_castsi128_si512(four(r));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, four(r + 4));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, four(r + 8));
        quad[r] = _mm512_mask_broadcast_i32x4(v, 0xf000, four(r + 12));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(quad[0], quad[1]), high01 = _mm512_unpackhi_epi32(quad[0], quad[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(quad[2], quad[3]), high23 = _mm512_unpackhi_epi32(quad[2], quad[3]);
    columns[0] = (u32v)_mm512_unpacklo_epi64(low01, low23);
    columns[1] = (u32v)_mm512_unpackhi_epi64(low01, low23);
    columns[2] = (u32v)_mm512_unpacklo_epi64(high01, high23);
    columns[3] = (u32v)_mm512_unpackhi_epi64(high01, high23);
#elif defined(__AVX2__)
    auto four = [=](int row) { return _mm_loadu_si128((const __m128i*)(rows + row * stride)); };
    __m256i quad[4];
    for (int r = 0; r < 4; ++r) quad[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(r)), four(r + 4), 1);
    const __m256i low01 = _mm256_unpacklo_epi32(quad[0], quad[1]), high01 = _mm256_unpackhi_epi32(quad[0], quad[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(quad[2], quad[3]), high23 = _mm256_unpackhi_epi32(quad[2], quad[3]);
    columns[0] = (u32v)_mm256_unpacklo_epi64(low01, low23);
    columns[1] = (u32v)_mm256_unpackhi_epi64(low01, low23);
    columns[2] = (u32v)_mm256_unpacklo_epi64(high01, high23);
    columns[3] = (u32v)_mm256_unpackhi_epi64(high01, high23);
#else
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < LANES; ++lane) columns[i][lane] = rows[lane * stride + i];
#endif
}

#if defined(__AVX512F__)
// Sixteen cells of LANES rows. A cache line of each row is read at once: rows that lie a power of two apart take turns
// at the same bank of the cache.
inline __attribute__((always_inline)) void transpose_sixteen(const cell* rows, ptrdiff_t stride, u32v columns[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows + r * stride);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {  // a[r + c]: cells c, 4 + c, 8 + c and 12 + c of rows r .. r + 3
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        // Of rows 0 .. 7 and 8 .. 15: cells c and 8 + c, then 4 + c and 12 + c.
        const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        columns[c] = (u32v)_mm512_shuffle_i32x4(low, high, 0x88);
        columns[8 + c] = (u32v)_mm512_shuffle_i32x4(low, high, 0xdd);
        columns[4 + c] = (u32v)_mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        columns[12 + c] = (u32v)_mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}
#endif

// One cell of LANES rows.
inline u32v transpose_one(const cell* rows, ptrdiff_t stride) {
    u32v column;
    for (int lane = 0; lane < LANES; ++lane) column[lane] = rows[lane * stride];
    return column;
}

// LANES rows become LANES columns of a panel: to[i * PANEL + lane] = rows[lane * stride + i] for i < depth.
inline void transpose_into_panel(const cell* rows, ptrdiff_t stride, int depth, cell* to) {
    int i = 0;
    for (; i + 4 <= depth; i += 4) {
        u32v columns[4];
        transpose_four(rows + i, stride, columns);
        for (int c = 0; c < 4; ++c) store(to + (i + c) * PANEL, columns[c]);
    }
    for (; i < depth; ++i) store(to + i * PANEL, transpose_one(rows + i, stride));
}
