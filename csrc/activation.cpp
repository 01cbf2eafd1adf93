// Gated activation.
#include "rows.h"

namespace {

template <class T>
void silu_and_mul(const GateArguments& a) {
    const int64_t n = a.n;
    for_rows(a.rows, 2 * n, [=, &a](int64_t row) {
        const T *gate = static_cast<const T*>(a.x) + row * 2 * n, *up = gate + n;
        T* to = static_cast<T*>(a.out) + row * n;
        for_lanes(n, [=](int64_t i, auto lanes) {
            const f32v g = lanes.load(gate + i);
            const f32v silu = rounded<T>(g / (exp(-g) + 1.0f));
            lanes.store(to + i, silu * lanes.load(up + i));
        });
    });
}

}  // namespace

void nanovllm_silu_and_mul(const GateArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { silu_and_mul<decltype(number)>(*arguments); });
}
