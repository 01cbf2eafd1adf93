/* The executor: queues of tasks, one per stream, and the one place that runs them.
 *
 * Two schedules. Eager (the default): a task runs when it is submitted, unless its stream waits for something. Lazy
 * (EMULATED_NPU_LAZY=1): nothing runs before somebody synchronises, and then streams take turns in an order drawn from
 * EMULATED_NPU_SEED, no further than the synchronisation needs. An ordering that only luck provided shows as a wrong
 * answer. A synchronisation that nothing could ever satisfy is an error instead of a hang; the waiting tasks are dropped.
 */
#include "emulated.h"
#include <time.h>
#include <unistd.h>

pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t state_changed = PTHREAD_COND_INITIALIZER;
Stream *all_streams;
static Stream *default_streams[16];
static int streams_used, next_stream_id;
static uint64_t random_state;

static int lazy(void) {
    static int known = -1;
    if (known < 0) known = setting("EMULATED_NPU_LAZY", 0) != 0;
    return known;
}

static uint32_t draw(uint32_t below) {
    if (!random_state) random_state = 0x9E3779B97F4A7C15ull * (uint64_t)(setting("EMULATED_NPU_SEED", 0) + 1);
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % below;
}

/* ---- tasks ---- */

Task *new_task(int kind) {
    Task *task = calloc(1, sizeof *task);
    task->kind = kind;
    task->references = 1;
    task->slot = -1;
    return task;
}

void release_task(Task *task) {
    if (--task->references) return;
    if (task->work.release) task->work.release(task->work.arg);
    free(task);
}

void stream_append(Stream *stream, Task *task, Graph *replay_of) {
    Node *node = calloc(1, sizeof *node);
    *node = (Node){task, replay_of, NULL};
    if (stream->tail) stream->tail->next = node; else stream->head = node;
    stream->tail = node;
}

/* ---- the executor; the lock is held, except while work runs ---- */

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + time.tv_nsec;
}

static int ready(const Stream *stream) {
    if (!stream->head || stream->busy) return 0;
    const Node *node = stream->head;
    const Task *task = node->task;
    if (task->kind == LAUNCH) return task->graph->pending == 0;
    if (task->kind == WAIT) {
        if (task->slot >= 0) return node->replay_of->reached[task->slot];
        if (task->event->flags & ACL_EVENT_EXTERNAL) return task->event->is_set;
        return task->event->done >= task->sequence;
    }
    if (task->kind == VALUE_WAIT) {
        uint64_t found = *task->address;
        switch (task->comparison) {
            case ACL_STREAM_WAIT_VALUE_GEQ: return found >= task->value;
            case ACL_STREAM_WAIT_VALUE_EQ: return found == task->value;
            case ACL_STREAM_WAIT_VALUE_AND: return (found & task->value) != 0;
            default: return ~(found | task->value) != 0;
        }
    }
    return 1;
}

static aclError run_work(Stream *stream, Task *task) {
    task->references++;
    stream->busy = 1;
    Work work = task->work;
    pthread_mutex_unlock(&state_lock);
    aclError error = work.run(work.arg);
    pthread_mutex_lock(&state_lock);
    stream->busy = 0;
    release_task(task);
    pthread_cond_broadcast(&state_changed);
    return error;
}

/* Runs the task at the head of a ready stream. */
static aclError step(Stream *stream) {
    Node *node = stream->head;
    Task *task = node->task;
    aclError error = ACL_SUCCESS;
    stream->head = node->next;
    if (!stream->head) stream->tail = NULL;
    switch (task->kind) {
        case WORK: error = run_work(stream, task); break;
        case RECORD:
            if (task->slot >= 0) { node->replay_of->reached[task->slot] = 1; break; }
            if (task->event->done < task->sequence) task->event->done = task->sequence;
            task->event->is_set = 1;
            task->event->nanoseconds = now();
            break;
        case RESET: task->event->is_set = 0; break;
        case VALUE_WRITE: *task->address = task->value; break;
        case LAUNCH: error = graph_expand(stream, task); break;
        case UPDATE: {
            Work old = task->target->work;
            task->target->work = task->work;
            task->work = old; /* released with this task */
            break;
        }
        case WAIT:
        case VALUE_WAIT: break;
    }
    if (node->replay_of) node->replay_of->pending--;
    release_task(task);
    free(node);
    if (error) stream->error = error;
    return error;
}

static Stream *pick_ready(void) {
    int count = 0;
    for (Stream *stream = all_streams; stream; stream = stream->next) count += ready(stream);
    if (!count) return NULL;
    int choice = lazy() ? (int)draw(count) : 0;
    for (Stream *stream = all_streams; stream; stream = stream->next)
        if (ready(stream) && choice-- == 0) return stream;
    return NULL;
}

static int somebody_busy(void) {
    for (Stream *stream = all_streams; stream; stream = stream->next)
        if (stream->busy) return 1;
    return 0;
}

/* What a device does with streams that never get on: their tasks are dropped, and it works on. */
static void give_up(void) {
    for (Stream *stream = all_streams; stream; stream = stream->next) {
        while (stream->head) {
            Node *node = stream->head;
            stream->head = node->next;
            if (node->replay_of) node->replay_of->pending--;
            release_task(node->task);
            free(node);
        }
        stream->tail = NULL;
    }
}

/* Runs tasks until done(what). Reports the error of a stream that was synchronised with. */
aclError run_until(int (*done)(const void *), const void *what, const char *name) {
    while (!done(what)) {
        Stream *stream = pick_ready();
        if (stream) step(stream);
        else if (somebody_busy()) pthread_cond_wait(&state_changed, &state_lock);
        else {
            give_up();
            return fail(ACL_ERROR_RT_TASK_TIMEOUT,
                        "%s would DEADLOCK: every stream with tasks left waits for an event or value that nothing "
                        "submitted so far will set (was event.record() or the graph's task update forgotten?)", name);
        }
    }
    return ACL_SUCCESS;
}

int stream_empty(const void *what) { return !((const Stream *)what)->head && !((const Stream *)what)->busy; }

aclError drain_stream(Stream *stream) {
    aclError error = run_until(stream_empty, stream, "synchronising a stream");
    if (!error) error = stream->error;
    stream->error = ACL_SUCCESS;
    return error;
}

/* ---- submission ---- */

aclError submit(aclrtStream handle, Task *task) {
    if (task->kind == WORK) trace(task->work.name);
    if (task->kind == LAUNCH) trace("graph launch");
    pthread_mutex_lock(&state_lock);
    Stream *stream = stream_of(handle);
    aclError error = ACL_SUCCESS;
    if (task->kind == WAIT) join_if_captured(stream, task->event);
    if (stream->update && task->kind == WORK) error = group_replace(stream, task);
    else if (stream->capture) error = graph_record(stream, task);
    else stream_append(stream, task, NULL);
    if (!error && !lazy()) {
        Stream *next;
        while ((next = pick_ready())) step(next);
        error = stream->error;
        stream->error = ACL_SUCCESS;
    }
    pthread_mutex_unlock(&state_lock);
    return error;
}

aclError submit_work(aclrtStream stream, Work work) {
    Task *task = new_task(WORK);
    task->work = work;
    return submit(stream, task);
}

/* ---- streams ---- */

aclError reserve_streams(int count) {
    long most = setting("EMULATED_NPU_STREAMS", 1984);
    if (streams_used + count > most)
        return fail(ACL_ERROR_RT_NO_STREAM_RESOURCE, "no stream resource: the device has %ld streams, all in use "
                    "(every captured graph keeps its own)", most);
    streams_used += count;
    return ACL_SUCCESS;
}

void release_streams(int count) { streams_used -= count; }

Stream *new_stream(void) {
    Stream *stream = calloc(1, sizeof *stream);
    stream->id = next_stream_id++;
    stream->device = current_device();
    Stream **last = &all_streams;
    while (*last) last = &(*last)->next;
    *last = stream;
    return stream;
}

void delete_stream(Stream *stream) {
    Stream **link = &all_streams;
    while (*link && *link != stream) link = &(*link)->next;
    if (*link) *link = stream->next;
    free(stream);
}

Stream *stream_of(aclrtStream handle) {
    if (handle) return handle;
    int device = current_device();
    if (!default_streams[device]) default_streams[device] = new_stream();
    return default_streams[device];
}
