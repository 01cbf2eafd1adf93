// Work for several threads.
#pragma once

#include <algorithm>
#include <cstdint>

// Calls call(context, i) for i = 0 .. count - 1, each once, on up to the number of threads set by nanovllm_set_threads;
// returns when all are done. Who runs what is open. From within itself, or while another thread uses the pool, the calls
// run on the calling thread.
void run_parallel(int64_t count, void (*call)(const void* context, int64_t i), const void* context);

int num_threads();

template <class F>
void parallel_for(int64_t count, const F& f) {
    run_parallel(
        count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
}
