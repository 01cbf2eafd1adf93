// The C interface of the library: what nanovllm/ops/cpu/library.py calls with ctypes.
//
// Tensors are described by addresses, and by strides in elements; one whose strides are not mentioned is contiguous.
// Nothing is kept between calls but workspaces and threads. There are no errors: the caller checks shapes and number
// formats. T tokens, H query heads, Hk KV heads, D head_dim, B requests.
//
// What a model does in a step is a list of *kernels*. Each takes one structure, whose first field is the number of rows
// (tokens), and whose others do not depend on it: so a list recorded once runs for any number of tokens (nanovllm_run).
#pragma once

#include <cstdint>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// What attention must know of a step's requests; the same for all layers.
struct Batch {
    const int32_t* query_start;  // [B + 1]: request i computes tokens query_start[i] .. query_start[i + 1]
    const int32_t* seq_lens;     // [B]: tokens in the cache, the new ones among them
    const int32_t* block_table;  // [B, table_stride]
    int64_t table_stride;
    int64_t requests;
};

struct AttentionArguments {
    int64_t rows;         // T
    const void* q;        // [T, H, D], tokens q_stride apart
    void* out;            // [T, H, D]
    const void* k_cache;  // [blocks, block_size, Hk, D], each of the first three with its stride,
    const void* v_cache;  // the same for K and V
    const Batch* batch;
    int64_t q_stride;
    int64_t block_stride, token_stride, head_stride;
    int32_t block_size, heads, kv_heads, head_dim;
    int32_t window;  // a token sees itself and window - 1 before it; 0: all
    float scale;
    int32_t dtype;  // of q, out and the caches
};

// The steps before attention as one. qkv [T, H + 2 Hk, D] (contiguous): each head of q and k is normalised (unless
// its weight is null) and rotated, x * cos + (x2 | x1) * sin; q goes to q_out [T, H, D]; k and v go to their slots of
// the caches, which are as in AttentionArguments.
struct QkvArguments {
    int64_t rows;
    const void* qkv;
    const void* q_weight;  // [D] or null
    const void* k_weight;
    const void* cosine;  // [T, D]
    const void* sine;
    const int64_t* slots;  // [T]
    void* q_out;
    void* k_cache;
    void* v_cache;
    int64_t block_size, block_stride, token_stride, head_stride;
    int32_t heads, kv_heads, head_dim;
    float eps;
    int32_t dtype;
};

// sum = x + residual; out = sum / rms(sum) * weight. All are [rows, n].
struct NormArguments {
    int64_t rows;
    const void* x;
    const void* residual;  // null: sum is x, and is not stored
    const void* weight;    // [n]
    void* out;
    void* sum;
    int64_t n;
    float eps;
    int32_t dtype;
};

// out [rows, n] = silu(gate) * up, where x [rows, 2n] = gate | up.
struct GateArguments {
    int64_t rows;
    const void* x;
    void* out;
    int64_t n;
    int32_t dtype;
};

// out [rows, outputs] = x [rows, inputs] W^T + bias, W packed by nanovllm_pack_linear.
struct LinearArguments {
    int64_t rows;
    const void* x;
    const void* packed;
    const void* bias;  // [outputs] or null
    void* out;
    int64_t inputs, outputs;
    int32_t dtype;  // float32 or bfloat16, the latter with an even number of inputs
};

// A weight quantised to 8 or 4 bits. ``inputs`` is a multiple of ``group``, and that of 16; 8 bits have one group.
struct QuantizedWeight {
    void* packed;  // nanovllm_quantized_bytes bytes
    void* scales;  // nanovllm_scale_count bfloat16
    int64_t outputs, inputs, group;
    int32_t bits;
};

// As LinearArguments, of a weight quantised by nanovllm_quantize.
struct QuantizedArguments {
    int64_t rows;
    const void* x;
    const void* bias;
    void* out;
    QuantizedWeight weight;
    int32_t digits;  // with 8-bit weights: 8-bit digits of a number of x, 1 or 2
    int32_t dtype;   // of x, bias and out
};

// out [rows, row_bytes] = the rows of ``from`` with these indices.
struct GatherArguments {
    int64_t rows;
    const int64_t* indices;
    const void* from;
    void* out;
    int64_t row_bytes;
};

// tokens [rows] = a column of every row of logits, chosen as nanovllm/runner/choice.py says. All arrays are [rows].
struct ChooseArguments {
    int64_t rows;
    const float* logits;       // [rows, columns]
    const float* temperature;  // 0: the first of the largest
    const int64_t* top_k;      // 0: off
    const float* top_p;        // 1: off
    const float* min_p;        // 0: off
    const uint64_t* seeds;     // a draw depends on seed and position alone
    const int64_t* positions;
    int64_t* tokens;
    int64_t columns;
};

// Penalties of nanovllm/runner/logit_rules.py, in place. Arrays are [rows], for the rows of logits that are concerned.
struct PenaltyArguments {
    int64_t rows;
    float* logits;               // [.., columns]
    const int32_t* tokens;       // the token table, its rows token_stride apart
    const int64_t* logit_rows;   // the row of logits
    const int64_t* table_rows;   // its row of the table:
    const int64_t* lengths;      // so many tokens,
    const int64_t* num_prompt;   // the first of which are the prompt's
    const float* repetition;     // 1: off
    const float* frequency;      // 0: off
    const float* presence;
    int64_t columns, token_stride;
};

#pragma GCC visibility push(default)
extern "C" {

// ---- kernels ----
void nanovllm_paged_attention(const AttentionArguments*);  // out = softmax(q K^T * scale) V, causal, over the cache
void nanovllm_norm_rotate_write(const QkvArguments*);
void nanovllm_norm(const NormArguments*);
void nanovllm_silu_and_mul(const GateArguments*);
void nanovllm_linear(const LinearArguments*);
void nanovllm_quantized_linear(const QuantizedArguments*);
// out [rows, inputs] = rows of W; their numbers are in x, int64 [rows].
void nanovllm_unpack_rows(const LinearArguments*);
void nanovllm_dequantize_rows(const QuantizedArguments*);
void nanovllm_gather_rows(const GatherArguments*);

// ---- behind the model ----
void nanovllm_choose(const ChooseArguments*);
void nanovllm_penalise(const PenaltyArguments*);

// ---- a list of kernels ----
struct Call {
    void (*kernel)(const void* arguments);
    void* arguments;  // of the kernel; the first field is rewritten
};
// Runs the calls in order, for ``rows`` tokens.
void nanovllm_run(const Call* calls, int64_t count, int64_t rows);

// ---- before the first step ----
// Has the system find every page of the memory, until ``wanted`` is zero; what the memory holds stays as it is.
void nanovllm_touch(void* memory, int64_t bytes, int64_t page, const volatile int32_t* wanted);

// How many threads may work at once, the calling one included; 1 at first.
void nanovllm_set_threads(int32_t threads);

// ``packed`` has nanovllm_packed_bytes bytes. It may be the weight itself, if that is contiguous and has as many.
int64_t nanovllm_packed_bytes(int64_t outputs, int64_t inputs, int32_t dtype);
void nanovllm_pack_linear(const void* weight, int64_t outputs, int64_t inputs, int64_t stride, void* packed,
                          int32_t dtype);
int64_t nanovllm_quantized_bytes(int64_t outputs, int64_t inputs, int32_t bits);
int64_t nanovllm_scale_count(int64_t outputs, int64_t inputs, int64_t group);
void nanovllm_quantize(const QuantizedWeight* to, const void* weight, int64_t stride, int32_t dtype);
}
#pragma GCC visibility pop
