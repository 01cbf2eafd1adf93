// Walking over rows of numbers, and over many rows with several threads.
#pragma once

#include "dtype.h"
#include "parallel.h"
#include "simd.h"

// Below this many elements a second thread costs more than it brings.
constexpr int64_t PARALLEL_ELEMENTS = 1 << 16;

// A whole vector, or what remains at the end of a row.
struct AllLanes {
    template <class T>
    f32v load(const T* from) const { return ::load(from); }
    template <class T>
    void store(T* to, f32v v) const { ::store(to, v); }
};
struct SomeLanes {
    int count;
    template <class T>
    f32v load(const T* from) const { return load_some(from, count); }
    template <class T>
    void store(T* to, f32v v) const { store_some(to, v, count); }
};

// Calls f(offset, lanes) for a row of n elements; ``lanes`` loads and stores.
template <class F>
inline __attribute__((always_inline)) void for_lanes(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, AllLanes{});
    if (i < n) f(i, SomeLanes{int(n - i)});
}

// Calls f(row) for all rows, divided among the threads if there is enough work.
template <class F>
inline void for_rows(int64_t rows, int64_t elements_per_row, const F& f) {
    const int64_t tasks = rows * elements_per_row < PARALLEL_ELEMENTS ? 1 : std::min<int64_t>(rows, 4 * num_threads());
    parallel_for(tasks, [&](int64_t task) {
        for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) f(row);
    });
}
