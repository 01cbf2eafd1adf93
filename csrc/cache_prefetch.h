// Bringing rows of the paged cache near before they are used.
#pragma once

#include <algorithm>
#include <cstddef>

// Asks for the keys and values of the next tile, some lines at every step of a product: rows of the cache are too far
// apart for the hardware to foresee them, and a core can wait for a limited number of lines at a time.
class CachePrefetch {
   public:
    // ``bytes`` at each of ``count`` places, and at ``v_offset`` behind it, within ``steps`` steps.
    void start(const char* const* places, int count, ptrdiff_t v_offset, int bytes, int steps) {
        place_ = places, end_ = places + count;
        v_offset_ = v_offset, bytes_ = bytes;
        const int pieces = (bytes + PIECE - 1) / PIECE;
        per_step_ = (count * pieces + steps - 1) / steps;
        at_ = *place_, row_end_ = at_ + bytes;
    }

    void stop() { per_step_ = 0; }

    void step() {
        for (int i = 0; i < per_step_; ++i) {
            for (int line = 0; line < PIECE; line += 64) {
                __builtin_prefetch(at_ + line, 0, 2);
                __builtin_prefetch(at_ + v_offset_ + line, 0, 2);
            }
            at_ += PIECE;
            if (at_ < row_end_) continue;
            if (++place_ == end_) return stop();
            at_ = *place_, row_end_ = at_ + bytes_;
        }
    }

   private:
    static constexpr int PIECE = 256;

    const char *const *place_ = nullptr, *const *end_ = nullptr;
    const char *at_ = nullptr, *row_end_ = nullptr;
    ptrdiff_t v_offset_ = 0;
    int bytes_ = 0, per_step_ = 0;
};
