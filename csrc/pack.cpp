// Transposing rows of cells into the columns of a panel (product.h).
#include "product.h"

#if defined(__AVX512F__)

// Four cells of 16 rows. A vector takes the 128 bits of rows r, r + 4, r + 8, r + 12; a 4 x 4 transpose within the
// 128-bit lanes then leaves every vector with one cell of rows 0 .. 15, in order.
static inline void transpose_four(const cell* rows, ptrdiff_t stride, cell* to) {
    __m512i quad[4];
    for (int r = 0; r < 4; ++r) {
        __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(rows + r * stride)));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, _mm_loadu_si128((const __m128i*)(rows + (r + 4) * stride)));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, _mm_loadu_si128((const __m128i*)(rows + (r + 8) * stride)));
        quad[r] = _mm512_mask_broadcast_i32x4(v, 0xf000, _mm_loadu_si128((const __m128i*)(rows + (r + 12) * stride)));
    }
    __m512i low01 = _mm512_unpacklo_epi32(quad[0], quad[1]), high01 = _mm512_unpackhi_epi32(quad[0], quad[1]);
    __m512i low23 = _mm512_unpacklo_epi32(quad[2], quad[3]), high23 = _mm512_unpackhi_epi32(quad[2], quad[3]);
    _mm512_storeu_si512(to + 0 * PANEL, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + 1 * PANEL, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 2 * PANEL, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 3 * PANEL, _mm512_unpackhi_epi64(high01, high23));
}

#elif defined(__AVX2__)

static inline void transpose_four(const cell* rows, ptrdiff_t stride, cell* to) {
    __m256i quad[4];
    for (int r = 0; r < 4; ++r) {
        __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(rows + r * stride)));
        quad[r] = _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(rows + (r + 4) * stride)), 1);
    }
    __m256i low01 = _mm256_unpacklo_epi32(quad[0], quad[1]), high01 = _mm256_unpackhi_epi32(quad[0], quad[1]);
    __m256i low23 = _mm256_unpacklo_epi32(quad[2], quad[3]), high23 = _mm256_unpackhi_epi32(quad[2], quad[3]);
    _mm256_storeu_si256((__m256i*)(to + 0 * PANEL), _mm256_unpacklo_epi64(low01, low23));
    _mm256_storeu_si256((__m256i*)(to + 1 * PANEL), _mm256_unpackhi_epi64(low01, low23));
    _mm256_storeu_si256((__m256i*)(to + 2 * PANEL), _mm256_unpacklo_epi64(high01, high23));
    _mm256_storeu_si256((__m256i*)(to + 3 * PANEL), _mm256_unpackhi_epi64(high01, high23));
}

#else

static inline void transpose_four(const cell* rows, ptrdiff_t stride, cell* to) {
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < LANES; ++lane) to[i * PANEL + lane] = rows[lane * stride + i];
}

#endif

void transpose_into_panel(const cell* rows, ptrdiff_t stride, int depth, cell* to) {
    int i = 0;
    for (; i + 4 <= depth; i += 4) transpose_four(rows + i, stride, to + i * PANEL);
    for (; i < depth; ++i)
        for (int lane = 0; lane < LANES; ++lane) to[i * PANEL + lane] = rows[lane * stride + i];
}
