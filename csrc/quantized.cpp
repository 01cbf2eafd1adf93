// Weights of 8 or 4 bits: rounding and packing them, and their rows. Their products are in int8.cpp and int4.cpp.
#include "quantized.h"

#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "rows.h"
#include "transpose.h"

namespace {

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
    const int per_cell = 32 / w.bits;
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
            cell* cells = rows + lane * depth;
            for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
                if (output >= w.outputs) {
                    scale->bits = 0;
                    continue;
                }
                const T* from = weight + output * stride + g * w.group;
                const float s = quantize_group(from, w.group, w.bits, group_numbers);
                scale->bits = uint16_t(bit_cast<uint32_t>(s) >> 16);
                for (int64_t i = 0; i < w.group; ++cells)
                    for (int number = 0; number < per_cell; ++number)
                        *cells |= cell(group_numbers[i++]) << place_of(number, w.bits);
            }
        }
        transpose_into_panel(rows, depth, int(depth), packed + panel * depth * PANEL + first);
    });
}

template <class T>
void dequantize_rows(const QuantizedArguments& a) {
    const QuantizedWeight& w = a.weight;
    const int64_t* rows = static_cast<const int64_t*>(a.x);
    T* out = static_cast<T*>(a.out);
    const int64_t depth = cells_of(w.inputs, w.bits), groups = w.inputs / w.group;
    const int per_cell = 32 / w.bits, offset = offset_of(w.bits);
    for_rows(a.rows, w.inputs, [=, &w](int64_t i) {
        const int64_t panel = rows[i] / PANEL, column = rows[i] % PANEL;
        const cell* from = static_cast<const cell*>(w.packed) + panel * depth * PANEL + column;
        const bf16* scales = static_cast<const bf16*>(w.scales) + panel * groups * PANEL + column;
        T* to = out + i * w.inputs;
        for (int64_t n = 0; n < w.inputs; ++n) {
            const int number = int(n % per_cell);
            const int q = int(from[n / per_cell * PANEL] >> place_of(number, w.bits) & (2 * offset - 1));
            const float scale = bit_cast<float>(uint32_t(scales[n / w.group * PANEL].bits) << 16);
            store_some(to + n, splat(float(q - offset) * scale), 1);
        }
    });
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
    (arguments->weight.bits == 8 ? int8_linear : int4_linear)(*arguments);
}

void nanovllm_dequantize_rows(const QuantizedArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { dequantize_rows<decltype(number)>(*arguments); });
}
