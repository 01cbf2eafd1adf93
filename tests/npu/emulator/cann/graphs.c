/* Captured graphs: tasks recorded instead of run, and run again at every launch with the addresses and host values of
 * the recording. A task group is a piece of a graph whose tasks may be given new host values (a "task update").
 *
 * A stream joins a capture when it waits for an event recorded in it, and must be joined back before the capture ends.
 */
#include "emulated.h"

static int captures_running;
static uint32_t next_graph_id = 1;

int capture_active(void) { return captures_running > 0; }

static void push(TaskList *list, Task *task) {
    list->tasks = realloc(list->tasks, (list->count + 1) * sizeof *list->tasks);
    list->tasks[list->count++] = task;
}

static int join_capture(Graph *graph, Stream *stream) {
    int index = graph->stream_count++;
    graph->lists = realloc(graph->lists, graph->stream_count * sizeof *graph->lists);
    graph->streams = realloc(graph->streams, graph->stream_count * sizeof *graph->streams);
    graph->lists[index] = (TaskList){NULL, 0, 1};
    graph->streams[index] = stream;
    stream->capture = graph;
    stream->capture_index = index;
    return index;
}

/* Waiting for an event recorded in a running capture makes the stream part of it. */
void join_if_captured(Stream *stream, const Event *event) {
    if (!stream->capture && event->graph && !event->graph->ended) join_capture(event->graph, stream);
}

/* A task submitted to a stream that is being captured. */
aclError graph_record(Stream *stream, Task *task) {
    Graph *graph = stream->capture;
    TaskList *list = &graph->lists[stream->capture_index];
    int external = task->event && (task->event->flags & ACL_EVENT_EXTERNAL);
    if (task->kind == RECORD && !external) {
        task->slot = graph->slot_count++;
        graph->slot_list = realloc(graph->slot_list, graph->slot_count * sizeof *graph->slot_list);
        graph->slot_list[task->slot] = stream->capture_index;
        task->event->graph = graph;
        task->event->slot = task->slot;
        list->last_slot_waited = 0;
    } else if (task->kind == WAIT && !external) {
        if (task->event->graph != graph) {
            if (!task->event->submitted) { release_task(task); return ACL_SUCCESS; }
            graph->invalid = 1;
            return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for an event recorded outside the "
                        "capture; only an ExternalEvent may cross it");
        }
        task->slot = task->event->slot;
        graph->lists[graph->slot_list[task->slot]].last_slot_waited = 1;
    } else {
        list->last_slot_waited = 0;
    }
    push(list, task);
    for (int i = 0; i < graph->group_count; i++) {
        Group *group = graph->groups[i];
        if (!group->open || task->kind != WORK) continue;
        group->tasks = realloc(group->tasks, (group->count + 1) * sizeof *group->tasks);
        group->tasks[group->count++] = task;
    }
    return ACL_SUCCESS;
}

/* Puts a launched graph's tasks in front of what its stream still has to do; other captured streams get their own. */
aclError graph_expand(Stream *stream, Task *launch) {
    Graph *graph = launch->graph;
    memset(graph->reached, 0, graph->slot_count);
    Node *rest = stream->head, *rest_tail = stream->tail;
    stream->head = stream->tail = NULL;
    for (int i = 0; i < graph->stream_count; i++) {
        Stream *target = i ? graph->replay_streams[i] : stream;
        for (int j = 0; j < graph->lists[i].count; j++) {
            graph->lists[i].tasks[j]->references++;
            graph->pending++;
            stream_append(target, graph->lists[i].tasks[j], graph);
        }
    }
    if (stream->tail) stream->tail->next = rest; else stream->head = rest;
    if (rest) stream->tail = rest_tail;
    return ACL_SUCCESS;
}

/* During a task update: the next task of the group gets the new work when the update stream comes to it. */
aclError group_replace(Stream *stream, Task *task) {
    Group *group = stream->update;
    if (stream->update_index >= group->count)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "task update: more tasks than the group's %d", group->count);
    Task *target = group->tasks[stream->update_index];
    if (strcmp(target->work.name, task->work.name))
        return fail(ACL_ERROR_RT_PARAM_INVALID, "task update: %s in place of %s", task->work.name, target->work.name);
    stream->update_index++;
    task->kind = UPDATE;
    task->target = target;
    stream_append(stream, task, NULL);
    return ACL_SUCCESS;
}

/* ---- the API ---- */

API aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
    (void)mode;
    if (!handle) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "the default stream cannot be captured");
    pthread_mutex_lock(&state_lock);
    Stream *stream = handle;
    Graph *graph = calloc(1, sizeof *graph);
    graph->id = next_graph_id++;
    graph->origin = stream;
    join_capture(graph, stream);
    captures_running++;
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

API aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus *status, aclmdlRI *model) {
    Graph *graph = stream_of(handle)->capture;
    *status = !graph ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
              : graph->invalid ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
    if (model) *model = graph;
    return ACL_SUCCESS;
}

static aclError end_capture(Stream *stream, Graph *graph) {
    if (!graph || graph->origin != stream)
        return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "this stream does not end a capture it began");
    aclError error = ACL_SUCCESS;
    for (int i = 0; i < graph->stream_count; i++) {
        graph->streams[i]->capture = NULL;
        if (i && !graph->lists[i].last_slot_waited)
            error = fail(ACL_ERROR_RT_STREAM_UNJOINED, "a stream that joined the capture was not joined back to it");
    }
    captures_running--;
    graph->ended = 1;
    if (graph->invalid) error = fail(ACL_ERROR_RT_STREAM_CAPTURED, "the capture was invalidated by an earlier error");
    if (!error) error = reserve_streams(graph->stream_count);
    if (error) return error;
    graph->reached = calloc(graph->slot_count + 1, 1);
    graph->replay_streams = calloc(graph->stream_count, sizeof *graph->replay_streams);
    for (int i = 1; i < graph->stream_count; i++) graph->replay_streams[i] = new_stream();
    return ACL_SUCCESS;
}

API aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI *model) {
    pthread_mutex_lock(&state_lock);
    Graph *graph = ((Stream *)handle)->capture;
    aclError error = end_capture(handle, graph);
    *model = error ? NULL : graph;
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
    Task *task = new_task(LAUNCH);
    task->graph = model;
    return submit(stream, task);
}

API aclError aclmdlRIDestroy(aclmdlRI model) {
    Graph *graph = model;
    pthread_mutex_lock(&state_lock);
    for (int i = 0; i < graph->stream_count; i++) {
        for (int j = 0; j < graph->lists[i].count; j++) release_task(graph->lists[i].tasks[j]);
        if (i) delete_stream(graph->replay_streams[i]);
    }
    release_streams(graph->stream_count);
    graph->stream_count = 0;
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

API aclError aclmdlRIGetId(aclmdlRI model, uint32_t *id) {
    *id = ((Graph *)model)->id;
    return ACL_SUCCESS;
}

API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    (void)mode;
    return ACL_SUCCESS;
}

API aclError aclmdlRIDebugPrint(aclmdlRI model) {
    const Graph *graph = model;
    for (int i = 0; i < graph->stream_count; i++)
        for (int j = 0; j < graph->lists[i].count; j++)
            printf("graph %u stream %d: %s\n", graph->id, i,
                   graph->lists[i].tasks[j]->work.name ? graph->lists[i].tasks[j]->work.name : "event or value");
    return ACL_SUCCESS;
}

API aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
    pthread_mutex_lock(&state_lock);
    Graph *graph = stream_of(handle)->capture;
    aclError error = ACL_SUCCESS;
    if (!graph) error = fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group outside a capture");
    else {
        graph->groups = realloc(graph->groups, (graph->group_count + 1) * sizeof *graph->groups);
        Group *group = calloc(1, sizeof *group);
        group->open = 1;
        graph->groups[graph->group_count++] = group;
    }
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp *result) {
    pthread_mutex_lock(&state_lock);
    Graph *graph = stream_of(handle)->capture;
    aclError error = ACL_SUCCESS;
    if (!graph || !graph->group_count || !graph->groups[graph->group_count - 1]->open)
        error = fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group ends that was not begun");
    else {
        Group *group = graph->groups[graph->group_count - 1];
        group->open = 0;
        *result = group;
    }
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
    Stream *stream = stream_of(handle);
    if (stream->capture) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a task update on a stream being captured");
    stream->update = group;
    stream->update_index = 0;
    return ACL_SUCCESS;
}

API aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
    Stream *stream = stream_of(handle);
    if (!stream->update) return fail(ACL_ERROR_RT_PARAM_INVALID, "a task update ends that was not begun");
    int missing = stream->update->count - stream->update_index;
    stream->update = NULL;
    return missing ? fail(ACL_ERROR_RT_PARAM_INVALID, "task update: %d tasks of the group were not given", missing)
                   : ACL_SUCCESS;
}
