// Root-mean-square norm of one row.
#pragma once

#include "rows.h"

// 1 / rms(x); ``x`` gives the vector at an offset. Squares are summed by lane, then across lanes.
template <class F>
inline float inverse_rms(int64_t n, float eps, F&& x) {
    f32v squares = {};
    for_lanes(n, [&](int64_t i, auto lanes) {
        const f32v value = x(i, lanes);
        squares = fma(value, value, squares);
    });
    return 1.0f / std::sqrt(sum_of(squares) / float(n) + eps);
}

// Rounded to T after the division and after the product with the weight, as in ops/reference.py.
template <class T>
inline f32v normalised(f32v x, float inverse, f32v weight) {
    return rounded<T>(x * splat(inverse)) * weight;
}
