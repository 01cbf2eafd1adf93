// A recorded step: its kernels one after the other, with no Python between them.
#include "kernels.h"

void nanovllm_run(const Call* calls, int64_t count, int64_t rows) {
    for (const Call* call = calls; call != calls + count; ++call) {
        *static_cast<int64_t*>(call->arguments) = rows;  // the first field of every kernel's arguments
        call->kernel(call->arguments);
    }
}
