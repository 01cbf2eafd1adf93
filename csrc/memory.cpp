// Memory made ready before it is needed.
#include "kernels.h"

// A page fault for every page, rather than one call for many: such a call (MADV_POPULATE_WRITE) keeps whoever maps memory
// waiting, as one does who loads a library. Adding 0 is a write, but loses nothing that others write meanwhile.
void nanovllm_touch(void* memory, int64_t bytes, int64_t page, const volatile int32_t* wanted) {
    volatile char* const place = static_cast<volatile char*>(memory);
    for (int64_t i = 0; i < bytes && *wanted; i += page) __atomic_fetch_add(place + i, char(0), __ATOMIC_RELAXED);
}
