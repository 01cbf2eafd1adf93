// Gated activation.
#include "rows.h"

namespace {

template <class T>
void silu_and_mul(const T* x, T* out, int64_t rows, int64_t n) {
    for_rows(rows, 2 * n, [=](int64_t row) {
        const T *gate = x + row * 2 * n, *up = gate + n;
        T* to = out + row * n;
        for_lanes(n, [=](int64_t i, auto lanes) {
            const f32v g = lanes.load(gate + i);
            const f32v silu = rounded<T>(g / (exp(-g) + 1.0f));
            lanes.store(to + i, silu * lanes.load(up + i));
        });
    });
}

}  // namespace

void nanovllm_silu_and_mul(const void* x, void* out, int64_t rows, int64_t n, int32_t dtype) {
    with_type(dtype, [=](auto number) {
        using T = decltype(number);
        silu_and_mul(static_cast<const T*>(x), static_cast<T*>(out), rows, n);
    });
}
