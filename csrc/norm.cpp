// Root-mean-square norm (Zhang & Sennrich 2019), alone and behind a residual connection.
#include "norm.h"

namespace {

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t outer, int64_t inner, int64_t n, int64_t outer_stride,
              int64_t inner_stride, float eps) {
    for_rows(outer, inner * n, [=](int64_t i) {
        for (int64_t j = 0; j < inner; ++j) {
            const T* row = x + i * outer_stride + j * inner_stride;
            T* to = out + (i * inner + j) * n;
            const float inverse = inverse_rms(n, eps, [=](int64_t k, auto lanes) { return lanes.load(row + k); });
            for_lanes(n, [=](int64_t k, auto lanes) {
                lanes.store(to + k, normalised<T>(lanes.load(row + k), inverse, lanes.load(weight + k)));
            });
        }
    });
}

template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t rows, int64_t n, float eps) {
    for_rows(rows, n, [=](int64_t i) {
        const T *a = x + i * n, *b = residual + i * n;
        T *total = sum + i * n, *to = out + i * n;
        const float inverse = inverse_rms(n, eps, [=](int64_t k, auto lanes) {
            const f32v value = rounded<T>(lanes.load(a + k) + lanes.load(b + k));
            lanes.store(total + k, value);
            return value;
        });
        for_lanes(n, [=](int64_t k, auto lanes) {
            lanes.store(to + k, normalised<T>(lanes.load(total + k), inverse, lanes.load(weight + k)));
        });
    });
}

}  // namespace

void nanovllm_rms_norm(const void* x, const void* weight, void* out, int64_t outer, int64_t inner, int64_t n,
                       int64_t outer_stride, int64_t inner_stride, float eps, int32_t dtype) {
    with_type(dtype, [=](auto number) {
        using T = decltype(number);
        rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), outer, inner, n,
                 outer_stride, inner_stride, eps);
    });
}

void nanovllm_add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* sum, int64_t rows,
                           int64_t n, float eps, int32_t dtype) {
    with_type(dtype, [=](auto number) {
        using T = decltype(number);
        add_rms_norm(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
                     static_cast<T*>(out), static_cast<T*>(sum), rows, n, eps);
    });
}
