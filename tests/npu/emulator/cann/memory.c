/* Device and pinned memory: host memory with a budget, poisoned when new, and known by address.
 *
 * Poison (0xCB) makes a read of uninitialised memory visible: as bfloat16 it is about -2.7e7, as int64 a wild index.
 */
#include "emulated.h"
#include <sys/mman.h>

#define POISON 0xCB
#define MAX_DEVICES 16

typedef struct {
    char *address;
    size_t size;
    enum memory_kind kind;
    int device;
} Block;

static Block *blocks; /* sorted by address */
static int block_count, block_capacity;
static size_t used[MAX_DEVICES];
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

static size_t device_size(void) { return (size_t)setting("EMULATED_NPU_MEMORY_MB", 2048) << 20; }

/* Index of the first block that begins behind the address. */
static int block_behind(const void *address) {
    int low = 0, high = block_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (blocks[middle].address > (const char *)address) high = middle; else low = middle + 1;
    }
    return low;
}

static void remember(void *address, size_t size, enum memory_kind kind, int device) {
    if (block_count == block_capacity) {
        block_capacity = block_capacity ? 2 * block_capacity : 256;
        blocks = realloc(blocks, block_capacity * sizeof *blocks);
    }
    int index = block_behind(address);
    memmove(blocks + index + 1, blocks + index, (block_count - index) * sizeof *blocks);
    blocks[index] = (Block){address, size, kind, device};
    block_count++;
}

static int forget(const void *address, Block *block) {
    int index = block_behind(address) - 1;
    if (index < 0 || blocks[index].address != address) return 0;
    *block = blocks[index];
    memmove(blocks + index, blocks + index + 1, (block_count - index - 1) * sizeof *blocks);
    block_count--;
    return 1;
}

enum memory_kind memory_kind_of(const void *address, size_t size, int *device) {
    pthread_mutex_lock(&memory_lock);
    enum memory_kind kind = MEMORY_UNKNOWN;
    int index = block_behind(address) - 1;
    /* Segments mapped side by side are one range: torch_npu's expandable segments grow that way. */
    for (const char *end = (const char *)address + size; index >= 0 && index < block_count; index++) {
        Block *block = &blocks[index];
        if (block->address > (const char *)address && block[-1].address + block[-1].size != block->address) break;
        if (end <= block->address + block->size) {
            if ((const char *)address < block->address + block->size) kind = block->kind;
            if (device) *device = block->device;
            break;
        }
        if ((const char *)address >= block->address + block->size) break;
    }
    pthread_mutex_unlock(&memory_lock);
    return kind;
}

static aclError take(size_t size, int device) {
    if (used[device] + size > device_size())
        return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of memory: %zu bytes asked, %zu of %zu free on device %d", size,
                    device_size() - used[device], device_size(), device);
    used[device] += size;
    return ACL_SUCCESS;
}

API aclError aclrtMalloc(void **address, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    int device = current_device();
    pthread_mutex_lock(&memory_lock);
    aclError error = take(size, device);
    if (!error) {
        *address = aligned_alloc(512, (size + 32 + 511) / 512 * 512);
        memset(*address, POISON, size);
        remember(*address, size, MEMORY_DEVICE, device);
    }
    pthread_mutex_unlock(&memory_lock);
    return error;
}

API aclError aclrtMallocAlign32(void **address, size_t size, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(address, size, policy);
}

API aclError aclrtFree(void *address) {
    Block block;
    pthread_mutex_lock(&memory_lock);
    int known = forget(address, &block);
    if (known) used[block.device] -= block.size;
    pthread_mutex_unlock(&memory_lock);
    if (!known) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p was not allocated", address);
    free(address);
    return ACL_SUCCESS;
}

API aclError aclrtMallocHost(void **address, size_t size) {
    *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    if (!*address) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocHost: %zu bytes", size);
    memset(*address, POISON, size);
    pthread_mutex_lock(&memory_lock);
    remember(*address, size, MEMORY_PINNED, -1);
    pthread_mutex_unlock(&memory_lock);
    return ACL_SUCCESS;
}

API aclError aclrtFreeHost(void *address) {
    Block block;
    pthread_mutex_lock(&memory_lock);
    int known = forget(address, &block);
    pthread_mutex_unlock(&memory_lock);
    if (!known) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: %p was not allocated", address);
    free(address);
    return ACL_SUCCESS;
}

API aclError aclrtPointerGetAttributes(const void *address, aclrtPtrAttributes *attributes) {
    int device = 0;
    enum memory_kind kind = memory_kind_of(address, 1, &device);
    memset(attributes, 0, sizeof *attributes);
    attributes->location.id = kind == MEMORY_DEVICE ? device : 0;
    attributes->location.type = kind == MEMORY_DEVICE   ? ACL_MEM_LOCATION_TYPE_DEVICE
                                : kind == MEMORY_PINNED ? ACL_MEM_LOCATION_TYPE_HOST
                                                        : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return ACL_SUCCESS;
}

API aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *free_bytes, size_t *total) {
    (void)attribute;
    *total = device_size();
    *free_bytes = *total - used[current_device()];
    return ACL_SUCCESS;
}

/* ---- expandable segments: address space first, memory later ---- */

typedef struct {
    size_t size;
    int device;
} Physical;

API aclError aclrtReserveMemAddress(void **address, size_t size, size_t alignment, void *expected, uint64_t flags) {
    (void)alignment, (void)flags;
    *address = mmap(expected, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *address == MAP_FAILED ? fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no address space") : ACL_SUCCESS;
}

API aclError aclrtReleaseMemAddress(void *address) {
    (void)address; /* address space is not scarce, and its size is not told here */
    return ACL_SUCCESS;
}

API aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size, const aclrtPhysicalMemProp *property,
                                 uint64_t flags) {
    (void)flags;
    int device = property ? (int)property->location.id : current_device();
    pthread_mutex_lock(&memory_lock);
    aclError error = take(size, device);
    pthread_mutex_unlock(&memory_lock);
    if (error) return error;
    Physical *physical = malloc(sizeof *physical);
    *physical = (Physical){size, device};
    *handle = (aclrtDrvMemHandle)physical;
    return ACL_SUCCESS;
}

API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    Physical *physical = (Physical *)handle;
    pthread_mutex_lock(&memory_lock);
    used[physical->device] -= physical->size;
    pthread_mutex_unlock(&memory_lock);
    free(physical);
    return ACL_SUCCESS;
}

API aclError aclrtMapMem(void *address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    (void)offset, (void)flags;
    mprotect(address, size, PROT_READ | PROT_WRITE);
    memset(address, POISON, size);
    pthread_mutex_lock(&memory_lock);
    remember(address, size, MEMORY_DEVICE, ((Physical *)handle)->device);
    pthread_mutex_unlock(&memory_lock);
    return ACL_SUCCESS;
}

API aclError aclrtUnmapMem(void *address) {
    Block block;
    pthread_mutex_lock(&memory_lock);
    int known = forget(address, &block);
    pthread_mutex_unlock(&memory_lock);
    if (!known) return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: %p is not mapped", address);
    mmap(address, block.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return ACL_SUCCESS;
}

/* ---- copies ---- */

typedef struct {
    void *to;
    const void *from;
    size_t size;
    int value;
} Copy;

static int check_side(const char *which, const void *address, size_t size, int on_device) {
    enum memory_kind kind = memory_kind_of(address, size, NULL);
    if (on_device && kind != MEMORY_DEVICE)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: %s %p (%zu bytes) is not device memory", which, address, size);
    if (!on_device && kind == MEMORY_DEVICE)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: %s %p is device memory, not host memory", which, address);
    return ACL_SUCCESS;
}

static aclError check_copy(void *to, size_t capacity, const void *from, size_t size, aclrtMemcpyKind kind) {
    if (size > capacity)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: %zu bytes into %zu", size, capacity);
    if (kind == ACL_MEMCPY_DEFAULT || size == 0) return ACL_SUCCESS;
    int to_device = kind != ACL_MEMCPY_DEVICE_TO_HOST && kind != ACL_MEMCPY_HOST_TO_HOST;
    int from_device = kind != ACL_MEMCPY_HOST_TO_DEVICE && kind != ACL_MEMCPY_HOST_TO_HOST &&
                      kind != ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE;
    aclError error = check_side("destination", to, size, to_device);
    return error ? error : check_side("source", from, size, from_device);
}

static int run_copy(void *arg) {
    Copy *copy = arg;
    memmove(copy->to, copy->from, copy->size);
    return 0;
}

static int run_set(void *arg) {
    Copy *copy = arg;
    memset(copy->to, copy->value, copy->size);
    return 0;
}

static aclError submit_copy(const char *name, int (*run)(void *), Copy copy, aclrtStream stream) {
    Copy *kept = malloc(sizeof *kept);
    *kept = copy;
    return submit_work(stream, (Work){name, run, free, kept});
}

API aclError aclrtMemcpy(void *to, size_t capacity, const void *from, size_t size, aclrtMemcpyKind kind) {
    if (capture_active()) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a blocking copy while a stream is being captured");
    aclError error = check_copy(to, capacity, from, size, kind);
    if (!error) memmove(to, from, size);
    return error;
}

/* From pageable memory the bytes are taken at once, as the driver stages them; pinned memory is read when the task runs. */
API aclError aclrtMemcpyAsync(void *to, size_t capacity, const void *from, size_t size, aclrtMemcpyKind kind,
                              aclrtStream stream) {
    aclError error = check_copy(to, capacity, from, size, kind);
    if (error) return error;
    if (kind == ACL_MEMCPY_HOST_TO_DEVICE && memory_kind_of(from, size, NULL) != MEMORY_PINNED) {
        Copy *staged = malloc(sizeof *staged + size);
        memcpy(staged + 1, from, size);
        *staged = (Copy){to, staged + 1, size, 0};
        return submit_work(stream, (Work){"memcpy", run_copy, free, staged});
    }
    return submit_copy("memcpy", run_copy, (Copy){to, from, size, 0}, stream);
}

API aclError aclrtMemcpyAsyncWithCondition(void *to, size_t capacity, const void *from, size_t size,
                                           aclrtMemcpyKind kind, aclrtStream stream) {
    return aclrtMemcpyAsync(to, capacity, from, size, kind, stream);
}

API aclError aclrtMemset(void *address, size_t capacity, int32_t value, size_t size) {
    if (size > capacity) return fail(ACL_ERROR_RT_PARAM_INVALID, "memset: %zu bytes into %zu", size, capacity);
    aclError error = check_side("destination", address, size, 1);
    if (!error) memset(address, value, size);
    return error;
}

API aclError aclrtMemsetAsync(void *address, size_t capacity, int32_t value, size_t size, aclrtStream stream) {
    if (size > capacity) return fail(ACL_ERROR_RT_PARAM_INVALID, "memset: %zu bytes into %zu", size, capacity);
    aclError error = check_side("destination", address, size, 1);
    return error ? error : submit_copy("memset", run_set, (Copy){address, NULL, size, value}, stream);
}

/* For the decoder of operator arguments: 1 if the bytes are in one live piece of device memory. */
API int emulated_is_device_memory(const void *address, size_t size) {
    return memory_kind_of(address, size, NULL) == MEMORY_DEVICE;
}
