// The inner loop of linear layers and of attention: C [rows, columns] += A [rows, depth] * B [depth, columns].
//
// Operands are made of 32-bit *cells*: one float, or two bfloat16 that are neighbours along the depth. A is row-major.
// B is packed: its columns are cut into panels of PANEL columns, and a panel stores its cells depth-major:
//
//     panel[cell of the depth][PANEL columns]        contiguous; missing columns are zero
//
// so a step along the depth loads NV vectors of B, and multiplies them with one broadcast cell of each row of A.
//
// Invariant: an element of C is a chain of additions along the depth, first cell to last, whatever the number of rows or
// columns computed beside it. A row's result does not depend on the batch it is in.
#pragma once

#include "simd.h"

using cell = uint32_t;  // also a view of floats and bfloat16: compiled with -fno-strict-aliasing

#if defined(__AVX512F__)
constexpr int NV = 4;  // 6 x 4 sums, 4 vectors of B, 1 of A: 29 of 32 registers
#else
constexpr int NV = 2;  // 6 x 2 sums, 2 vectors of B, 1 of A: 15 of 16 registers
#endif
constexpr int PANEL = NV * LANES;
constexpr int MAX_ROWS = 6;

// A cell of one float.
struct Floats {
    static f32v add_product(f32v sum, u32v a, u32v b) { return fma(bit_cast<f32v>(a), bit_cast<f32v>(b), sum); }
};

// A cell of two bfloat16, the first in the low half.
struct Pairs {
    static f32v add_product(f32v sum, u32v a, u32v b) {
#if defined(__AVX512BF16__)
        return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        sum = fma(bit_cast<f32v>(a << 16), bit_cast<f32v>(b << 16), sum);
        return fma(bit_cast<f32v>(a & 0xffff0000u), bit_cast<f32v>(b & 0xffff0000u), sum);
#endif
    }
};

template <int ROWS>
using Sums = f32v[ROWS][NV];

// What is done beside a product, once per step along the depth.
struct Nothing {
    void step() {}
};

// Asks for memory that is needed next, at an even pace: LINES cache lines in a step, or parts of one line.
template <int LINES>
struct Prefetch {
    const char* memory;
    uint64_t place, pace;  // in bytes / 65536

    void step() {
        for (int i = 0; i < LINES; ++i) __builtin_prefetch(memory + (place >> 16) + 64 * i, 0, 2);
        place += pace;
    }
};

// sums[row][column] += a[row] * panel, over ``depth`` cells; of the panel's vectors, the first VECTORS. Rows of A are
// ``a_stride`` cells apart.
template <class Cells, int ROWS, int VECTORS, class Beside = Nothing>
inline __attribute__((always_inline)) void add_products(f32v (&sums)[ROWS][VECTORS], const cell* a, ptrdiff_t a_stride,
                                                        const cell* panel, int depth, Beside beside = {}) {
    for (int i = 0; i < depth; ++i, panel += PANEL) {
        beside.step();
        u32v b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + v * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
            u32v broadcast = splat(a[row * a_stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[row][v] = Cells::add_product(sums[row][v], broadcast, b[v]);
        }
    }
}

// Calls f(RowCount<rows>): the number of rows becomes a compile-time constant.
template <int ROWS>
struct RowCount {
    static constexpr int value = ROWS;
};

template <int MOST = MAX_ROWS, class F>
inline __attribute__((always_inline)) void with_row_count(int rows, F&& f) {
    if constexpr (MOST > 1) {
        if (rows < MOST) return with_row_count<MOST - 1>(rows, f);
    }
    f(RowCount<MOST>{});
}

// Calls f(RowCount, first row) for all of ``rows``, in as few and as equal blocks of at most MOST as possible.
template <int MOST = MAX_ROWS, class F>
inline __attribute__((always_inline)) void for_row_blocks(int rows, F&& f) {
    int blocks = (rows + MOST - 1) / MOST;
    for (int block = 0, first = 0; block < blocks; ++block) {
        int count = (rows - first + blocks - block - 1) / (blocks - block);
        with_row_count<MOST>(count, [&](auto n) { f(n, first); });
        first += count;
    }
}

// As for_row_blocks, with f(RowCount, first row, beside): products over ``depth`` cells with ``beside`` bring ``next``,
// of as many cells, into the cache. While a panel is multiplied with several blocks of rows, memory has nothing else to
// do; with one block it is read as fast as it comes.
template <int MOST = MAX_ROWS, class F>
inline __attribute__((always_inline)) void for_row_blocks(int rows, const cell* next, int64_t depth, F&& f) {
    constexpr uint64_t STEP = PANEL * sizeof(cell);
    const int blocks = (rows + MOST - 1) / MOST;
    if (!next || blocks < 2) return for_row_blocks<MOST>(rows, [&](auto count, int row) { f(count, row, Nothing{}); });
    const char* memory = reinterpret_cast<const char*>(next);
    const uint64_t pace = (STEP << 16) / blocks;
    uint64_t place = 0;
    for_row_blocks<MOST>(rows, [&](auto count, int row) {
        if (STEP > 64 * uint64_t(blocks))
            f(count, row, Prefetch<2>{memory, place, pace});
        else
            f(count, row, Prefetch<1>{memory, place, pace});
        place += pace * depth;
    });
}
