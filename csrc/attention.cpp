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
#include "dtype.h"
#include "parallel.h"
#include "product.h"
#include "transpose.h"

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

// Asks for the keys and values of the next tile, a few lines at every step of a product: rows of the cache are too far
// apart for the hardware to foresee them, and a core can wait for a few lines at a time only.
class Prefetcher {
   public:
    explicit Prefetcher(ptrdiff_t v_offset) : v_offset_(v_offset) {}

    // ``bytes`` at each place, and at v_offset behind it, within ``steps`` steps.
    void start(const char* const* places, int count, int bytes, int steps) {
        place_ = places, end_ = places + std::max(0, count);
        offset_ = 0, bytes_ = bytes;
        per_step_ = (std::max(0, count) * ((bytes + 63) / 64) + steps - 1) / steps;
    }

    void step() {
        for (int i = 0; i < per_step_ && place_ != end_; ++i) {
            const char* line = *place_ + offset_;
            __builtin_prefetch(line, 0, 2);
            __builtin_prefetch(line + v_offset_, 0, 2);
            offset_ += 64;
            if (offset_ >= bytes_) offset_ = 0, ++place_;
        }
    }

   private:
    const ptrdiff_t v_offset_;
    const char *const *place_, *const *end_;
    int offset_, bytes_, per_step_;
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
    Prefetcher prefetcher;

    Task(const Attention& attention, const Unit& its_unit, Workspace& workspace)
        : call(attention),
          a(attention.a),
          unit(its_unit),
          head_queries(unit.tokens * attention.group),
          queries(unit.heads * head_queries),
          depth(attention.depth),
          width(attention.width),
          v_offset(static_cast<const char*>(a.v_cache) - static_cast<const char*>(a.k_cache)),
          prefetcher(v_offset) {
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

    // How often attend_few lets the prefetcher step in one tile.
    int prefetch_steps() const { return unit.heads * (TILE / LANES * (depth / 4) + width / PANEL * TILE_DEPTH); }

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
        const char *places[TILE], *next_places[TILE];
        for (int key = std::max(number * PARTITION, first / TILE * TILE); key < end; key += TILE) {
            const int count = std::min(TILE, end - key), next_count = std::min(TILE, end - key - TILE);
            find_keys(key, count, places);
            if (next_count > 0) find_keys(key + TILE, next_count, next_places);
            prefetcher.start(next_places, next_count, unit.heads * a.head_stride * sizeof(T), prefetch_steps());
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

    // Where in the cache the tile's keys are, for the unit's first head. Their values are ``v_offset`` bytes behind.
    // The last of them stands in for those beyond ``count``, which nobody sees.
    void find_keys(int first, int count, const char** places) const {
        const char* base = static_cast<const char*>(a.k_cache) + unit.first_head * a.head_stride * sizeof(T);
        const int32_t* block = a.batch->block_table + unit.row * a.batch->table_stride + first / a.block_size;
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
            for (; i + 4 <= depth; i += 4) {
                u32v columns[4];
                transpose_four(rows + i, stride, columns);
                prefetcher.step();
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
            Sums<ROWS> sums;
            load_outputs<ROWS>(sums, output, 0);
            for (int i = 0; i * PER_CELL < count; ++i) {
                const T* row = reinterpret_cast<const T*>(places[i * PER_CELL] + offset);
                const T* next = reinterpret_cast<const T*>(places[i * PER_CELL + PER_CELL - 1] + offset);
                prefetcher.step();
                for (int n = 0; n < NV; ++n) {
                    const u32v values = value_cells(row, next, column + n * LANES);
                    for (int r = 0; r < ROWS; ++r)
                        sums[r][n] = Cells::add_product(sums[r][n], splat(probabilities[r * TILE_DEPTH + i]), values);
                }
            }
            store_sums<ROWS>(sums, output);
        }
    }

    // ---- many queries: keys and values become panels first ------------------------------------------------------------

    void attend_many(const Softmax& state, int head, const char* const* places, int key) {
        pack_keys(places, head);
        pack_values(places, head);
        for_row_blocks(head_queries, [&](auto rows, int query) {
            const int first = head * head_queries + query;
            score_many<rows.value>(q + first * depth, query);
            for (int i = 0; i < rows.value; ++i) update(state, first + i, query + i, key);
            add_many<rows.value>(state.output + first * width, query);
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
    void score_many(const cell* query_rows, int query) {
        for (int column = 0; column < TILE; column += PANEL) {
            Sums<ROWS> sums = {};
            add_products<Cells, ROWS>(sums, query_rows, depth, k + column * depth, depth);
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < NV; ++i)
                    store(scores + (query + row) * TILE + column + i * LANES, sums[row][i]);
        }
    }

    template <int ROWS>
    void add_many(float* output, int query) {
        for (int column = 0; column < width; column += PANEL, output += PANEL) {
            Sums<ROWS> sums;
            load_outputs<ROWS>(sums, output, query);
            add_products<Cells, ROWS>(sums, probabilities + query * TILE_DEPTH, TILE_DEPTH, v + column * TILE_DEPTH,
                                      TILE_DEPTH);
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
