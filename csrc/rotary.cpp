// What happens to q, k and v between their product and attention: norm of each head, rotary embedding, KV write.
#include "norm.h"

namespace {

// One half of a head's rotation, rounded to T where ops/reference.py rounds.
template <class T>
f32v rotated(f32v x, f32v other, f32v cosine, f32v sine) {
    return rounded<T>(x * cosine) + rounded<T>(other * sine);
}

// ``head`` gives the vector at an offset of the head.
template <class T, class F>
inline __attribute__((always_inline)) void rotate(int64_t head_dim, const T* cosine, const T* sine, T* to, F&& head) {
    const int64_t half = head_dim / 2;
    for_lanes(half, [&](int64_t i, auto lanes) {
        const f32v first = head(i, lanes), second = head(half + i, lanes);
        lanes.store(to + i, rotated<T>(first, second, lanes.load(cosine + i), lanes.load(sine + i)));
        lanes.store(to + half + i,
                    rotated<T>(second, first, lanes.load(cosine + half + i), lanes.load(sine + half + i)));
    });
}

template <class T>
void norm_rotate(const T* from, const T* weight, const T* cosine, const T* sine, T* to, int64_t head_dim, float eps) {
    if (!weight) {
        rotate(head_dim, cosine, sine, to, [=](int64_t i, auto lanes) { return lanes.load(from + i); });
        return;
    }
    const float inverse = inverse_rms(head_dim, eps, [=](int64_t i, auto lanes) { return lanes.load(from + i); });
    rotate(head_dim, cosine, sine, to, [=](int64_t i, auto lanes) {
        return rounded<T>(normalised<T>(lanes.load(from + i), inverse, lanes.load(weight + i)));
    });
}

template <class T>
void norm_rotate_write(const QkvArguments& a) {
    const T* qkv = static_cast<const T*>(a.qkv);
    const int64_t heads = a.heads, kv_heads = a.kv_heads, dim = a.head_dim;
    for_rows(a.rows, (heads + 2 * kv_heads) * dim, [=, &a](int64_t token) {
        const T* cosine = static_cast<const T*>(a.cosine) + token * dim;
        const T* sine = static_cast<const T*>(a.sine) + token * dim;
        const T* from = qkv + token * (heads + 2 * kv_heads) * dim;
        T* q = static_cast<T*>(a.q_out) + token * heads * dim;
        for (int64_t head = 0; head < heads; ++head, from += dim)
            norm_rotate(from, static_cast<const T*>(a.q_weight), cosine, sine, q + head * dim, dim, a.eps);
        const int64_t slot = a.slots[token];
        const int64_t place = slot / a.block_size * a.block_stride + slot % a.block_size * a.token_stride;
        T *k = static_cast<T*>(a.k_cache) + place, *v = static_cast<T*>(a.v_cache) + place;
        for (int64_t head = 0; head < kv_heads; ++head, from += dim)
            norm_rotate(from, static_cast<const T*>(a.k_weight), cosine, sine, k + head * a.head_stride, dim, a.eps);
        for (int64_t head = 0; head < kv_heads; ++head, from += dim)
            std::memcpy(v + head * a.head_stride, from, dim * sizeof(T));
    });
}

}  // namespace

void nanovllm_norm_rotate_write(const QkvArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { norm_rotate_write<decltype(number)>(*arguments); });
}
