// Root-mean-square norm (Zhang & Sennrich 2019), alone and behind a residual connection.
#include "norm.h"

namespace {

template <class T>
void norm(const NormArguments& a) {
    const int64_t n = a.n;
    const T* weight = static_cast<const T*>(a.weight);
    for_rows(a.rows, n, [=, &a](int64_t i) {
        const T* x = static_cast<const T*>(a.x) + i * n;
        float inverse;
        if (a.residual) {
            const T* residual = static_cast<const T*>(a.residual) + i * n;
            T* sum = static_cast<T*>(a.sum) + i * n;
            inverse = inverse_rms(n, a.eps, [=](int64_t k, auto lanes) {
                const f32v value = rounded<T>(lanes.load(x + k) + lanes.load(residual + k));
                lanes.store(sum + k, value);
                return value;
            });
            x = sum;
        } else {
            inverse = inverse_rms(n, a.eps, [=](int64_t k, auto lanes) { return lanes.load(x + k); });
        }
        T* to = static_cast<T*>(a.out) + i * n;
        for_lanes(n, [=](int64_t k, auto lanes) {
            lanes.store(to + k, normalised<T>(lanes.load(x + k), inverse, lanes.load(weight + k)));
        });
    });
}

}  // namespace

void nanovllm_norm(const NormArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { norm<decltype(number)>(*arguments); });
}
