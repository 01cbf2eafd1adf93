// Linear layers with weights of 4 bits, one scale per output and group of inputs.
//
// A weight without its scale, -8 .. 7, is exact in bfloat16 and float32: it becomes a cell of product.h, and the sums of
// a group are multiplied with the scale. So x is not rounded, and nothing but the weights' own rounding is lost. With few
// rows cells are made in registers, at the speed of memory; with many a group is unpacked once, into the nearest cache.
//
// Invariant: both ways add in the same order, so a row has the same bits in any batch.
#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "quantized.h"
#include "rows.h"

namespace {

constexpr int CELL_WEIGHTS = 8;
constexpr int PREFETCH = 1024;  // cells, 4 KB

inline f32v to_float(u32v nibbles) { return __builtin_convertvector(bit_cast<i32v>(nibbles & 15u), f32v) - 8.0f; }

// How a cell of weights is taken apart: STEPS cells of products, each with WEIGHTS inputs.
template <class T>
struct Unpack {
    using Cells = Floats;
    static constexpr int STEPS = 8, WEIGHTS = 1;
    static u32v step(u32v packed, int number) { return bit_cast<u32v>(to_float(packed >> place_of(number, 4))); }
};
template <>
struct Unpack<bf16> {
    using Cells = Pairs;
    static constexpr int STEPS = 4, WEIGHTS = 2;
    static u32v step(u32v packed, int number) {
        packed = packed >> 4 * number;
#if defined(__AVX512BW__)
        // A table of bfloat16, -8 .. 7, looked up with the lowest bits of each half; the fifth counts, too.
        const __m512i table = _mm512_broadcast_i64x4(_mm256_set_epi16(
            0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0x0000,
            short(0xbf80), short(0xc000), short(0xc040), short(0xc080), short(0xc0a0), short(0xc0c0), short(0xc0e0),
            short(0xc100)));
        return (u32v)_mm512_permutexvar_epi16((__m512i)packed, table);
#else
        return bit_cast<u32v>(to_float(packed)) >> 16 | bit_cast<u32v>(to_float(packed >> 16));
#endif
    }
};

// One weight of 4 bits, and what is needed to multiply it with rows of x.
template <class T>
class Product {
    using Cells = typename Unpack<T>::Cells;
    static constexpr int STEPS = Unpack<T>::STEPS;

   public:
    // ``x``: rows as cells; numbers that are not bfloat16 are float32.
    Product(const QuantizedArguments& arguments, const cell* rows_of_x)
        : a(arguments),
          w(a.weight),
          x(rows_of_x),
          depth(w.inputs / Unpack<T>::WEIGHTS),
          groups(w.inputs / w.group),
          group_depth(int(depth / groups)) {}

    void run() const {
        const int64_t panels = (w.outputs + PANEL - 1) / PANEL;
        const int64_t chunks = std::max<int64_t>(1, (a.rows + TASK_ROWS - 1) / TASK_ROWS);
        parallel_for(panels * chunks, [&](int64_t task) {
            const int64_t number = task / chunks, first = a.rows * (task % chunks) / chunks;
            const int rows = int(a.rows * (task % chunks + 1) / chunks - first);
            if (rows <= MAX_ROWS) {
                if (rows) with_row_count(rows, [&](auto count) { multiply_packed<count.value>(number, first); });
                return;
            }
            multiply_unpacked(number, first, rows);
        });
    }

   private:
    const cell* packed(int64_t number) const {
        return static_cast<const cell*>(w.packed) + number * (w.inputs / CELL_WEIGHTS) * PANEL;
    }

    // Many rows: a group becomes cells in the nearest cache, and is multiplied with all of them.
    void multiply_unpacked(int64_t number, int64_t row, int rows) const {
        static thread_local Buffer<cell> unpacked;
        static thread_local Buffer<float> totals;
        cell* const group = unpacked.at_least(group_depth * PANEL);
        float* const total = totals.at_least(rows * PANEL);
        std::memset(total, 0, sizeof(float) * rows * PANEL);
        const cell* from = packed(number);
        for (int64_t g = 0; g < groups; ++g) {
            for (cell* to = group; to != group + group_depth * PANEL; from += PANEL, to += STEPS * PANEL) {
                prefetch(from);
                for (int v = 0; v < PANEL; v += LANES) {
                    const u32v cells = load(from + v);
                    for (int s = 0; s < STEPS; ++s) store(to + s * PANEL + v, Unpack<T>::step(cells, s));
                }
            }
            for_row_blocks(rows, [&](auto count, int first) {
                Sums<count.value> sums = {};
                add_products<Cells, count.value>(sums, x + (row + first) * depth + g * group_depth, depth, group,
                                                 group_depth);
                add_group<count.value>(*reinterpret_cast<Sums<count.value>*>(total + first * PANEL), sums, number, g);
            });
        }
        for_row_blocks(rows, [&](auto count, int first) {
            finish<count.value>(*reinterpret_cast<Sums<count.value>*>(total + first * PANEL), number, row + first);
        });
    }

    // A few rows: cells are made in registers.
    template <int ROWS>
    void multiply_packed(int64_t number, int64_t row) const {
        Sums<ROWS> total = {};
        const cell *panel = packed(number), *rows = x + row * depth;
        for (int64_t g = 0; g < groups; ++g) {
            Sums<ROWS> sums = {};
            for (int i = 0; i < group_depth; i += STEPS, panel += PANEL, rows += STEPS) {
                prefetch(panel);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    const u32v cells = load(panel + v * LANES);
#pragma GCC unroll 8
                    for (int s = 0; s < STEPS; ++s) {
                        const u32v weights = Unpack<T>::step(cells, s);
#pragma GCC unroll 6
                        for (int r = 0; r < ROWS; ++r)
                            sums[r][v] = Cells::add_product(sums[r][v], splat(rows[r * depth + s]), weights);
                    }
                }
            }
            add_group<ROWS>(total, sums, number, g);
        }
        finish<ROWS>(total, number, row);
    }

    // The hardware foresees no further than the end of a small page.
    static void prefetch(const cell* packed) {
        for (int i = 0; i < PANEL; i += 16) __builtin_prefetch(packed + PREFETCH + i);
    }

    template <int ROWS>
    void add_group(Sums<ROWS>& total, const Sums<ROWS>& sums, int64_t number, int64_t group) const {
        const bf16* scales = static_cast<const bf16*>(w.scales) + (number * groups + group) * PANEL;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const f32v scale = load(scales + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) total[r][v] = fma(sums[r][v], scale, total[r][v]);
        }
    }

    template <int ROWS>
    void finish(const Sums<ROWS>& total, int64_t number, int64_t row) const {
        store_panel<T, ROWS>(total, static_cast<const T*>(a.bias), static_cast<T*>(a.out) + row * w.outputs, w.outputs,
                             number, [](int) { return 1.0f; });
    }

    const QuantizedArguments& a;
    const QuantizedWeight& w;
    const cell* const x;
    const int64_t depth, groups;  // depth: cells of a row
    const int group_depth;
};

}  // namespace

void int4_linear(const QuantizedArguments& arguments) {
    const QuantizedArguments& a = arguments;
    if (a.dtype == BFLOAT16) return Product<bf16>(a, static_cast<const cell*>(a.x)).run();
    if (a.dtype == FLOAT32) return Product<float>(a, static_cast<const cell*>(a.x)).run();
    static thread_local Buffer<float> floats;
    const int64_t n = a.weight.inputs;
    float* x = floats.at_least(a.rows * n);
    for_rows(a.rows, n, [&](int64_t row) {
        const fp16* from = static_cast<const fp16*>(a.x) + row * n;
        for (int64_t i = 0; i < n; i += LANES) store(x + row * n + i, load(from + i));
    });
    Product<fp16>(a, reinterpret_cast<const cell*>(x)).run();
}
