/* What is submitted, and what is waited for, by name: for tests that count launches and look for hidden waits. */
#include "emulated.h"

#define MOST 100000

static const char *names[MOST];
static int count, tracing;
static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;

void trace(const char *name) {
    if (!tracing) return;
    pthread_mutex_lock(&trace_lock);
    if (count < MOST) names[count++] = name;
    pthread_mutex_unlock(&trace_lock);
}

/* 1: forget what was traced, and begin; 0: stop. */
API void emulated_trace(int on) {
    if (on) count = 0;
    tracing = on;
}

API int emulated_traced(const char ***result) {
    *result = names;
    return count;
}
