// What attention keeps of an online softmax.
#pragma once

#include <algorithm>

#include "simd.h"

constexpr float LOWEST = -1e30f;  // below any score; unlike -infinity it may be subtracted from itself

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
