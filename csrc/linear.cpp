// Linear layers: out = x W^T + bias on the inner loop of product.h, W packed into panels once.
//
// A panel is the weights of PANEL outputs. A thread takes a panel and multiplies it with all rows of x, MAX_ROWS at a
// time; meanwhile the panel it will take next is brought into its cache. With one row this is a stream through memory.
//
// Invariant: as for every product, a row's result has the same bits in any batch. Where the depth is cut, sums wait in
// memory as the float32 they are.
#include <algorithm>

#include "buffer.h"
#include "dtype.h"
#include "product.h"
#include "rows.h"
#include "transpose.h"

namespace {

// Rows of x a task takes, if there are more: what is left of parallelism when there are few panels.
constexpr int64_t TASK_ROWS = 192;

// With few rows a panel is used up so soon that all of the next must be on its way: both have to fit the cache, so deep
// panels are cut. With more, to keep sums in memory costs more than that brings.
constexpr int64_t FEW_ROWS = 96, DEPTH_BLOCK = 512;  // rows, cells

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

template <class T>
class Linear {
    using Cells = typename std::conditional<PER_CELL<T> == 2, Pairs, Floats>::type;

   public:
    explicit Linear(const LinearArguments& arguments)
        : a(arguments), depth(a.inputs / PER_CELL<T>), panels((a.outputs + PANEL - 1) / PANEL) {}

    void run() const {
        const int64_t chunks = std::max<int64_t>(1, (a.rows + TASK_ROWS - 1) / TASK_ROWS), threads = num_threads();
        parallel_for(panels * chunks, [=](int64_t task) {
            const int64_t number = task / chunks, next = (task + threads) / chunks;  // a guess: others do as much
            const int64_t first = a.rows * (task % chunks) / chunks, end = a.rows * (task % chunks + 1) / chunks;
            multiply_panel(number, next == number || next >= panels ? nullptr : panel(next), first, int(end - first));
        });
    }

   private:
    const cell* panel(int64_t number) const { return static_cast<const cell*>(a.packed) + number * depth * PANEL; }

    void multiply_panel(int64_t number, const cell* next_panel, int64_t row, int rows) const {
        static thread_local Buffer<float> partial_sums;
        const int64_t most = rows > MAX_ROWS && rows <= FEW_ROWS ? DEPTH_BLOCK : depth;
        float* const partial = partial_sums.at_least(rows * PANEL);
        for (int64_t begin = 0, end; begin < depth; begin = end) {
            end = std::min(begin + most, depth);
            const cell* next = end < depth ? panel(number) + end * PANEL : next_panel;
            for_row_blocks(rows, next, end - begin, [&](auto count, int first, auto beside) {
                multiply<count.value>(number, row + first, begin, end, partial + first * PANEL, beside);
            });
        }
    }

    // The products of cells begin .. end of the depth. ``partial``: the sums of those before, then those up to ``end``.
    template <int ROWS, class Beside>
    void multiply(int64_t number, int64_t row, int64_t begin, int64_t end, float* partial, Beside beside) const {
        Sums<ROWS> sums = {};
        if (begin > 0) std::memcpy(sums, partial, sizeof sums);
        const cell* x = static_cast<const cell*>(a.x) + row * depth + begin;
        add_products<Cells, ROWS>(sums, x, depth, panel(number) + begin * PANEL, int(end - begin), beside);
        if (end == depth)
            finish<ROWS>(sums, number, row);
        else
            std::memcpy(partial, sums, sizeof sums);
    }

    template <int ROWS>
    void finish(const Sums<ROWS>& sums, int64_t number, int64_t row) const {
        const T* bias = static_cast<const T*>(a.bias);
        for (int i = 0; i < NV; ++i) {
            const int64_t first = number * PANEL + i * LANES;
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

    const LinearArguments& a;
    const int64_t depth, panels;  // depth: cells of a row
};

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
        Linear<float>(*arguments).run();
    else
        Linear<bf16>(*arguments).run();
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
