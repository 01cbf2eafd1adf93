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
void rotary(const T* x, const T* cosine, const T* sine, T* out, int64_t tokens, int64_t heads, int64_t head_dim,
            int64_t token_stride) {
    for_rows(tokens, heads * head_dim, [=](int64_t token) {
        for (int64_t head = 0; head < heads; ++head) {
            const T* from = x + token * token_stride + head * head_dim;
            rotate(head_dim, cosine + token * head_dim, sine + token * head_dim,
                   out + (token * heads + head) * head_dim,
                   [=](int64_t i, auto lanes) { return lanes.load(from + i); });
        }
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
    for_rows(a.tokens, (heads + 2 * kv_heads) * dim, [=, &a](int64_t token) {
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

void nanovllm_rotary(const void* x, const void* cosine, const void* sine, void* out, int64_t tokens, int64_t heads,
                     int64_t head_dim, int64_t token_stride, int32_t dtype) {
    with_type(dtype, [=](auto number) {
        using T = decltype(number);
        rotary(static_cast<const T*>(x), static_cast<const T*>(cosine), static_cast<const T*>(sine),
               static_cast<T*>(out), tokens, heads, head_dim, token_stride);
    });
}

void nanovllm_norm_rotate_write(const QkvArguments* arguments) {
    with_type(arguments->dtype, [=](auto number) { norm_rotate_write<decltype(number)>(*arguments); });
}

void nanovllm_write_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens,
                       int64_t kv_heads, int64_t head_bytes, int64_t k_stride, int64_t v_stride, int64_t block_size,
                       int64_t block_stride, int64_t token_stride, int64_t head_stride, int64_t element_bytes) {
    for_rows(tokens, kv_heads * head_bytes / element_bytes, [=](int64_t token) {
        const int64_t slot = slots[token];
        const int64_t place = slot / block_size * block_stride + slot % block_size * token_stride;
        for (int64_t head = 0; head < kv_heads; ++head) {
            const int64_t to = (place + head * head_stride) * element_bytes, from = head * head_bytes;
            std::memcpy(static_cast<char*>(k_cache) + to,
                        static_cast<const char*>(k) + token * k_stride * element_bytes + from, head_bytes);
            std::memcpy(static_cast<char*>(v_cache) + to,
                        static_cast<const char*>(v) + token * v_stride * element_bytes + from, head_bytes);
        }
    });
}
