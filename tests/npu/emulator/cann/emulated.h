/* An Ascend made of host memory: what the sources of the emulated CANN share.
 *
 * The functions behind Huawei's headers (the real ones, taken from the torch-npu wheel) keep their documented contract.
 * Work is a list of tasks on a stream, as on the device; who runs them, and when, is decided in executor.c.
 */
#pragma once
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

/* ---- errors: the message is what aclGetRecentErrMsg hands to torch_npu, which puts it into its RuntimeError. ---- */
aclError fail(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- trace.c ---- */
void trace(const char *name);

/* ---- settings, from the environment (see README.md) ---- */
long setting(const char *name, long otherwise);
const char *setting_text(const char *name, const char *otherwise);

/* ---- memory ---- */
enum memory_kind { MEMORY_UNKNOWN, MEMORY_DEVICE, MEMORY_PINNED };
enum memory_kind memory_kind_of(const void *address, size_t size, int *device);

/* ---- work: a task calls run(arg); whoever holds the last reference calls release(arg), with the lock held. ---- */
typedef struct {
    const char *name;
    int (*run)(void *arg); /* 0 or an aclError */
    void (*release)(void *arg);
    void *arg;
} Work;

typedef struct Event Event;
typedef struct Graph Graph;
typedef struct Group Group;

typedef struct Task {
    enum { WORK, RECORD, WAIT, RESET, VALUE_WRITE, VALUE_WAIT, LAUNCH, UPDATE } kind;
    int references;
    Work work;           /* WORK; UPDATE: what becomes of target->work */
    Event *event;        /* RECORD, WAIT, RESET */
    uint64_t sequence;   /* RECORD, WAIT: which recording of the event */
    int slot;            /* RECORD, WAIT inside a graph: index into graph->reached, or -1 */
    Graph *graph;        /* LAUNCH; RECORD and WAIT inside a graph */
    uint64_t *address;   /* VALUE_*: device memory */
    uint64_t value;
    uint32_t comparison; /* VALUE_WAIT: ACL_STREAM_WAIT_VALUE_* */
    struct Task *target; /* UPDATE */
} Task;

typedef struct Node {
    Task *task;
    Graph *replay_of; /* the graph launch this node belongs to, or NULL */
    struct Node *next;
} Node;

typedef struct Stream {
    int id, device, busy;
    aclError error;      /* of a task that ran later than its submission; reported by the next synchronisation */
    Node *head, *tail;
    Graph *capture;      /* the graph being recorded here, or NULL */
    int capture_index;   /* this stream's list in capture->lists */
    Group *update;       /* the task group being updated here, or NULL */
    int update_index;
    struct Stream *next;
} Stream;

struct Event {
    uint32_t flags;
    uint64_t submitted, done; /* recordings submitted, recordings executed */
    uint64_t nanoseconds;
    int is_set;               /* external events only: recorded and not reset since */
    Graph *graph;             /* the capture of its latest recording, or NULL */
    int slot;
};

struct Group {
    Task **tasks;
    int count;
    int open; /* between TaskGrpBegin and TaskGrpEnd */
};

typedef struct {
    Task **tasks;
    int count;
    int last_slot_waited; /* 1: everything recorded here so far is waited for by another stream of the capture */
} TaskList;

struct Graph {
    uint32_t id;
    Stream *origin;
    TaskList *lists; /* one per captured stream; lists[0] is the origin's */
    Stream **streams, **replay_streams;
    int stream_count;
    int slot_count;
    int *slot_list;  /* slot -> the list its RECORD is in */
    char *reached;   /* slot -> recorded in the running replay */
    Group **groups;
    int group_count;
    int invalid, ended, pending; /* pending: nodes of running replays */
};

/* One lock for all state; it is not held while work runs, so a kernel may take Python's GIL. */
extern pthread_mutex_t state_lock;

Task *new_task(int kind);
void release_task(Task *task);
Stream *stream_of(aclrtStream handle);
aclError submit(aclrtStream stream, Task *task);          /* takes the reference */
aclError submit_work(aclrtStream stream, Work work);
extern Stream *all_streams;
int stream_empty(const void *stream);
aclError run_until(int (*done)(const void *), const void *what, const char *name); /* lock held */
aclError drain_stream(Stream *stream);                                               /* lock held */
void stream_append(Stream *stream, Task *task, Graph *replay_of);
aclError reserve_streams(int count);
void release_streams(int count);
Stream *new_stream(void);
void delete_stream(Stream *stream);

/* ---- graphs.c, called with the lock held ---- */
void join_if_captured(Stream *stream, const Event *event);
aclError graph_record(Stream *stream, Task *task);
aclError graph_expand(Stream *stream, Task *launch);
int capture_active(void);
aclError group_replace(Stream *stream, Task *task);

/* ---- device.c ---- */
int current_device(void);
int is_310p(void);

/* ---- operators.c ---- */
void start_kernels(void);
