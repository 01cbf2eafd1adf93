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
#include <atomic>
#include <memory>

#include "attention_plan.h"
#include "buffer.h"
#include "cache_prefetch.h"
#include "dtype.h"
#include "parallel.h"
#include "product.h"
#include "softmax.h"
#include "transpose.h"

namespace {

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
    Attention(const AttentionArguments& arguments, int number_of_threads)
        : a(arguments),
          threads(number_of_threads),
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
        Task task(*this, unit, workspace, piece.end_partition, piece_behind(piece_number));
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

    // The piece this thread will probably take next, for others take as many; null behind the last.
    const Piece* piece_behind(int number) const {
        return number + threads < num_pieces() ? &plan->pieces[number + threads] : nullptr;
    }

    // Where a divided unit keeps the result of a partition.
    Softmax partial(const Unit& unit, int partition, int queries) const {
        const size_t first = unit.partials + size_t(partition - unit.first_partition) * queries;
        return Softmax(partials + first * (width + 2), queries, width);
    }

    const AttentionArguments& a;
    const int threads, group, depth, width;  // depth: cells of a head
    const float scale;                       // to scores in units of log2(e)
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
    const ptrdiff_t v_offset;  // from a key to its value, in bytes
    const int end_partition;   // of the piece
    const Piece* const next_piece;
    CachePrefetch prefetch;
    const char* next_places[TILE];

    Task(const Attention& attention, const Unit& its_unit, Workspace& workspace, int end, const Piece* next)
        : call(attention),
          a(attention.a),
          unit(its_unit),
          head_queries(unit.tokens * attention.group),
          queries(unit.heads * head_queries),
          depth(attention.depth),
          width(attention.width),
          v_offset(static_cast<const char*>(a.v_cache) - static_cast<const char*>(a.k_cache)),
          end_partition(end),
          next_piece(next) {
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

    // How often attend_few lets the prefetch step in one tile.
    int prefetch_steps() const {
        return unit.heads * (TILE / LANES * ((depth + 15) / 16) + width / PANEL * ((TILE_DEPTH + 3) / 4));
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
        const char* places[TILE];
        const int end = unit.end_key(number);
        for (int key = unit.first_key(number, a.window); key < end; key += TILE) {
            const int count = std::min(TILE, end - key);
            find_keys(unit, key, count, places);
            if (head_queries <= MAX_ROWS) prefetch_behind(number, key);
            for (int head = 0; head < unit.heads; ++head) {
                if (head_queries <= MAX_ROWS)
                    with_row_count(head_queries,
                                   [&](auto rows) { attend_few<rows.value>(state, head, places, key, count); });
                else
                    attend_many(state, head, places, key);
            }
        }
        for (int i = 0; i < queries; ++i) state.sum[i] = sum_of(load(lane_sums + i * LANES));
    }

    // Has the tile behind this one brought near meanwhile: of the partition, of the next, or of the next piece.
    void prefetch_behind(int number, int key) {
        const Unit* of = &unit;
        key += TILE;
        if (key >= unit.end_key(number)) {
            ++number;
            if (number == end_partition) {
                if (!next_piece) return prefetch.stop();
                of = &call.plan->units[next_piece->unit];
                number = next_piece->first_partition;
            }
            key = of->first_key(number, a.window);
        }
        const int count = std::min(TILE, of->end_key(number) - key);
        find_keys(*of, key, count, next_places);
        prefetch.start(next_places, count, v_offset, of->heads * a.head_stride * sizeof(T), prefetch_steps());
    }

    // Where in the cache a tile's keys are, for the unit's first head. Their values are ``v_offset`` bytes behind.
    // The last of them stands in for those beyond ``count``, which nobody sees.
    void find_keys(const Unit& of, int first, int count, const char** places) const {
        const char* base = static_cast<const char*>(a.k_cache) + of.first_head * a.head_stride * sizeof(T);
        const int32_t* block = a.batch->block_table + of.row * a.batch->table_stride + first / a.block_size;
        int in_block = first % a.block_size;
        for (int i = 0; i < count; ++block, in_block = 0) {
            const char* place = base + (*block * a.block_stride + in_block * a.token_stride) * sizeof(T);
            for (; i < count && in_block < a.block_size; ++i, ++in_block, place += a.token_stride * sizeof(T))
                places[i] = place;
        }
        std::fill(places + count, places + TILE, places[count - 1]);
    }

    // ---- few queries: keys and values go from the cache through registers into the products --------------------------

    template <int ROWS>
    void attend_few(const Softmax& state, int head, const char* const* places, int key, int count) {
        const int first = head * ROWS;
        score_few<ROWS>(q + first * depth, head, places, count);
        for (int i = 0; i < ROWS; ++i) update(state, first + i, i, key);
        add_few<ROWS>(state.output + first * width, head, places, count);
    }

    // scores = Q K^T, LANES keys at a time; what is not computed is not visible either.
    template <int ROWS>
    void score_few(const cell* queries_of_head, int head, const char* const* places, int count) {
        const int64_t offset = head * a.head_stride * sizeof(T);
        const bool in_place = !std::is_same<T, fp16>::value && a.block_size % LANES == 0;  // LANES keys share a block
        for (int group = 0; group < count; group += LANES) {
            const cell* rows = reinterpret_cast<const cell*>(places[group] + offset);
            ptrdiff_t stride = a.token_stride / PER_CELL;
            if (!in_place) {
                gather_keys(places + group, LANES, offset);
                rows = keys, stride = depth;
            }
            f32v sums[ROWS] = {};
            int i = 0;
#if defined(__AVX512F__)
            for (; i + 16 <= depth; i += 16) {
                u32v columns[16];
                transpose_sixteen(rows + i, stride, columns);
                prefetch.step();
#pragma GCC unroll 16
                for (int c = 0; c < 16; ++c)
                    for (int row = 0; row < ROWS; ++row)
                        sums[row] =
                            Cells::add_product(sums[row], splat(queries_of_head[row * depth + i + c]), columns[c]);
            }
#endif
            for (; i + 4 <= depth; i += 4) {
                u32v columns[4];
                transpose_four(rows + i, stride, columns);
                if (i % 16 == 0) prefetch.step();
                for (int c = 0; c < 4; ++c)
                    for (int row = 0; row < ROWS; ++row)
                        sums[row] =
                            Cells::add_product(sums[row], splat(queries_of_head[row * depth + i + c]), columns[c]);
            }
            for (; i < depth; ++i) {
                const u32v column = transpose_one(rows + i, stride);
                for (int row = 0; row < ROWS; ++row)
                    sums[row] = Cells::add_product(sums[row], splat(queries_of_head[row * depth + i]), column);
            }
            for (int row = 0; row < ROWS; ++row) store(scores + row * TILE + group, sums[row]);
        }
    }

    // output = output * correction + P V
    template <int ROWS>
    void add_few(float* output, int head, const char* const* places, int count) {
        const int64_t offset = head * a.head_stride * sizeof(T) + v_offset;
        for (int column = 0; column < width; column += PANEL, output += PANEL) {
            if (column + PANEL <= a.head_dim)
                add_panel<ROWS>(output, places, offset, count, [=](const T* row, const T* next, int n) {
                    return join(row + column + n, next + column + n);
                });
            else
                add_panel<ROWS>(output, places, offset, count, [=](const T* row, const T* next, int n) {
                    return value_cells(row, next, column + n);
                });
        }
    }

    // ``cells``: of PANEL columns of V, LANES at a time.
    template <int ROWS, class F>
    void add_panel(float* output, const char* const* places, int64_t offset, int count, F&& cells) {
        Sums<ROWS> sums;
        load_outputs<ROWS>(sums, output, 0);
        for (int i = 0; i * PER_CELL < count; ++i) {
            const T* row = reinterpret_cast<const T*>(places[i * PER_CELL] + offset);
            const T* next = reinterpret_cast<const T*>(places[i * PER_CELL + PER_CELL - 1] + offset);
            if (i % 4 == 0) prefetch.step();
            for (int n = 0; n < NV; ++n) {
                const u32v values = cells(row, next, n * LANES);
                for (int r = 0; r < ROWS; ++r)
                    sums[r][n] = Cells::add_product(sums[r][n], splat(probabilities[r * TILE_DEPTH + i]), values);
            }
        }
        store_sums<ROWS>(sums, output);
    }

    // ---- many queries: keys and values become panels first ------------------------------------------------------------

    void attend_many(const Softmax& state, int head, const char* const* places, int key) {
        pack_keys(places, head);
        pack_values(places, head);
        for_row_blocks(head_queries, [&](auto rows, int query) {
            const int first = head * head_queries + query;
            const int last_position = unit.position + (query + rows.value - 1) / call.group;
            const int visible = std::min(TILE, last_position + 1 - key);  // keys; the others would add zeros
            if (visible <= 0) return;
            score_many<rows.value>(q + first * depth, query, visible);
            for (int i = 0; i < rows.value; ++i) update(state, first + i, query + i, key);
            add_many<rows.value>(state.output + first * width, query, visible);
        });
    }

    // K becomes panels whose columns are keys.
    void pack_keys(const char* const* places, int head) {
        gather_keys(places, TILE, head * a.head_stride * sizeof(T));
        for (int i = 0; i < TILE; i += LANES)
            transpose_into_panel(keys + i * depth, depth, depth, k + i / PANEL * PANEL * depth + i % PANEL);
    }

    // V becomes panels whose columns are dimensions; a row takes PER_CELL keys.
    void pack_values(const char* const* places, int head) {
        const int64_t offset = head * a.head_stride * sizeof(T) + v_offset;
        for (int i = 0; i < TILE_DEPTH; ++i) {
            const T* row = reinterpret_cast<const T*>(places[i * PER_CELL] + offset);
            const T* next = reinterpret_cast<const T*>(places[i * PER_CELL + PER_CELL - 1] + offset);
            cell* to = v + i * PANEL;
            for (int column = 0; column < width; column += PANEL, to += TILE_DEPTH * PANEL)
                for (int n = 0; n < PANEL; n += LANES) store(to + n, value_cells(row, next, column + n));
        }
    }

    template <int ROWS>
    void score_many(const cell* query_rows, int query, int visible) {
        for (int column = 0; column < visible; column += PANEL)
            with_row_count<NV>((std::min(PANEL, visible - column) + LANES - 1) / LANES, [&](auto vectors) {
                f32v sums[ROWS][vectors.value] = {};
                add_products<Cells, ROWS>(sums, query_rows, depth, k + column * depth, depth);
                for (int row = 0; row < ROWS; ++row)
                    for (int i = 0; i < vectors.value; ++i)
                        store(scores + (query + row) * TILE + column + i * LANES, sums[row][i]);
            });
    }

    template <int ROWS>
    void add_many(float* output, int query, int visible) {
        const int cells = (visible + PER_CELL - 1) / PER_CELL;
        for (int column = 0; column < width; column += PANEL, output += PANEL) {
            Sums<ROWS> sums;
            load_outputs<ROWS>(sums, output, query);
            add_products<Cells, ROWS>(sums, probabilities + query * TILE_DEPTH, TILE_DEPTH, v + column * TILE_DEPTH,
                                      cells);
            store_sums<ROWS>(sums, output);
        }
    }

    // ---- both -----------------------------------------------------------------------------------------------------------

    // Brings ``count`` keys together: where they lie, their cells would be too far apart to be transposed.
    void gather_keys(const char* const* places, int count, int64_t offset) {
        for (int i = 0; i < count; ++i)
            copy_cells(reinterpret_cast<const T*>(places[i] + offset), a.head_dim, keys + i * depth);
    }

    // Dimensions d .. d + LANES of a row of V's cells; zero beyond head_dim.
    u32v value_cells(const T* row, const T* next, int d) const {
        const int count = a.head_dim - d;
        if (count >= LANES) return join(row + d, next + d);
        T some[LANES] = {}, next_some[LANES] = {};
        if (count > 0) {
            std::memcpy(some, row + d, count * sizeof(T));
            std::memcpy(next_some, next + d, count * sizeof(T));
        }
        return join(some, next_some);
    }
    static u32v join(const float* row, const float*) { return bit_cast<u32v>(load(row)); }
    static u32v join(const fp16* row, const fp16*) { return bit_cast<u32v>(load(row)); }
    static u32v join(const bf16* row, const bf16* next) { return interleave(row, next); }

    template <int ROWS>
    void load_outputs(Sums<ROWS>& sums, const float* output, int query) const {
        for (int row = 0; row < ROWS; ++row)
            for (int i = 0; i < NV; ++i)
                sums[row][i] = load(output + row * width + i * LANES) * splat(corrections[query + row]);
    }

    template <int ROWS>
    void store_sums(const Sums<ROWS>& sums, float* output) const {
        for (int row = 0; row < ROWS; ++row)
            for (int i = 0; i < NV; ++i) store(output + row * width + i * LANES, sums[row][i]);
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
            store_normal(reinterpret_cast<Probability*>(probabilities) + i * TILE + n * LANES, p);
        }
        store(lane_sums + query * LANES, sum);
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
            for (; count >= 2 * LANES; count -= 2 * LANES, from += 2 * LANES, to += LANES)
                store(to, load(reinterpret_cast<const cell*>(from)));
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
    Attention<T> attention(arguments, num_threads());
    parallel_for(attention.num_pieces(), [&](int64_t piece) { attention.run(int(piece)); });
}

}  // namespace

void nanovllm_paged_attention(const AttentionArguments* arguments) {
    with_type(arguments->dtype, [&](auto number) { paged_attention<decltype(number)>(*arguments); });
}
