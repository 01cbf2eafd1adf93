/* The interface of streams, events and values in device memory; executor.c runs what is submitted here. */
#include "emulated.h"

API aclError aclrtCreateStreamWithConfig(aclrtStream *handle, uint32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    pthread_mutex_lock(&state_lock);
    aclError error = reserve_streams(1);
    if (!error) *handle = new_stream();
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclrtCreateStream(aclrtStream *handle) { return aclrtCreateStreamWithConfig(handle, 0, 0); }

API aclError aclrtDestroyStream(aclrtStream handle) {
    pthread_mutex_lock(&state_lock);
    aclError error = drain_stream(handle);
    delete_stream(handle);
    release_streams(1);
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclrtDestroyStreamForce(aclrtStream handle) { return aclrtDestroyStream(handle); }

API aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
    *id = stream_of(handle)->id;
    return ACL_SUCCESS;
}

API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout) {
    (void)timeout;
    trace("wait for stream");
    pthread_mutex_lock(&state_lock);
    Stream *stream = stream_of(handle);
    aclError error;
    if (stream->capture) {
        stream->capture->invalid = 1;
        error = fail(ACL_ERROR_RT_STREAM_CAPTURED, "a stream cannot be synchronised while it is being captured");
    } else {
        error = drain_stream(stream);
    }
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclrtSynchronizeStream(aclrtStream handle) { return aclrtSynchronizeStreamWithTimeout(handle, -1); }

API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    (void)timeout;
    trace("wait for device");
    if (capture_active()) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "the device cannot be synchronised while a stream is being captured");
    pthread_mutex_lock(&state_lock);
    aclError error = ACL_SUCCESS;
    int device = current_device();
    for (Stream *stream = all_streams; stream && !error; stream = stream->next)
        if (stream->device == device) error = drain_stream(stream);
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }

API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
    pthread_mutex_lock(&state_lock);
    *status = stream_empty(stream_of(handle)) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

API aclError aclrtLaunchHostFunc(aclrtStream handle, void (*function)(void *), void *arg) {
    union { void (*given)(void *); int (*run)(void *); } cast = {function};
    return submit_work(handle, (Work){"host function", cast.run, NULL, arg});
}

/* ---- events ---- */

API aclError aclrtCreateEventExWithFlag(aclrtEvent *handle, uint32_t flags) {
    Event *event = calloc(1, sizeof *event);
    event->flags = flags;
    *handle = event;
    return ACL_SUCCESS;
}

API aclError aclrtCreateEventWithFlag(aclrtEvent *handle, uint32_t flags) {
    return aclrtCreateEventExWithFlag(handle, flags);
}

API aclError aclrtDestroyEvent(aclrtEvent handle) {
    (void)handle; /* tasks in flight may name it; a few bytes per event are kept instead of counted */
    return ACL_SUCCESS;
}

API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
    Task *task = new_task(RECORD);
    task->event = handle;
    pthread_mutex_lock(&state_lock);
    task->sequence = stream_of(stream)->capture ? 0 : ++task->event->submitted;
    if (task->sequence) task->event->graph = NULL;
    pthread_mutex_unlock(&state_lock);
    return submit(stream, task);
}

API aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
    Task *task = new_task(WAIT);
    task->event = handle;
    task->sequence = task->event->submitted;
    return submit(stream, task);
}

API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
    Task *task = new_task(RESET);
    task->event = handle;
    return submit(stream, task);
}

static int event_done(const void *what) { return ((const Event *)what)->done >= ((const Event *)what)->submitted; }

API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
    pthread_mutex_lock(&state_lock);
    *status = event_done(handle) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

API aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus *status) {
    pthread_mutex_lock(&state_lock);
    *status = event_done(handle) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    pthread_mutex_unlock(&state_lock);
    return ACL_SUCCESS;
}

API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    trace("wait for event");
    pthread_mutex_lock(&state_lock);
    aclError error = run_until(event_done, handle, "synchronising an event");
    pthread_mutex_unlock(&state_lock);
    return error;
}

API aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    const Event *first = start, *last = end;
    *milliseconds = (float)((double)(last->nanoseconds - first->nanoseconds) * 1e-6);
    return ACL_SUCCESS;
}

API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *microseconds) {
    *microseconds = ((Event *)handle)->nanoseconds / 1000;
    return ACL_SUCCESS;
}

/* ---- values in device memory ---- */

static aclError submit_value(int kind, void *address, uint64_t value, uint32_t comparison, aclrtStream stream) {
    Task *task = new_task(kind);
    task->address = address;
    task->value = value;
    task->comparison = comparison;
    return submit(stream, task);
}

API aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    (void)flag;
    return submit_value(VALUE_WRITE, address, value, 0, stream);
}

API aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit_value(VALUE_WAIT, address, value, flag, stream);
}
