// Choosing a token from each row of logits: no row is sorted, and most are read from memory once.
//
// The meaning is that of nanovllm/runner/choice.py, random numbers included: min-p, top-k and top-p keep an upper set of a
// row, ties with its boundary included, and the draw is the inverse of the cumulative distribution in two levels, first
// among blocks of 128 columns, then within one.
//
// 1. ``summarise`` reads every row once: the maximum of each block, and its sum of exponentials. That is all that a
//    greedy row and one without filters need, but for a look into one block.
// 2. Top-k: k blocks have a maximum that is at least the k-th largest maximum, and so the k-th largest logit is; only
//    what reaches it is selected from, and then sorted.
//    Top-p: a token is drawn, and what is likelier than it summed up, in those blocks only that hold anything likelier. If
//    that reaches top_p, the next draw is among it (rejection, as in choice.py).
//
// Invariant: a row's token depends on this row alone; blocks and orders of addition are the same on any number of threads.
#include <algorithm>
#include <cmath>
#include <functional>

#include "buffer.h"
#include "kernels.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK = 128;
constexpr int64_t TASK_BLOCKS = 64;  // of a task that summarises: 32 KB of logits

int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

// A row of logits over its temperature. NaN counts as infinitely large, so that it is found.
struct Row {
    const float* logits;
    int64_t columns;
    float temperature;

    f32v scaled(f32v x) const {
        x = x == x ? x : splat(INFINITY);
        return temperature == 1.0f ? x : x / splat(temperature);
    }

    float at(int64_t column) const { return scaled(splat(logits[column]))[0]; }

    // Calls f(vector, offset) for the vectors of a block; what lies beyond the row's end is -infinity.
    template <class F>
    inline __attribute__((always_inline)) void for_block(int64_t block, F&& f) const {
        const float* from = logits + block * BLOCK;
        const int64_t count = columns - block * BLOCK;
        float padded[BLOCK];
        if (count < BLOCK) {
            std::copy(from, from + count, padded);
            std::fill(padded + count, padded + BLOCK, -INFINITY);
            from = padded;
        }
        for (int i = 0; i < BLOCK; i += LANES) f(scaled(load(from + i)), i);
    }
};

// A block's maximum, and the sum of exp(z - maximum); the sum is left alone if it is not asked for.
void summarise(const Row& row, int64_t block, float* maximum, float* sum) {
    f32v z[BLOCK / LANES], most = splat(-INFINITY);
    row.for_block(block, [&](f32v v, int i) {
        z[i / LANES] = v;
        most = max(most, v);
    });
    *maximum = max_of(most);
    if (!sum) return;
    const f32v base = splat(std::isfinite(*maximum) ? *maximum : 0.0f);
    f32v total = {};
    for (const f32v& v : z) total = total + exp(v - base);
    *sum = sum_of(total);
}

double total_of(const float* weights, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i];
    return total;
}

// An index with probability proportional to its weight: never one of weight zero, if the total is not.
int64_t draw(const float* weights, int64_t count, float uniform) {
    const double wanted = uniform * total_of(weights, count);  // uniform < 1: less than the total, in double precision
    double reached = 0;
    for (int64_t i = 0; i < count; ++i) {
        reached += weights[i];
        if (reached > wanted) return i;
    }
    return count - 1;
}

// Random numbers of runner/uniform.py: the finaliser of SplitMix64, and two numbers in [0, 1) for a draw.
uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

struct Uniforms {
    float block, column;
};

Uniforms uniforms(uint64_t seed, int64_t position, int64_t attempt) {
    const uint64_t counter = uint64_t(position) + (uint64_t(attempt) << 40) + 1;
    const uint64_t word = mix(mix(seed) + counter * 0x9E3779B97F4A7C15u);
    return {float(word >> 40) * 0x1p-24f, float((word >> 8) & 0xffffffu) * 0x1p-24f};
}

// How a row chooses; see ChooseArguments.
struct Choice {
    int64_t top_k;
    float top_p, min_p;
    uint64_t seed;
    int64_t position;
};

int64_t first_of(const Row& row, const float* maxima, float value) {
    const int64_t block = std::find(maxima, maxima + blocks_of(row.columns), value) - maxima;
    int64_t column = block * BLOCK;
    while (column + 1 < row.columns && row.at(column) != value) ++column;
    return column;
}

// ---- top-p, min-p, and no filter ----------------------------------------------------------------------------------

// exp(z - most) of a block's columns above ``bound``, if it is at least ``least``; otherwise zero.
void weigh(const Row& row, int64_t block, float most, float bound, float least, float* weights) {
    row.for_block(block, [&](f32v z, int i) {
        f32v weight = exp(z - most);
        weight = z > bound ? weight : f32v{};
        store(weights + i, weight >= least ? weight : f32v{});
    });
}

// ``sums`` [blocks] as summarise has left them; they and the maxima are overwritten.
int64_t choose_from_all(const Row& row, float* maxima, float* sums, float most, const Choice& choice) {
    const int64_t blocks = blocks_of(row.columns);
    float weights[BLOCK];
    for_lanes(blocks, [=](int64_t i, auto lanes) {
        const f32v peak = exp(lanes.load(maxima + i) - most);
        if (choice.min_p > 0.0f)  // blocks of unlikely tokens only
            lanes.store(maxima + i, peak >= choice.min_p ? lanes.load(maxima + i) : splat(-INFINITY));
        else
            lanes.store(sums + i, lanes.load(sums + i) * peak);
    });
    float bound = -INFINITY;
    double limit = INFINITY;
    for (int64_t token = 0, attempt = 0;; ++attempt) {
        if (attempt > 0 || choice.min_p > 0.0f) {
            for (int64_t block = 0; block < blocks; ++block) {
                sums[block] = 0.0f;
                if (!(maxima[block] > bound)) continue;
                weigh(row, block, most, bound, choice.min_p, weights);
                f32v total = {};
                for (int i = 0; i < BLOCK; i += LANES) total = total + load(weights + i);
                sums[block] = sum_of(total);
            }
        }
        const double total = total_of(sums, blocks);
        if (attempt > 0 && !(total >= limit && total > 0)) return token;  // the last draw is in the nucleus
        if (attempt == 0 && choice.top_p < 1.0f) limit = choice.top_p * total;
        const Uniforms uniform = uniforms(choice.seed, choice.position, attempt);
        const int64_t block = draw(sums, blocks, uniform.block);
        weigh(row, block, most, bound, choice.min_p, weights);
        token = block * BLOCK + draw(weights, BLOCK, uniform.column);
        if (std::isinf(limit)) return token;
        bound = row.at(token);
    }
}

// ---- top-k --------------------------------------------------------------------------------------------------------

struct Candidate {
    float value;
    int32_t column;

    // Likelier ones come first, and of equals the first.
    bool operator<(const Candidate& other) const {
        return value > other.value || (value == other.value && column < other.column);
    }
};

// Those of a row that are at least its k-th largest value, likeliest first, into ``found``: how many they are.
int64_t select(const Row& row, const float* maxima, int64_t k, Candidate* found) {
    thread_local Buffer<float> scratch;
    const int64_t blocks = blocks_of(row.columns);
    float least = -INFINITY;
    if (k <= blocks) {
        float* sorted = scratch.at_least(blocks);
        std::copy(maxima, maxima + blocks, sorted);
        std::nth_element(sorted, sorted + k - 1, sorted + blocks, std::greater<float>());
        least = sorted[k - 1];
    }
    int64_t count = 0;
    float values[BLOCK];
    for (int64_t block = 0; block < blocks; ++block) {
        if (maxima[block] < least) continue;
        row.for_block(block, [&](f32v z, int i) { store(values + i, z); });
        const int64_t first = block * BLOCK, columns = std::min(BLOCK, row.columns - first);
        for (int64_t i = 0; i < columns; ++i) {
            found[count] = {values[i], int32_t(first + i)};
            count += values[i] >= least;
        }
    }
    std::nth_element(found, found + k - 1, found + count);
    const float boundary = found[k - 1].value;
    count = std::partition(found + k, found + count, [=](Candidate c) { return c.value >= boundary; }) - found;
    std::sort(found, found + count);
    return count;
}

int64_t choose_from_top_k(const Row& row, const float* maxima, const Choice& choice) {
    thread_local Buffer<Candidate> candidates;
    thread_local Buffer<float> buffer;
    Candidate* found = candidates.at_least(row.columns + 1);
    const int64_t count = select(row, maxima, choice.top_k, found), blocks = blocks_of(count);
    float *weights = buffer.at_least(count + blocks), *sums = weights + count;
    for (int64_t i = 0; i < count; ++i) weights[i] = found[i].value - found[0].value;
    for_lanes(count, [=](int64_t i, auto lanes) {
        const f32v weight = exp(lanes.load(weights + i));
        lanes.store(weights + i, weight >= choice.min_p ? weight : f32v{});
    });
    if (choice.top_p < 1.0f) {  // the nucleus ends with the first token at which the limit is reached, and its ties
        const double limit = choice.top_p * total_of(weights, count);
        double reached = 0;
        int64_t last = 0;
        while (last + 1 < count && (reached += weights[last]) < limit) ++last;
        for (int64_t i = last + 1; i < count; ++i)
            if (found[i].value < found[last].value) weights[i] = 0.0f;
    }
    for (int64_t block = 0; block < blocks; ++block)
        sums[block] = float(total_of(weights + block * BLOCK, std::min(BLOCK, count - block * BLOCK)));
    const Uniforms uniform = uniforms(choice.seed, choice.position, 0);
    const int64_t first = draw(sums, blocks, uniform.block) * BLOCK;
    return found[first + draw(weights + first, std::min(BLOCK, count - first), uniform.column)].column;
}

}  // namespace

void nanovllm_choose(const ChooseArguments* arguments) {
    thread_local Buffer<float> workspace;
    const ChooseArguments& a = *arguments;
    const int64_t blocks = blocks_of(a.columns), pieces = (blocks + TASK_BLOCKS - 1) / TASK_BLOCKS;
    float* maxima = workspace.at_least(2 * a.rows * blocks);
    float* sums = maxima + a.rows * blocks;
    auto row_of = [=, &a](int64_t i) {
        return Row{a.logits + i * a.columns, a.columns, a.temperature[i] > 0.0f ? a.temperature[i] : 1.0f};
    };
    auto limits_k = [=, &a](int64_t i) { return a.top_k[i] > 0 && a.top_k[i] < a.columns; };
    parallel_for(a.rows * pieces, [=, &a](int64_t task) {
        const int64_t i = task / pieces, first = task % pieces * TASK_BLOCKS;
        const Row row = row_of(i);
        const bool summed = a.temperature[i] > 0.0f && !limits_k(i) && !(a.min_p[i] > 0.0f);
        for (int64_t block = first; block < std::min(first + TASK_BLOCKS, blocks); ++block)
            summarise(row, block, maxima + i * blocks + block, summed ? sums + i * blocks + block : nullptr);
    });
    parallel_for(a.rows, [=, &a](int64_t i) {
        const Row row = row_of(i);
        float* own = maxima + i * blocks;
        const float most = *std::max_element(own, own + blocks);
        const Choice choice = {a.top_k[i], a.top_p[i], a.min_p[i], a.seeds[i], a.positions[i]};
        if (!(a.temperature[i] > 0.0f) || !std::isfinite(most))
            a.tokens[i] = first_of(row, own, most);
        else if (limits_k(i))
            a.tokens[i] = choose_from_top_k(row, own, choice);
        else
            a.tokens[i] = choose_from_all(row, own, sums + i * blocks, most, choice);
    });
}
