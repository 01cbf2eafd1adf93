// Linear layers: out = x W^T + bias on the inner loop of product.h, W packed into panels once.
//
// A panel is the weights of PANEL outputs. A thread takes a panel and multiplies it with all rows of x, MAX_ROWS at a
// time; the first block of rows brings the panel into the thread's cache, the others find it there. With one row this is
// a stream through memory.
//
// Invariant: as for every product, a row's result has the same bits in any batch.
#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "product.h"
#include "rows.h"
#include "transpose.h"

namespace {

// Rows of x a task takes, if there are more: what is left of parallelism when there are few panels.
constexpr int64_t TASK_ROWS = 192;

template <class T>
constexpr int PER_CELL = sizeof(cell) / sizeof(T);

// A panel takes as much room as the rows it is made of: so a weight can be packed where it lies, panel by panel.
template <class T>
void pack_linear(const T* weight, int64_t outputs, int64_t inputs, int64_t stride, cell* packed) {
    const int64_t depth = inputs / PER_CELL<T>, panels = (outputs + PANEL - 1) / PANEL;
    const cell* rows = reinterpret_cast<const cell*>(weight);
    parallel_for(panels, [=](int64_t panel) {
        thread_local Buffer<cell> copy;
        const int64_t count = std::min<int64_t>(PANEL, outputs - panel * PANEL);
        ptrdiff_t cell_stride = stride / PER_CELL<T>;
        const cell* from = rows + panel * PANEL * cell_stride;
        if (rows == packed) {
            from = static_cast<cell*>(std::memcpy(copy.at_least(PANEL * depth), from, PANEL * depth * sizeof(cell)));
            cell_stride = depth;
        }
        for (int64_t first = 0; first < PANEL; first += LANES) {
            cell* to = packed + panel * PANEL * depth + first;
            if (first + LANES <= count) {
                transpose_into_panel(from + first * cell_stride, cell_stride, int(depth), to);
                continue;
            }
            for (int64_t i = 0; i < depth; ++i)  // columns without an output are zero
                for (int lane = 0; lane < LANES; ++lane)
                    to[i * PANEL + lane] = first + lane < count ? from[(first + lane) * cell_stride + i] : 0;
        }
    });
}

template <class T, int ROWS>
inline void multiply(const LinearArguments& a, const cell* x, const cell* panel, int64_t row, int64_t column) {
    using Cells = typename std::conditional<PER_CELL<T> == 2, Pairs, Floats>::type;
    const int64_t x_stride = a.inputs / PER_CELL<T>;
    Sums<ROWS> sums = {};
    add_products<Cells, ROWS>(sums, x + row * x_stride, x_stride, panel, int(x_stride));
    const T* bias = static_cast<const T*>(a.bias);
    for (int i = 0; i < NV; ++i) {
        const int64_t first = column + i * LANES;
        const int count = int(std::min<int64_t>(LANES, a.outputs - first));
        if (count <= 0) break;
        f32v b = {};
        if (bias) b = count == LANES ? load(bias + first) : load_some(bias + first, count);
        for (int r = 0; r < ROWS; ++r) {
            T* to = static_cast<T*>(a.out) + (row + r) * a.outputs + first;
            if (count == LANES)
                store(to, sums[r][i] + b);
            else
                store_some(to, sums[r][i] + b, count);
        }
    }
}

template <class T>
void linear(const LinearArguments& a) {
    const int64_t depth = a.inputs / PER_CELL<T>, panels = (a.outputs + PANEL - 1) / PANEL;
    const int64_t chunks = std::max<int64_t>(1, (a.rows + TASK_ROWS - 1) / TASK_ROWS);
    const cell* x = static_cast<const cell*>(a.x);
    parallel_for(panels * chunks, [&](int64_t task) {
        const int64_t number = task / chunks, first = a.rows * (task % chunks) / chunks;
        const int64_t end = a.rows * (task % chunks + 1) / chunks;
        const cell* panel = static_cast<const cell*>(a.packed) + number * depth * PANEL;
        for_row_blocks(int(end - first),
                       [&](auto rows, int row) { multiply<T, rows.value>(a, x, panel, first + row, number * PANEL); });
    });
}

}  // namespace

int64_t nanovllm_packed_bytes(int64_t outputs, int64_t inputs, int32_t dtype) {
    const int64_t depth = dtype == FLOAT32 ? inputs : inputs / 2;
    return (outputs + PANEL - 1) / PANEL * PANEL * depth * int64_t(sizeof(cell));
}

void nanovllm_pack_linear(const void* weight, int64_t outputs, int64_t inputs, int64_t stride, void* packed,
                          int32_t dtype) {
    if (dtype == FLOAT32)
        pack_linear(static_cast<const float*>(weight), outputs, inputs, stride, static_cast<cell*>(packed));
    else
        pack_linear(static_cast<const bf16*>(weight), outputs, inputs, stride, static_cast<cell*>(packed));
}

void nanovllm_linear(const LinearArguments* arguments) {
    if (arguments->dtype == FLOAT32)
        linear<float>(*arguments);
    else
        linear<bf16>(*arguments);
}

void nanovllm_unpack_rows(const LinearArguments* arguments) {
    const LinearArguments& a = *arguments;
    const int64_t* rows = static_cast<const int64_t*>(a.x);
    const int64_t depth = a.dtype == FLOAT32 ? a.inputs : a.inputs / 2;
    const cell* packed = static_cast<const cell*>(a.packed);
    for_rows(a.rows, a.inputs, [=, &a](int64_t i) {
        const cell* column = packed + rows[i] / PANEL * PANEL * depth + rows[i] % PANEL;
        cell* to = static_cast<cell*>(a.out) + i * depth;
        for (int64_t c = 0; c < depth; ++c) to[c] = column[c * PANEL];
    });
}

void nanovllm_gather_rows(const GatherArguments* arguments) {
    const GatherArguments& a = *arguments;
    for_rows(a.rows, a.row_bytes, [&](int64_t i) {
        std::memcpy(static_cast<char*>(a.out) + i * a.row_bytes,
                    static_cast<const char*>(a.from) + a.indices[i] * a.row_bytes, a.row_bytes);
    });
}
