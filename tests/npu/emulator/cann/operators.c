/* The operator library's way into Python. All aclnn functions share two shapes:
 *
 *   aclnnXGetWorkspaceSize(arguments..., uint64_t *workspace, aclOpExecutor **executor)   checks and prepares on the host
 *   aclnnX(workspace, size, executor, stream)                                             submits to the device
 *
 * A generated trampoline per name (trampolines.py) saves the argument registers and comes here with the name's index.
 * The kernels' Python module decodes the arguments, checks them, and keeps a closure that the task runs.
 */
#include "emulated.h"
#include <dlfcn.h>

#define EXECUTOR 0x7E45E8EC

typedef int (*Prepare)(int name, const uint64_t *integers, const double *floats, const uint64_t *stack);
typedef int (*Run)(int64_t closure);

typedef struct {
    uint32_t object;
    int name;
    int64_t closure;
} Executor;

extern const char *const emulated_operator_names[];
static Prepare prepare;
static Run run;

static int64_t *released; /* closures nobody will run again; Python collects them at its next call */
static int released_count, released_capacity;

API void emulated_set_kernels(Prepare prepare_callback, Run run_callback) {
    prepare = prepare_callback;
    run = run_callback;
}

/* Imports the kernels, in whichever process first initialises the device. */
void start_kernels(void) {
    if (prepare) return;
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*leave)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*python)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    if (!ensure || !leave || !python) {
        fprintf(stderr, "emulated Ascend: not inside a Python process\n");
        abort();
    }
    int state = ensure();
    int failed = python("import tests.npu.emulator.kernels");
    leave(state);
    if (failed) abort();
}

API int emulated_prepare(int name, const uint64_t *integers, const double *floats, const uint64_t *stack) {
    if (!prepare) return fail(ACL_ERROR_UNINITIALIZE, "%s after the interpreter's end", emulated_operator_names[name]);
    return prepare(name, integers, floats, stack);
}

API void *emulated_new_executor(int name, int64_t closure) {
    Executor *executor = malloc(sizeof *executor);
    *executor = (Executor){EXECUTOR, name, closure};
    return executor;
}

static int run_closure(void *arg) {
    if (!run) return 0;
    return run(((Executor *)arg)->closure);
}

static void release_closure(void *arg) {
    if (released_count == released_capacity) {
        released_capacity = released_capacity ? 2 * released_capacity : 64;
        released = realloc(released, released_capacity * sizeof *released);
    }
    released[released_count++] = ((Executor *)arg)->closure;
    free(arg);
}

/* Moves up to `most` released closures into `into`; returns how many. */
API int emulated_take_released(int64_t *into, int most) {
    pthread_mutex_lock(&state_lock);
    int count = released_count < most ? released_count : most;
    released_count -= count;
    memcpy(into, released + released_count, count * sizeof *into);
    pthread_mutex_unlock(&state_lock);
    return count;
}

API int emulated_execute(void *workspace, uint64_t size, Executor *executor, aclrtStream stream, int name) {
    (void)workspace, (void)size;
    if (!executor || executor->object != EXECUTOR || executor->name != name)
        return fail(ACL_ERROR_INVALID_PARAM, "%s: not its executor", emulated_operator_names[name]);
    return submit_work(stream, (Work){emulated_operator_names[name], run_closure, release_closure, executor});
}

/* An executor that was only asked for its workspace. */
API aclError aclDestroyAclOpExecutor(Executor *executor) {
    pthread_mutex_lock(&state_lock);
    release_closure(executor);
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

/* For operators that come from Python (the atb library): same way, without an aclnn name. */
API int emulated_submit(aclrtStream stream, const char *name, int64_t closure) {
    Executor *executor = emulated_new_executor(-1, closure);
    return submit_work(stream, (Work){name, run_closure, release_closure, executor});
}

API int emulated_fail(int code, const char *text) { return fail(code, "%s", text); }
