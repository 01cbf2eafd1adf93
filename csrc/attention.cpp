// Paged attention: the new tokens of a batch over their rows' cached keys and values.
//
// The batch is cut into *units*: a few tokens of one row, with the query heads that read one KV head, so keys and values
// are read once for the whole group. A unit walks over its context in *tiles* of 64 keys with an online softmax (Milakov
// & Gimelshein 2018; FlashAttention, Dao et al. 2022). Both products run on the inner loop of product.h: scores = Q K^T
// with K transposed into panels, output += P V with V copied into panels. bfloat16 is multiplied as bfloat16, everything
// else as float32; sums and the softmax are float32.
//
// Every 512 keys, counted from the row's first token, the softmax starts afresh, and the *partitions'* results are merged
// in order. So partitions can be computed anywhere: units with much context are cut into *pieces* of some partitions, and
// one long request uses every core.
//
// Invariant: a token's output depends on its own query, position and context alone, bit by bit - not on the other rows,
// the tokens beside it in the unit, or the number of threads. Tiles and partitions begin at fixed positions; keys a token
// does not see have probability 0, and adding 0 changes no sum; a tile it sees nothing of multiplies by exp(0) = 1.
#include <omp.h>

#include <atomic>
#include <memory>

#include "attention_plan.h"
#include "buffer.h"
#include "dtype.h"
#include "product.h"

namespace {

constexpr float LOWEST = -1e30f;  // below any score; unlike -infinity it may be subtracted from itself

static_assert(TILE % PANEL == 0 && PARTITION % TILE == 0, "tiles fill panels, partitions are whole tiles");

// How a number format enters the products.
template <class T>
struct Format {
    using Cells = Floats;
    using Probability = float;
    static constexpr int per_cell = 1;
};
template <>
struct Format<bf16> {
    using Cells = Pairs;
    using Probability = bf16;
    static constexpr int per_cell = 2;
};

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The softmax of some queries over some keys; outputs are not yet divided by the sum.
struct Softmax {
    float* output;   // [queries, width], width = head_dim padded to whole panels
    float* maximum;  // [queries], of the scores in units of log2(e)
    float* sum;      // [queries]

    // Lays the three out in memory for queries * (width + 2) numbers.
    Softmax(float* memory, int queries, int width)
        : output(memory), maximum(memory + size_t(queries) * width), sum(maximum + queries) {}
    Softmax() = default;

    void clear(int queries, int width) const {
        std::memset(output, 0, sizeof(float) * queries * width);
        std::memset(sum, 0, sizeof(float) * queries);
        std::fill_n(maximum, queries, LOWEST);
    }

    // Adds what is known of other keys. The order of merging is part of the result.
    void merge(const Softmax& other, int queries, int width) const {
        for (int i = 0; i < queries; ++i) {
            const float most = std::max(maximum[i], other.maximum[i]);
            const float mine = exp2_of_negative(splat(maximum[i] - most))[0];
            const float its = exp2_of_negative(splat(other.maximum[i] - most))[0];
            maximum[i] = most;
            sum[i] = sum[i] * mine + other.sum[i] * its;
            float *to = output + i * width, *from = other.output + i * width;
            for (int d = 0; d < width; d += LANES)
                store(to + d, fma(load(from + d), splat(its), load(to + d) * splat(mine)));
        }
    }
};

// What a thread works with; its memory lives as long as the thread.
struct Workspace {
    Buffer<cell> q;              // [queries, depth]
    Buffer<cell> keys;           // [TILE, depth]
    Buffer<cell> k;              // TILE / PANEL panels of [depth, PANEL]
    Buffer<cell> v;              // width / PANEL panels of [TILE / per_cell, PANEL]
    Buffer<float> scores;        // [queries, TILE]
    Buffer<cell> probabilities;  // [queries, TILE / per_cell]
    Buffer<float> corrections;   // [queries]: what a new maximum multiplies older results by
    Buffer<float> lane_sums;     // [queries, LANES]
    Buffer<float> softmaxes;     // two, of the partition and of the unit
};

template <class T>
class Attention {
    using Cells = typename Format<T>::Cells;
    using Probability = typename Format<T>::Probability;
    static constexpr int PER_CELL = Format<T>::per_cell;
    static constexpr int TILE_DEPTH = TILE / PER_CELL;

   public:
    Attention(const AttentionArguments& arguments, int threads)
        : a(arguments),
          group(a.heads / a.kv_heads),
          depth(a.head_dim / PER_CELL),
          width(round_up(a.head_dim, PANEL)),
          scale(a.scale * 1.44269504f) {
        static thread_local Plan kept_plan;
        static thread_local Buffer<float> kept_partials;
        plan = &kept_plan;
        plan->make(a, threads);
        partials = kept_partials.at_least(plan->partials * (width + 2));
        pieces_left.reset(new std::atomic<int>[plan->units.size()]);
        for (size_t i = 0; i < plan->units.size(); ++i) pieces_left[i] = plan->units[i].pieces;
    }

    int num_pieces() const { return int(plan->pieces.size()); }

    void run(int piece_number) {
        const Piece& piece = plan->pieces[piece_number];
        const Unit& unit = plan->units[piece.unit];
        static thread_local Workspace workspace;
        Task task(*this, unit, workspace);
        task.load_queries();
        if (unit.pieces == 1) {
            task.total.clear(task.queries, width);
            for (int partition = piece.first_partition; partition < piece.end_partition; ++partition) {
                task.attend(partition, task.partition);
                task.total.merge(task.partition, task.queries, width);
            }
        } else {
            for (int partition = piece.first_partition; partition < piece.end_partition; ++partition)
                task.attend(partition, partial(unit, partition, task.queries));
            if (pieces_left[piece.unit].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
            task.total.clear(task.queries, width);
            for (int partition = unit.first_partition; partition < unit.end_partition; ++partition)
                task.total.merge(partial(unit, partition, task.queries), task.queries, width);
        }
        task.store_outputs();
    }

   private:
    struct Task;

    // Where a divided unit keeps the result of a partition.
    Softmax partial(const Unit& unit, int partition, int queries) const {
        const size_t first = unit.partials + size_t(partition - unit.first_partition) * queries;
        return Softmax(partials + first * (width + 2), queries, width);
    }

    const AttentionArguments& a;
    const int group, depth, width;  // depth: cells of a head
    const float scale;              // to scores in units of log2(e)
    Plan* plan;
    float* partials;
    std::unique_ptr<std::atomic<int>[]> pieces_left;
};

// One thread's work on one unit. Its queries are ordered by KV head, token, query head.
template <class T>
struct Attention<T>::Task {
    const Attention& call;
    const AttentionArguments& a;
    const Unit& unit;
    const int head_queries, queries, depth, width;
    cell *q, *keys, *k, *v, *probabilities;
    float *scores, *corrections, *lane_sums;
    Softmax partition, total;

    Task(const Attention& attention, const Unit& its_unit, Workspace& workspace)
        : call(attention),
          a(attention.a),
          unit(its_unit),
          head_queries(unit.tokens * attention.group),
          queries(unit.heads * head_queries),
          depth(attention.depth),
          width(attention.width) {
        q = workspace.q.at_least(queries * depth);
        k = workspace.k.at_least(TILE * depth);
        v = workspace.v.at_least(width * TILE_DEPTH);
        probabilities = workspace.probabilities.at_least(head_queries * TILE_DEPTH);
        scores = workspace.scores.at_least(head_queries * TILE);
        corrections = workspace.corrections.at_least(head_queries);
        lane_sums = workspace.lane_sums.at_least(queries * LANES);
        keys = workspace.keys.at_least(TILE * depth + LANES);
        float* base = workspace.softmaxes.at_least(2 * queries * (width + 2));
        partition = Softmax(base, queries, width);
        total = Softmax(base + queries * (width + 2), queries, width);
    }

    void load_queries() {
        const int size = call.group * a.head_dim;
        cell* to = q;
        for (int head = 0; head < unit.heads; ++head)
            for (int token = 0; token < unit.tokens; ++token, to += call.group * depth)
                copy_cells(static_cast<const T*>(a.q) + (unit.first_token + token) * a.q_stride +
                               (unit.first_head + head) * size,
                           size, to);
    }

    void attend(int number, const Softmax& state) {
        state.clear(queries, width);
        std::memset(lane_sums, 0, sizeof(float) * queries * LANES);
        const int last = unit.position + unit.tokens - 1;
        const int first = a.window ? std::max(0, unit.position - a.window + 1) : 0;
        const int end = std::min((number + 1) * PARTITION, last + 1);
        int64_t places[TILE], next_places[TILE];
        for (int key = std::max(number * PARTITION, first / TILE * TILE); key < end; key += TILE) {
            const int count = std::min(TILE, end - key), next_count = std::min(TILE, end - key - TILE);
            find_keys(key, count, places);
            find_keys(key + TILE, next_count, next_places);
            for (int head = 0; head < unit.heads; ++head) {
                prefetch(next_places, next_count * head / unit.heads, next_count * (head + 1) / unit.heads);
                const int64_t offset = (unit.first_head + head) * a.head_stride;
                pack_keys(static_cast<const T*>(a.k_cache) + offset, places, count);
                pack_values(static_cast<const T*>(a.v_cache) + offset, places, count);
                multiply_tile(state, head * head_queries, key);
            }
        }
        for (int i = 0; i < queries; ++i) state.sum[i] = sum_of(load(lane_sums + i * LANES));
    }

    // Where in the cache the keys ``first`` .. ``first + count`` begin.
    void find_keys(int first, int count, int64_t* places) const {
        const int32_t* block = a.block_table + unit.row * a.table_stride + first / a.block_size;
        int in_block = first % a.block_size;
        for (int i = 0; i < count; ++block, in_block = 0) {
            int64_t place = *block * a.block_stride + in_block * a.token_stride;
            for (; i < count && in_block < a.block_size; ++i, ++in_block, place += a.token_stride) places[i] = place;
        }
    }

    // Ask for keys and values of the next tile; the unit's heads are neighbours in memory.
    void prefetch(const int64_t* places, int begin, int end) const {
        const T* k_head = static_cast<const T*>(a.k_cache) + unit.first_head * a.head_stride;
        const T* v_head = static_cast<const T*>(a.v_cache) + unit.first_head * a.head_stride;
        for (int i = begin; i < end; ++i)
            for (int d = 0; d < unit.heads * a.head_stride; d += 64 / sizeof(T)) {
                __builtin_prefetch(k_head + places[i] + d, 0, 2);
                __builtin_prefetch(v_head + places[i] + d, 0, 2);
            }
    }

    // K becomes panels whose columns are keys; columns beyond ``count`` are zero. The keys are first brought together:
    // memory likes its lines read whole.
    void pack_keys(const T* head, const int64_t* places, int count) {
        for (int i = 0; i < count; ++i) copy_cells(head + places[i], a.head_dim, keys + i * depth);
        std::memset(keys + count * depth, 0, sizeof(cell) * (TILE - count) * depth);
        for (int i = 0; i < TILE; i += LANES)
            transpose_into_panel(keys + i * depth, depth, depth, k + i / PANEL * PANEL * depth + i % PANEL);
    }

    // V becomes panels whose columns are dimensions; rows beyond ``count`` are zero.
    void pack_values(const T* head, const int64_t* places, int count) {
        for (int i = 0; i < count; ++i) copy_cells(head + places[i], a.head_dim, keys + i * depth);
        std::memset(keys + count * depth, 0, sizeof(cell) * (TILE - count) * depth);
        for (int i = 0; i < TILE_DEPTH; ++i) {
            const cell* rows = keys + i * PER_CELL * depth;
            cell* to = v + i * PANEL;
            for (int d = 0; d < a.head_dim; d += LANES)
                store(to + d / PANEL * PANEL * TILE_DEPTH + d % PANEL, value_cells(rows, d));
        }
    }

    // Columns d .. d + LANES of a row of V's cells, which takes PER_CELL tokens.
    u32v value_cells(const cell* rows, int d) const {
        if (PER_CELL == 1) return load(rows + d);
        const bf16 *even = reinterpret_cast<const bf16*>(rows), *odd = reinterpret_cast<const bf16*>(rows + depth);
        return bit_cast<u32v>(load(even + d)) >> 16 | bit_cast<u32v>(load(odd + d));
    }

    // The tile's keys, which begin at position ``key``, and one head's queries, the first being ``first``.
    void multiply_tile(const Softmax& state, int first, int key) {
        for_row_blocks(head_queries, [&](auto rows, int query) {
            multiply_keys<rows.value>(q + (first + query) * depth, query);
            for (int i = query; i < query + rows.value; ++i) update(state, first + i, i, key);
            multiply_values<rows.value>(state.output + (first + query) * width, query);
        });
    }

    // scores = Q K^T
    template <int ROWS>
    void multiply_keys(const cell* q_rows, int query) {
        for (int column = 0; column < TILE; column += PANEL) {
            Sums<ROWS> sums = {};
            add_products<Cells, ROWS>(sums, q_rows, depth, k + column * depth, depth);
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < NV; ++i)
                    store(scores + (query + row) * TILE + column + i * LANES, sums[row][i]);
        }
    }

    // Scores -> probabilities, sum, maximum, correction. ``query`` counts within the unit, ``i`` within the head.
    void update(const Softmax& state, int query, int i, int key) {
        const int position = unit.position + i / call.group;
        const int first = a.window ? position - a.window + 1 - key : 0, end = position + 1 - key;  // visible
        const float* row = scores + i * TILE;
        f32v x[TILE / LANES], most = splat(LOWEST);
        for (int n = 0; n < TILE / LANES; ++n) {
            x[n] = load(row + n * LANES) * splat(call.scale);
            if (first > 0 || end < TILE) {
                const i32v column = lane_numbers() + n * LANES;
                x[n] = (column >= first) & (column < end) ? x[n] : splat(-INFINITY);
            }
            most = max(most, x[n]);
        }
        const float maximum = std::max(state.maximum[query], max_of(most));
        const f32v correction = exp2_of_negative(splat(state.maximum[query] - maximum));
        state.maximum[query] = maximum;
        corrections[i] = correction[0];
        f32v sum = load(lane_sums + query * LANES) * correction;
        for (int n = 0; n < TILE / LANES; ++n) {
            const f32v p = exp2_of_negative(x[n] - splat(maximum));
            sum = sum + p;
            store(reinterpret_cast<Probability*>(probabilities) + i * TILE + n * LANES, p);
        }
        store(lane_sums + query * LANES, sum);
    }

    // output = output * correction + P V
    template <int ROWS>
    void multiply_values(float* output, int query) {
        for (int column = 0; column < width; column += PANEL, output += PANEL) {
            Sums<ROWS> sums;
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < NV; ++i)
                    sums[row][i] = load(output + row * width + i * LANES) * splat(corrections[query + row]);
            add_products<Cells, ROWS>(sums, probabilities + query * TILE_DEPTH, TILE_DEPTH, v + column * TILE_DEPTH,
                                      TILE_DEPTH);
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < NV; ++i) store(output + row * width + i * LANES, sums[row][i]);
        }
    }

    void store_outputs() {
        for (int query = 0; query < queries; ++query) {
            const int kv_head = unit.first_head + query / head_queries, i = query % head_queries;
            const int token = unit.first_token + i / call.group, head = kv_head * call.group + i % call.group;
            T* to = static_cast<T*>(a.out) + (int64_t(token) * a.heads + head) * a.head_dim;
            const f32v inverse = splat(1.0f / total.sum[query]);
            for (int d = 0; d < a.head_dim; d += LANES) {
                const f32v value = load(total.output + query * width + d) * inverse;
                if (d + LANES <= a.head_dim)
                    store(to + d, value);
                else
                    store_some(to + d, value, a.head_dim - d);
            }
        }
    }

    // ``count`` consecutive numbers as cells.
    static void copy_cells(const T* from, int count, cell* to) {
        if (PER_CELL == 2) {
            std::memcpy(to, from, count * sizeof(T));
            return;
        }
        float* floats = reinterpret_cast<float*>(to);
        int i = 0;
        for (; i + LANES <= count; i += LANES) store(floats + i, load(from + i));
        if (i < count) store_some(floats + i, load_some(from + i, count - i), count - i);
    }
};

template <class T>
void paged_attention(const AttentionArguments& arguments) {
    const int threads = omp_get_max_threads();
    Attention<T> attention(arguments, threads);
    const int pieces = attention.num_pieces();
#pragma omp parallel for schedule(dynamic, 1) if (threads > 1 && pieces > 1)
    for (int i = 0; i < pieces; ++i) attention.run(i);
}

}  // namespace

void nanovllm_paged_attention(const AttentionArguments* arguments) {
    with_type(arguments->dtype, [&](auto number) { paged_attention<decltype(number)>(*arguments); });
}
