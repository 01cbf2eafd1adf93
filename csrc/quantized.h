// What the files on quantised weights share: how a weight is stored, and the two products.
//
// A weight is q * scale, with one scale per output and per *group* of inputs. It is stored without sign, q + 128 or
// q + 8, in panels as in product.h, whose cells hold several weights of one output:
//
//     8 bits    cell i: weights 4i .. 4i + 3, lowest byte first
//     4 bits    cell i: weights 8i .. 8i + 7; those with even numbers in the low half, lowest bits first
#pragma once

#include "product.h"

constexpr int64_t TASK_ROWS = 192;  // as in linear.cpp

inline int offset_of(int bits) { return 1 << (bits - 1); }

inline int64_t cells_of(int64_t weights, int bits) { return weights * bits / 32; }

// The bits of a cell where weight ``number`` of it begins.
inline int place_of(int number, int bits) { return bits == 8 ? 8 * number : 16 * (number % 2) + 4 * (number / 2); }

// x * factor to the nearest integer, for magnitudes below 2^22.
inline i32v to_integers(f32v x, f32v factor) {
    return bit_cast<i32v>(fma(x, factor, splat(ROUNDING))) - bit_cast<int32_t>(ROUNDING);
}

inline void store_bytes(void* to, i32v numbers) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)numbers));
#else
    for (int i = 0; i < LANES; ++i) static_cast<int8_t*>(to)[i] = int8_t(numbers[i]);
#endif
}

struct QuantizedArguments;
void int8_linear(const QuantizedArguments& arguments);
void int4_linear(const QuantizedArguments& arguments);

// Stores sums * scale + bias for ``rows`` rows of panel ``number``; ``scale`` gives that of a row.
template <class T, int ROWS, class F>
inline void store_panel(const f32v (&sums)[ROWS][NV], const T* bias, T* out, int64_t outputs, int64_t number,
                        F&& scale) {
    for (int v = 0; v < NV; ++v) {
        const int64_t first = number * PANEL + v * LANES;
        const int count = int(first + LANES <= outputs ? LANES : outputs - first);
        if (count <= 0) break;
        const f32v b = bias ? (count == LANES ? load(bias + first) : load_some(bias + first, count)) : f32v{};
        for (int r = 0; r < ROWS; ++r) {
            const f32v value = fma(sums[r][v], splat(scale(r)), b);
            if (count == LANES)
                store(out + r * outputs + first, value);
            else
                store_some(out + r * outputs + first, value, count);
        }
    }
}
