// How a batch's attention is cut into pieces of work (see attention.cpp).
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

constexpr int TILE = 64;          // keys
constexpr int PARTITION = 512;    // keys; a multiple of TILE
constexpr int UNIT_QUERIES = 96;  // about: tokens times query heads
constexpr int PACKING = 8;        // packing a key costs as much as its products with this many queries

// Some tokens of a row, and the query heads that read some KV heads.
struct Unit {
    int row, first_head, heads;  // KV heads
    int first_token, tokens;     // first_token in the flat batch
    int position;                // of first_token in its row
    int first_partition, end_partition;
    int pieces;       // if more than one, the thread that completes the last merges their partitions'
    size_t partials;  // results, which begin here, in queries

    // The keys of a partition that some of the tokens see, from the beginning of a tile.
    int first_key(int partition, int window) const {
        const int first = window ? std::max(0, position - window + 1) : 0;
        return std::max(partition * PARTITION, first / TILE * TILE);
    }
    int end_key(int partition) const { return std::min((partition + 1) * PARTITION, position + tokens); }
};

// Some partitions of a unit's context.
struct Piece {
    int unit;
    int first_partition, end_partition;
};

struct Plan {
    std::vector<Unit> units;
    std::vector<Piece> pieces;
    size_t partials = 0;  // results of partitions to be kept, in queries

    void make(const AttentionArguments& a, int threads) {
        const int group = a.heads / a.kv_heads;
        units.clear();
        pieces.clear();
        partials = 0;
        int64_t total = 0;
        for (int row = 0; row < a.batch->requests; ++row) total += row_cost(a, row, group);
        const int64_t most = total / (threads * 8) + 1;  // of a piece, if it can be divided
        for (int row = 0; row < a.batch->requests; ++row) add_units(a, row, group, threads == 1 ? total : most);
        for (size_t i = 0; i < units.size(); ++i) {
            Unit& unit = units[i];
            const int partitions = unit.end_partition - unit.first_partition;
            const int64_t wanted = (cost(unit, group) + most - 1) / most;
            unit.pieces = threads == 1 ? 1 : int(std::min<int64_t>(partitions, wanted));
            unit.partials = partials;
            if (unit.pieces > 1) partials += size_t(partitions) * unit.heads * unit.tokens * group;
            for (int piece = 0; piece < unit.pieces; ++piece)
                pieces.push_back({int(i), unit.first_partition + partitions * piece / unit.pieces,
                                  unit.first_partition + partitions * (piece + 1) / unit.pieces});
        }
    }

   private:
    // A row's heads lie side by side in the cache. A unit of few tokens takes many of them: it waits for memory, which
    // likes to be read in order. A unit of many tokens takes one: it multiplies, with one head's keys at hand.
    void add_units(const AttentionArguments& a, int row, int group, int64_t most) {
        const int count = a.batch->query_start[row + 1] - a.batch->query_start[row];
        const int unit_tokens = std::max(1, UNIT_QUERIES / group);
        for (int first = 0; first < count; first += unit_tokens) {
            Unit unit{};
            unit.row = row;
            unit.first_token = a.batch->query_start[row] + first;
            unit.tokens = std::min(unit_tokens, count - first);
            unit.position = a.batch->seq_lens[row] - count + first;
            const int first_key = a.window ? std::max(0, unit.position - a.window + 1) : 0;
            unit.first_partition = first_key / PARTITION;
            unit.end_partition = (unit.position + unit.tokens - 1) / PARTITION + 1;
            unit.heads = 1;
            const int partitions = unit.end_partition - unit.first_partition;
            const int64_t one_head = cost(unit, group) / partitions;  // in one partition
            const int64_t heads = std::min<int64_t>(most / one_head, UNIT_QUERIES / (group * unit.tokens));
            unit.heads = int(std::max<int64_t>(1, std::min<int64_t>(heads, a.kv_heads)));
            for (; unit.first_head < a.kv_heads; unit.first_head += unit.heads) {
                unit.heads = std::min(unit.heads, a.kv_heads - unit.first_head);
                units.push_back(unit);
            }
        }
    }

    static int64_t row_cost(const AttentionArguments& a, int row, int group) {
        const int64_t count = a.batch->query_start[row + 1] - a.batch->query_start[row], length = a.batch->seq_lens[row];
        if (!count) return 0;
        const int64_t seen = a.window ? std::min<int64_t>(length, a.window + count) : length - count / 2;
        return seen * (count * group + PACKING) * a.kv_heads;
    }

    // In products of a key and a query.
    static int64_t cost(const Unit& unit, int group) {
        return int64_t(unit.end_partition - unit.first_partition) * PARTITION * unit.heads *
               (unit.tokens * group + PACKING);
    }
};
