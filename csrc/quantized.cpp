// Linear layers with weights of 8 or 4 bits.
//
// A weight is q * scale, with one scale per output and per *group* of inputs (8 bits: all inputs are one group). It is
// stored without sign, q + 128 or q + 8, in panels as in product.h, but a cell holds four weights:
//
//     8 bits    cell i: weights 4i .. 4i + 3
//     4 bits    cell i of a group of G: its weights 4i .. 4i + 3 in the low halves of the bytes, G/2 + 4i .. in the high
//
// A row of x becomes integers, too, with one scale: one signed 8-bit digit per number ("w8a8"), or two, the number being
// digit + 256 * next digit, which is more than bfloat16 holds (weight-only quantisation). Digits are multiplied as rows of
// their own. Sums of integers are exact; those of the groups are added in order: again a row has the same bits in any
// batch.
#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "product.h"
#include "rows.h"
#include "transpose.h"

namespace {

constexpr int CELL_WEIGHTS = 4;
constexpr int MAX_DIGITS = 2;
constexpr int64_t TASK_ROWS = 192;  // as in linear.cpp

int offset_of(int bits) { return 1 << (bits - 1); }

int64_t cells_of(int64_t weights, int bits) { return weights * bits / 32; }

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

// ---- integers -----------------------------------------------------------------------------------------------------

// x * factor to the nearest integer, for magnitudes below 2^22.
i32v to_integers(f32v x, f32v factor) {
    return bit_cast<i32v>(fma(x, factor, splat(ROUNDING))) - bit_cast<int32_t>(ROUNDING);
}

void store_bytes(void* to, i32v numbers) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)numbers));
#else
    for (int i = 0; i < LANES; ++i) static_cast<int8_t*>(to)[i] = int8_t(numbers[i]);
#endif
}

int32_t sum_of(i32v numbers) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += numbers[i];
    return sum;
}

// ---- weights ------------------------------------------------------------------------------------------------------

// One group of one output: the largest weight becomes +-127, or -8 (that side has one more step). Returns the scale.
template <class T>
float quantize_group(const T* weights, int64_t count, int bits, uint8_t* to) {
    f32v most = {}, least = {};
    for (int64_t i = 0; i < count; i += LANES) {
        most = max(most, load(weights + i));
        least = max(least, -load(weights + i));
    }
    const float above = max_of(most), below = max_of(least);
    const float wanted = bits == 8 ? std::max(above, below) / 127.0f : (above > below ? -above : below) / 8.0f;
    const float scale = rounded<bf16>(splat(wanted))[0], inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    const int offset = offset_of(bits), low = bits == 8 ? 1 : 0, high = 2 * offset - 1;
    for (int64_t i = 0; i < count; i += LANES) {
        const i32v q = to_integers(load(weights + i), splat(inverse)) + offset;
        store_bytes(to + i, q < low ? i32v{} + low : q > high ? i32v{} + high : q);
    }
    return scale;
}

template <class T>
void pack(const QuantizedWeight& w, const T* weight, int64_t stride) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL, depth = cells_of(w.inputs, w.bits);
    const int64_t groups = w.inputs / w.group;
    cell* packed = static_cast<cell*>(w.packed);
    bf16* scales = static_cast<bf16*>(w.scales);
    parallel_for(panels * NV, [=](int64_t block) {
        static thread_local Buffer<uint8_t> numbers;
        static thread_local Buffer<cell> row_cells;
        uint8_t* group_numbers = numbers.at_least(w.group);
        cell* rows = row_cells.at_least(LANES * depth);
        std::memset(rows, 0, sizeof(cell) * LANES * depth);
        const int64_t panel = block / NV, first = block % NV * LANES;  // first column within the panel
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t output = panel * PANEL + first + lane;
            bf16* scale = scales + panel * groups * PANEL + first + lane;
            uint8_t* bytes = reinterpret_cast<uint8_t*>(rows + lane * depth);
            for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
                if (output >= w.outputs) {
                    scale->bits = 0;
                    continue;
                }
                const T* from = weight + output * stride + g * w.group;
                const float s = quantize_group(from, w.group, w.bits, group_numbers);
                scale->bits = uint16_t(bit_cast<uint32_t>(s) >> 16);
                if (w.bits == 8) {
                    std::memcpy(bytes, group_numbers, w.group), bytes += w.group;
                } else {
                    for (int64_t i = 0; i < w.group / 2; ++i)
                        *bytes++ = uint8_t(group_numbers[i] | group_numbers[i + w.group / 2] << 4);
                }
            }
        }
        transpose_into_panel(rows, depth, int(depth), packed + panel * depth * PANEL + first);
    });
}

// ---- activations --------------------------------------------------------------------------------------------------

// Rows of x as integers.
struct Digits {
    int8_t* digits;  // [rows, number of digits, inputs]
    int32_t* sums;   // [rows, number of digits, groups]
    float* scales;   // [rows]
};

template <class T>
void quantize_row(const T* x, int64_t row, const QuantizedWeight& w, int count, const Digits& to) {
    f32v most = {};
    for_lanes(w.inputs, [&](int64_t i, auto lanes) {
        const f32v value = lanes.load(x + i);
        most = max(most, max(value, -value));
    });
    const float largest = count == 1 ? 127.0f : 127.0f * 256.0f, scale = max_of(most) / largest;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    to.scales[row] = scale;
    int8_t* low = to.digits + row * count * w.inputs;
    int8_t* high = low + (count - 1) * w.inputs;
    int32_t* sums = to.sums + row * count * (w.inputs / w.group);
    for (int64_t begin = 0; begin < w.inputs; begin += w.group, ++sums) {
        i32v low_sum = {}, high_sum = {};
        for (int64_t i = begin; i < begin + w.group; i += LANES) {
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
        sums[0] = sum_of(low_sum);
        if (count == 2) sums[w.inputs / w.group] = sum_of(high_sum);
    }
}

// ---- product ------------------------------------------------------------------------------------------------------

template <int ROWS>
using IntegerSums = i32v[ROWS][NV];

// sums += x * panel over one group of ``cells`` cells of x, whose rows are ``stride`` apart.
template <int BITS, int ROWS>
inline __attribute__((always_inline)) void add_group(IntegerSums<ROWS>& sums, const cell* x, ptrdiff_t stride,
                                                     const cell* panel, int cells) {
    constexpr int HALVES = 8 / BITS;  // cells of x per cell of the panel
    for (int i = 0; i < cells / HALVES; ++i, panel += PANEL) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const u32v w = load(panel + v * LANES);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; ++row) {
                const u32v first = splat(x[row * stride + i]);
                if (BITS == 8) {
                    sums[row][v] = add_dot(sums[row][v], w, first);
                } else {
                    const u32v second = splat(x[row * stride + cells / 2 + i]);
                    sums[row][v] = add_dot(sums[row][v], w & 0x0f0f0f0fu, first);
                    sums[row][v] = add_dot(sums[row][v], w >> 4 & 0x0f0f0f0fu, second);
                }
            }
        }
    }
}

// A row's products with a group of weights, from those of its digits with the weights as they are stored, whose offset
// brings in the sums of the digits (``x_sums`` and, for the next digit, ``stride`` behind it).
template <int BITS, int DIGITS>
inline f32v join_digits(const i32v (*sums)[NV], int v, const int32_t* x_sums, int64_t stride) {
    constexpr int32_t OFFSET = 1 << (BITS - 1);
    const i32v low = sums[0][v] - x_sums[0] * OFFSET;
    if (DIGITS == 1) return __builtin_convertvector(low, f32v);
    const i32v high = sums[DIGITS - 1][v] - x_sums[stride] * OFFSET;
    if (BITS == 4) return __builtin_convertvector((high << 8) + low, f32v);  // at most 2^18 per weight, 2^13 weights
    return fma(__builtin_convertvector(high, f32v), splat(256.0f), __builtin_convertvector(low, f32v));
}

template <class T, int BITS, int DIGITS, int ROWS>
void multiply(const QuantizedArguments& a, const Digits& x, int64_t number, int64_t row) {
    const QuantizedWeight& w = a.weight;
    const int64_t groups = w.inputs / w.group, depth = cells_of(w.inputs, BITS), stride = w.inputs / CELL_WEIGHTS;
    const cell* panel = static_cast<const cell*>(w.packed) + number * depth * PANEL;
    const bf16* scales = static_cast<const bf16*>(w.scales) + number * groups * PANEL;
    const cell* digits = reinterpret_cast<const cell*>(x.digits) + row * DIGITS * stride;
    const int32_t* x_sums = x.sums + row * DIGITS * groups;
    const int cells = int(w.group / CELL_WEIGHTS);
    Sums<ROWS> total = {};
    for (int64_t g = 0; g < groups; ++g, panel += depth / groups * PANEL, digits += cells, scales += PANEL) {
        IntegerSums<ROWS * DIGITS> sums = {};
        add_group<BITS, ROWS * DIGITS>(sums, digits, stride, panel, cells);
        for (int r = 0; r < ROWS; ++r) {
            const int32_t* offsets = x_sums + r * DIGITS * groups + g;
            for (int v = 0; v < NV; ++v) {
                const f32v value = join_digits<BITS, DIGITS>(&sums[r * DIGITS], v, offsets, groups);
                total[r][v] = fma(value, load(scales + v * LANES), total[r][v]);
            }
        }
    }
    const T* bias = static_cast<const T*>(a.bias);
    for (int v = 0; v < NV; ++v) {
        const int64_t first = number * PANEL + v * LANES;
        const int count = int(std::min<int64_t>(LANES, w.outputs - first));
        if (count <= 0) break;
        const f32v b = bias ? load_some(bias + first, count) : f32v{};
        for (int r = 0; r < ROWS; ++r) {
            const f32v value = fma(total[r][v], splat(x.scales[row + r]), b);
            T* to = static_cast<T*>(a.out) + (row + r) * w.outputs + first;
            if (count == LANES)
                store(to, value);
            else
                store_some(to, value, count);
        }
    }
}

template <class T, int BITS, int DIGITS>
void linear(const QuantizedArguments& a) {
    const QuantizedWeight& w = a.weight;
    const int64_t groups = w.inputs / w.group, panels = (w.outputs + PANEL - 1) / PANEL;
    static thread_local Buffer<int8_t> digits;
    static thread_local Buffer<int32_t> sums;
    static thread_local Buffer<float> scales;
    const Digits x{digits.at_least(a.rows * DIGITS * w.inputs), sums.at_least(a.rows * DIGITS * groups),
                   scales.at_least(a.rows)};
    for_rows(a.rows, w.inputs,
             [&](int64_t row) { quantize_row(static_cast<const T*>(a.x) + row * w.inputs, row, w, DIGITS, x); });
    const int64_t chunks = std::max<int64_t>(1, (a.rows + TASK_ROWS - 1) / TASK_ROWS);
    parallel_for(panels * chunks, [&](int64_t task) {
        const int64_t first = a.rows * (task % chunks) / chunks, end = a.rows * (task % chunks + 1) / chunks;
        for_row_blocks<MAX_ROWS / DIGITS>(int(end - first), [&](auto rows, int row) {
            multiply<T, BITS, DIGITS, rows.value>(a, x, task / chunks, first + row);
        });
    });
}

template <class T>
void dequantize_rows(const QuantizedArguments& a) {
    const QuantizedWeight& w = a.weight;
    const int64_t* rows = static_cast<const int64_t*>(a.x);
    T* out = static_cast<T*>(a.out);
    const int64_t depth = cells_of(w.inputs, w.bits), groups = w.inputs / w.group, group_cells = depth / groups;
    for_rows(a.rows, w.inputs, [=, &w](int64_t i) {
        const int64_t panel = rows[i] / PANEL, column = rows[i] % PANEL;
        const cell* from = static_cast<const cell*>(w.packed) + panel * depth * PANEL + column;
        const bf16* scales = static_cast<const bf16*>(w.scales) + panel * groups * PANEL + column;
        T* to = out + i * w.inputs;
        for (int64_t n = 0; n < w.inputs; ++n) {
            const int64_t group = n / w.group, in_group = n % w.group, half = w.group / 2;
            const int64_t byte = w.bits == 8 ? in_group : in_group % half;
            const cell bytes = from[(group * group_cells + byte / CELL_WEIGHTS) * PANEL];
            int q = bytes >> byte % CELL_WEIGHTS * 8 & 0xff;
            if (w.bits == 4) q = in_group < half ? q & 0x0f : q >> 4;
            const float scale = bit_cast<float>(uint32_t(scales[group * PANEL].bits) << 16);
            store_some(to + n, splat(float(q - offset_of(w.bits)) * scale), 1);
        }
    });
}

template <class T>
void linear(const QuantizedArguments& a) {
    if (a.weight.bits == 4) return linear<T, 4, 2>(a);
    if (a.digits == 2) return linear<T, 8, 2>(a);
    linear<T, 8, 1>(a);
}

}  // namespace

int64_t nanovllm_quantized_bytes(int64_t outputs, int64_t inputs, int32_t bits) {
    return (outputs + PANEL - 1) / PANEL * PANEL * cells_of(inputs, bits) * int64_t(sizeof(cell));
}

int64_t nanovllm_scale_count(int64_t outputs, int64_t inputs, int64_t group) {
    return (outputs + PANEL - 1) / PANEL * PANEL * (inputs / group);
}

void nanovllm_quantize(const QuantizedWeight* to, const void* weight, int64_t stride, int32_t dtype) {
    with_type(dtype, [=](auto number) { pack(*to, static_cast<const decltype(number)*>(weight), stride); });
}

void nanovllm_quantized_linear(const QuantizedArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { linear<decltype(number)>(*arguments); });
}

void nanovllm_dequantize_rows(const QuantizedArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { dequantize_rows<decltype(number)>(*arguments); });
}
