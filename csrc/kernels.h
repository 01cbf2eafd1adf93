// The C interface of the library: what nanovllm/ops/cpu/library.py calls with ctypes.
//
// Tensors are described by addresses, and by strides in elements; one whose strides are not mentioned is contiguous.
// Nothing is kept between calls but workspaces and threads. There are no errors: the caller checks shapes and number formats.
// T tokens, H query heads, Hk KV heads, D head_dim, B rows (requests).
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct AttentionArguments {
    const void* q;               // [T, H, D], tokens q_stride apart
    void* out;                   // [T, H, D]
    const void* k_cache;         // [blocks, block_size, Hk, D], each of the first three with its stride,
    const void* v_cache;         // the same for K and V
    const int32_t* query_start;  // [B + 1]: row i computes tokens query_start[i] .. query_start[i + 1]
    const int32_t* seq_lens;     // [B]: tokens in the cache, the new ones among them
    const int32_t* block_table;  // [B, table_stride]
    int64_t q_stride;
    int64_t block_stride, token_stride, head_stride;
    int64_t table_stride;
    int32_t rows, block_size, heads, kv_heads, head_dim;
    int32_t window;  // a token sees itself and window - 1 before it; 0: all
    float scale;
    int32_t dtype;  // of q, out and the caches
};

#pragma GCC visibility push(default)
extern "C" {

// How many threads may work at once, the calling one included; 1 at first.
void nanovllm_set_threads(int32_t threads);

// out [T, H, D] = softmax(q K^T * scale) V, causal, over the cache.
void nanovllm_paged_attention(const AttentionArguments* arguments);

// out [outer, inner, n] = x / rms(x) * weight; x [outer, inner, n] has strides for outer and inner.
void nanovllm_rms_norm(const void* x, const void* weight, void* out, int64_t outer, int64_t inner, int64_t n,
                       int64_t outer_stride, int64_t inner_stride, float eps, int32_t dtype);

// sum [rows, n] = x + residual; out [rows, n] = rms_norm(sum).
void nanovllm_add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* sum, int64_t rows,
                           int64_t n, float eps, int32_t dtype);

// out [tokens, heads, D] = x * cos + (x2 | x1) * sin; x has a stride between tokens; cos, sin [tokens, D].
void nanovllm_rotary(const void* x, const void* cosine, const void* sine, void* out, int64_t tokens, int64_t heads,
                     int64_t head_dim, int64_t token_stride, int32_t dtype);

// The two steps before attention as one. qkv [T, H + 2 Hk, D] (contiguous): each head of q and k is normalised (unless
// its weight is null) and rotated; q goes to q_out [T, H, D]; k and v go to their slots of the caches.
struct QkvArguments {
    const void* qkv;
    const void* q_weight;  // [D] or null
    const void* k_weight;
    const void* cosine;  // [T, D]
    const void* sine;
    const int64_t* slots;  // [T]
    void* q_out;
    void* k_cache;
    void* v_cache;
    int64_t tokens, block_size, block_stride, token_stride, head_stride;
    int32_t heads, kv_heads, head_dim;
    float eps;
    int32_t dtype;
};
void nanovllm_norm_rotate_write(const QkvArguments* arguments);

// k_cache[slot], v_cache[slot] = k, v [T, Hk, D], whose tokens have strides; the caches as in AttentionArguments.
void nanovllm_write_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens,
                       int64_t kv_heads, int64_t head_bytes, int64_t k_stride, int64_t v_stride, int64_t block_size,
                       int64_t block_stride, int64_t token_stride, int64_t head_stride, int64_t element_bytes);

// out [rows, n] = silu(gate) * up, where x [rows, 2n] = gate | up.
void nanovllm_silu_and_mul(const void* x, void* out, int64_t rows, int64_t n, int32_t dtype);

// Linear layers, float32 or bfloat16 (with an even number of inputs). A weight [outputs, inputs] is packed once.
int64_t nanovllm_packed_bytes(int64_t outputs, int64_t inputs, int32_t dtype);
void nanovllm_pack_linear(const void* weight, int64_t outputs, int64_t inputs, int64_t stride, void* packed,
                          int32_t dtype);

// out [rows, outputs] = x [rows, inputs] W^T + bias
struct LinearArguments {
    const void* x;
    const void* packed;
    const void* bias;  // [outputs] or null
    void* out;
    int64_t rows, inputs, outputs;
    int64_t x_stride;  // even for bfloat16
    int32_t dtype;
};
void nanovllm_linear(const LinearArguments* arguments);

// out [count, inputs] = rows of W, from what is said of the packed weight in ``arguments``.
void nanovllm_unpack_rows(const LinearArguments* arguments, const int64_t* rows, int64_t count, void* out);

// Linear layers with weights quantised to 8 or 4 bits. ``inputs`` is a multiple of ``group``, and that of 16.
struct QuantizedWeight {
    void* packed;  // nanovllm_quantized_bytes bytes
    void* scales;  // nanovllm_scale_count bfloat16
    int64_t outputs, inputs, group;
    int32_t bits;
};
int64_t nanovllm_quantized_bytes(int64_t outputs, int64_t inputs, int32_t bits);
int64_t nanovllm_scale_count(int64_t outputs, int64_t inputs, int64_t group);
void nanovllm_quantize(const QuantizedWeight* to, const void* weight, int64_t stride, int32_t dtype);

struct QuantizedArguments {
    QuantizedWeight weight;
    const void* x;     // [rows, inputs]
    const void* bias;  // [outputs] or null
    void* out;         // [rows, outputs]
    int64_t rows;
    int32_t digits;  // 8-bit digits of a number of x: 1 or 2; 4-bit weights take 2
    int32_t dtype;   // of x, bias and out
};
void nanovllm_quantized_linear(const QuantizedArguments* arguments);
void nanovllm_dequantize_rows(const QuantizedArguments* arguments, const int64_t* rows, int64_t count, void* out);
}
#pragma GCC visibility pop
