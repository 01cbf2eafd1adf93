// Linear layers with weights of 8 bits, one scale per output.
//
// A row of x becomes integers, too, with one scale: one signed 8-bit digit per number ("w8a8"), or two, the number being
// digit + 256 * next digit, which is more than bfloat16 holds (weight-only quantisation). Digits are multiplied as rows of
// their own. Sums of integers are exact: again a row has the same bits in any batch.
#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "quantized.h"
#include "rows.h"

namespace {

constexpr int CELL_WEIGHTS = 4;
constexpr int32_t OFFSET = 128;

// sum + the four products of unsigned bytes of w and signed bytes of x, by lane.
inline i32v add_dot(i32v sum, u32v w, u32v x) {
#if defined(__AVX512VNNI__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), odd = _mm512_srai_epi16((__m512i)x, 8);
    const __m512i low = (__m512i)(w & 0x00ff00ffu), high = (__m512i)(w >> 8 & 0x00ff00ffu);
    return sum + (i32v)_mm512_madd_epi16(low, even) + (i32v)_mm512_madd_epi16(high, odd);
#elif defined(__AVX2__)
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), odd = _mm256_srai_epi16((__m256i)x, 8);
    const __m256i low = (__m256i)(w & 0x00ff00ffu), high = (__m256i)(w >> 8 & 0x00ff00ffu);
    return sum + (i32v)_mm256_madd_epi16(low, even) + (i32v)_mm256_madd_epi16(high, odd);
#else
    for (int byte = 0; byte < 32; byte += 8)
        sum = sum + bit_cast<i32v>(w >> byte & 0xffu) * (bit_cast<i32v>(x << (24 - byte)) >> 24);
    return sum;
#endif
}

int32_t sum_of(i32v numbers) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += numbers[i];
    return sum;
}

// ---- activations --------------------------------------------------------------------------------------------------

// Rows of x as integers.
struct Digits {
    int8_t* digits;  // [rows, number of digits, inputs]
    int32_t* sums;   // [rows, number of digits]
    float* scales;   // [rows]
};

template <class T>
void quantize_row(const T* x, int64_t row, int64_t inputs, int count, const Digits& to) {
    f32v most = {};
    for (int64_t i = 0; i < inputs; i += LANES) {
        const f32v value = load(x + i);
        most = max(most, max(value, -value));
    }
    const float largest = count == 1 ? 127.0f : 127.0f * 256.0f, scale = max_of(most) / largest;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    to.scales[row] = scale;
    int8_t* low = to.digits + row * count * inputs;
    int8_t* high = low + (count - 1) * inputs;
    i32v low_sum = {}, high_sum = {};
    for (int64_t i = 0; i < inputs; i += LANES) {
        i32v number = to_integers(load(x + i), splat(inverse));
        if (count == 2) {
            const i32v upper = (number + 128) >> 8;
            store_bytes(high + i, upper);
            high_sum += upper;
            number -= upper << 8;
        }
        store_bytes(low + i, number);
        low_sum += number;
    }
    int32_t* sums = to.sums + row * count;
    sums[0] = sum_of(low_sum);
    if (count == 2) sums[1] = sum_of(high_sum);
}

// ---- product ------------------------------------------------------------------------------------------------------

template <int ROWS>
using IntegerSums = i32v[ROWS][NV];

// sums += x * panel over ``cells`` cells, for rows of digits that are as many cells apart.
template <int ROWS, class Beside>
inline __attribute__((always_inline)) void add_dots(IntegerSums<ROWS>& sums, const cell* x, const cell* panel,
                                                    int64_t cells, Beside beside) {
    for (int64_t i = 0; i < cells; ++i, panel += PANEL) {
        beside.step();
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const u32v w = load(panel + v * LANES);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; ++row) sums[row][v] = add_dot(sums[row][v], w, splat(x[row * cells + i]));
        }
    }
}

template <class T, int DIGITS, int ROWS, class Beside>
void multiply(const QuantizedArguments& a, const Digits& x, int64_t number, int64_t row, Beside beside) {
    const QuantizedWeight& w = a.weight;
    const int64_t cells = w.inputs / CELL_WEIGHTS;
    IntegerSums<ROWS * DIGITS> sums = {};
    add_dots<ROWS * DIGITS>(sums, reinterpret_cast<const cell*>(x.digits) + row * DIGITS * cells,
                            static_cast<const cell*>(w.packed) + number * cells * PANEL, cells, beside);
    Sums<ROWS> total;
    const bf16* scales = static_cast<const bf16*>(w.scales) + number * PANEL;
    for (int r = 0; r < ROWS; ++r) {
        const int32_t* x_sums = x.sums + (row + r) * DIGITS;  // what the weights' offset brings in
        for (int v = 0; v < NV; ++v) {
            f32v value = __builtin_convertvector(sums[r * DIGITS][v] - x_sums[0] * OFFSET, f32v);
            if (DIGITS == 2) {
                const i32v high = sums[r * DIGITS + 1][v] - x_sums[DIGITS - 1] * OFFSET;
                value = fma(__builtin_convertvector(high, f32v), splat(256.0f), value);
            }
            total[r][v] = value * load(scales + v * LANES);
        }
    }
    store_panel<T, ROWS>(total, static_cast<const T*>(a.bias), static_cast<T*>(a.out) + row * w.outputs, w.outputs,
                         number, [&](int r) { return x.scales[row + r]; });
}

template <class T, int DIGITS>
void linear(const QuantizedArguments& a) {
    const QuantizedWeight& w = a.weight;
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL;
    static thread_local Buffer<int8_t> digits;
    static thread_local Buffer<int32_t> sums;
    static thread_local Buffer<float> scales;
    const Digits x{digits.at_least(a.rows * DIGITS * w.inputs), sums.at_least(a.rows * DIGITS),
                   scales.at_least(a.rows)};
    for_rows(a.rows, w.inputs, [&](int64_t row) {
        quantize_row(static_cast<const T*>(a.x) + row * w.inputs, row, w.inputs, DIGITS, x);
    });
    const int64_t chunks = std::max<int64_t>(1, (a.rows + TASK_ROWS - 1) / TASK_ROWS), threads = num_threads();
    const int64_t cells = w.inputs / CELL_WEIGHTS;
    parallel_for(panels * chunks, [&](int64_t task) {
        const int64_t number = task / chunks, next = (task + threads) / chunks;  // as in linear.cpp
        const int64_t first = a.rows * (task % chunks) / chunks, end = a.rows * (task % chunks + 1) / chunks;
        const cell* next_panel =
            next == number || next >= panels ? nullptr : static_cast<const cell*>(w.packed) + next * cells * PANEL;
        for_row_blocks<MAX_ROWS / DIGITS>(int(end - first), next_panel, cells, [&](auto rows, int row, auto beside) {
            multiply<T, DIGITS, rows.value>(a, x, number, first + row, beside);
        });
    });
}

}  // namespace

void int8_linear(const QuantizedArguments& arguments) {
    with_type(arguments.dtype, [&](auto number) {
        using T = decltype(number);
        arguments.digits == 2 ? linear<T, 2>(arguments) : linear<T, 1>(arguments);
    });
}
