/* Collective communication of ranks on one machine, through shared memory.
 *
 * Every collective is a task on its stream: in pieces, all ranks publish their data, wait for each other, take what they
 * need, and wait again before the next piece. Sums run over ranks in order, in float32 for the narrow formats, so all
 * ranks get the same bits. A rank whose peers do not come gives up after HCCL_EXEC_TIMEOUT seconds and names itself.
 */
#include "emulated.h"
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PIECE (1 << 20)
#define MAX_RANKS 8

/* hccl_types.h is C++ (arrays sized by constants), so here is what is used of it. */
typedef enum { HCCL_SUCCESS, HCCL_E_PARA, HCCL_E_MEMORY = 3, HCCL_E_SYSCALL = 8, HCCL_E_TIMEOUT, HCCL_E_RUNTIME = 15 } HcclResult;
typedef enum { HCCL_REDUCE_SUM, HCCL_REDUCE_PROD, HCCL_REDUCE_MAX, HCCL_REDUCE_MIN } HcclReduceOp;
typedef enum {
    HCCL_DATA_TYPE_INT8, HCCL_DATA_TYPE_INT16, HCCL_DATA_TYPE_INT32, HCCL_DATA_TYPE_FP16, HCCL_DATA_TYPE_FP32,
    HCCL_DATA_TYPE_INT64, HCCL_DATA_TYPE_UINT64, HCCL_DATA_TYPE_UINT8, HCCL_DATA_TYPE_UINT16, HCCL_DATA_TYPE_UINT32,
    HCCL_DATA_TYPE_FP64, HCCL_DATA_TYPE_BFP16,
} HcclDataType;
typedef void *HcclComm;
typedef struct { char internal[4108]; } HcclRootInfo;
typedef struct {
    char reserved[24];
    uint32_t buffer_size, deterministic;
    char name[128]; /* and more behind it */
} HcclCommConfig;

typedef struct {
    _Atomic uint32_t arrived, round;
    uint32_t signature[MAX_RANKS][2]; /* operation and bytes of each rank, which must agree */
    char data[MAX_RANKS][PIECE];
} Shared;

typedef struct {
    char name[128];
    uint32_t ranks, rank;
    Shared *shared;
} Communicator;

enum operation { ALL_REDUCE = 1, ALL_GATHER, BROADCAST, REDUCE_SCATTER, ALL_TO_ALL };

typedef struct {
    enum operation operation;
    Communicator *communicator;
    char *send, *receive;
    uint64_t count; /* elements per rank */
    HcclDataType type;
    HcclReduceOp reduction;
    uint32_t root;
} Collective;

static double seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + time.tv_nsec * 1e-9;
}

static int wait_for_all(Communicator *communicator) {
    Shared *shared = communicator->shared;
    uint32_t round = atomic_load(&shared->round);
    if (atomic_fetch_add(&shared->arrived, 1) + 1 == communicator->ranks) {
        atomic_store(&shared->arrived, 0);
        atomic_fetch_add(&shared->round, 1);
        return 0;
    }
    double end = seconds() + setting("HCCL_EXEC_TIMEOUT", 120);
    while (atomic_load(&shared->round) == round) {
        if (seconds() > end)
            return fail(ACL_ERROR_RT_TASK_TIMEOUT, "HCCL: rank %u of %u waited %ld seconds for the others",
                        communicator->rank, communicator->ranks, setting("HCCL_EXEC_TIMEOUT", 120));
        usleep(20);
    }
    return 0;
}

/* ---- arithmetic ---- */

static size_t size_of(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
        default: return 4;
    }
}

static double load(HcclDataType type, const void *at) {
    switch (type) {
        case HCCL_DATA_TYPE_FP32: return *(const float *)at;
        case HCCL_DATA_TYPE_FP16: return (double)*(const _Float16 *)at;
        case HCCL_DATA_TYPE_FP64: return *(const double *)at;
        case HCCL_DATA_TYPE_BFP16: {
            uint32_t bits = (uint32_t) * (const uint16_t *)at << 16;
            float value;
            memcpy(&value, &bits, 4);
            return value;
        }
        case HCCL_DATA_TYPE_INT8: return *(const int8_t *)at;
        case HCCL_DATA_TYPE_UINT8: return *(const uint8_t *)at;
        case HCCL_DATA_TYPE_INT16: return *(const int16_t *)at;
        case HCCL_DATA_TYPE_INT32: return *(const int32_t *)at;
        case HCCL_DATA_TYPE_INT64: return (double)*(const int64_t *)at;
        default: return 0;
    }
}

static void store(HcclDataType type, void *at, double value) {
    switch (type) {
        case HCCL_DATA_TYPE_FP32: *(float *)at = (float)value; break;
        case HCCL_DATA_TYPE_FP16: *(_Float16 *)at = (_Float16)value; break;
        case HCCL_DATA_TYPE_FP64: *(double *)at = value; break;
        case HCCL_DATA_TYPE_BFP16: {
            float narrow = (float)value;
            uint32_t bits;
            memcpy(&bits, &narrow, 4);
            *(uint16_t *)at = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
            break;
        }
        case HCCL_DATA_TYPE_INT8: *(int8_t *)at = (int8_t)value; break;
        case HCCL_DATA_TYPE_UINT8: *(uint8_t *)at = (uint8_t)value; break;
        case HCCL_DATA_TYPE_INT16: *(int16_t *)at = (int16_t)value; break;
        case HCCL_DATA_TYPE_INT32: *(int32_t *)at = (int32_t)value; break;
        case HCCL_DATA_TYPE_INT64: *(int64_t *)at = (int64_t)value; break;
        default: break;
    }
}

/* out[i] = the reduction over ranks of data[rank][from + i * size] */
static void reduce(const Collective *call, char *out, size_t from, size_t bytes) {
    size_t size = size_of(call->type);
    Communicator *communicator = call->communicator;
    for (size_t at = 0; at < bytes; at += size) {
        double total = load(call->type, communicator->shared->data[0] + from + at);
        for (uint32_t rank = 1; rank < communicator->ranks; rank++) {
            double next = load(call->type, communicator->shared->data[rank] + from + at);
            switch (call->reduction) {
                case HCCL_REDUCE_SUM: total += next; break;
                case HCCL_REDUCE_PROD: total *= next; break;
                case HCCL_REDUCE_MAX: total = next > total ? next : total; break;
                default: total = next < total ? next : total; break;
            }
        }
        store(call->type, out + at, total);
    }
}

/* ---- the collectives ---- */

/* One piece: `length` bytes at `offset` of every rank's part; `part` is the size of a rank's part. */
static int exchange(const Collective *call, size_t offset, size_t length, size_t part) {
    Communicator *communicator = call->communicator;
    Shared *shared = communicator->shared;
    uint32_t ranks = communicator->ranks, rank = communicator->rank;
    int split = call->operation == REDUCE_SCATTER || call->operation == ALL_TO_ALL; /* a part for every rank */
    for (uint32_t to = 0; to < (split ? ranks : 1); to++)
        if (call->operation != BROADCAST || rank == call->root)
            memcpy(shared->data[rank] + to * length, call->send + to * part + offset, length);
    shared->signature[rank][0] = call->operation;
    shared->signature[rank][1] = (uint32_t)length;
    int error = wait_for_all(communicator);
    if (error) return error;
    for (uint32_t other = 0; other < ranks; other++)
        if (memcmp(shared->signature[other], shared->signature[rank], sizeof shared->signature[rank]))
            return fail(ACL_ERROR_RT_PARAM_INVALID, "HCCL: rank %u does operation %u of %u bytes, rank %u %u of %u", rank,
                        shared->signature[rank][0], shared->signature[rank][1], other, shared->signature[other][0],
                        shared->signature[other][1]);
    switch (call->operation) {
        case ALL_REDUCE: reduce(call, call->receive + offset, 0, length); break;
        case REDUCE_SCATTER: reduce(call, call->receive + offset, rank * length, length); break;
        case BROADCAST: memcpy(call->receive + offset, shared->data[call->root], length); break;
        case ALL_GATHER:
            for (uint32_t from = 0; from < ranks; from++)
                memcpy(call->receive + from * part + offset, shared->data[from], length);
            break;
        case ALL_TO_ALL:
            for (uint32_t from = 0; from < ranks; from++)
                memcpy(call->receive + from * part + offset, shared->data[from] + rank * length, length);
            break;
    }
    return wait_for_all(communicator);
}

static int run_collective(void *arg) {
    const Collective *call = arg;
    size_t part = call->count * size_of(call->type);
    size_t piece = PIECE / call->communicator->ranks / 8 * 8;
    for (size_t offset = 0; offset < part; offset += piece) {
        int error = exchange(call, offset, part - offset < piece ? part - offset : piece, part);
        if (error) return error;
    }
    return 0;
}

static HcclResult start(const char *name, Collective call, aclrtStream stream) {
    Collective *kept = malloc(sizeof *kept);
    *kept = call;
    return submit_work(stream, (Work){name, run_collective, free, kept}) ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}

API HcclResult HcclAllReduce(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                             HcclComm comm, aclrtStream stream) {
    return start("HcclAllReduce", (Collective){ALL_REDUCE, comm, send, receive, count, type, reduction, 0}, stream);
}

API HcclResult HcclAllGather(void *send, void *receive, uint64_t count, HcclDataType type, HcclComm comm,
                             aclrtStream stream) {
    return start("HcclAllGather", (Collective){ALL_GATHER, comm, send, receive, count, type, 0, 0}, stream);
}

API HcclResult HcclReduceScatter(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp reduction,
                                 HcclComm comm, aclrtStream stream) {
    return start("HcclReduceScatter", (Collective){REDUCE_SCATTER, comm, send, receive, count, type, reduction, 0}, stream);
}

API HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                             aclrtStream stream) {
    return start("HcclBroadcast", (Collective){BROADCAST, comm, buffer, buffer, count, type, 0, root}, stream);
}

API HcclResult HcclAlltoAll(const void *send, uint64_t send_count, HcclDataType send_type, const void *receive,
                            uint64_t receive_count, HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
    (void)receive_count, (void)receive_type;
    Collective call = {ALL_TO_ALL, comm, (char *)send, (char *)receive, send_count, send_type, 0, 0};
    return start("HcclAlltoAll", call, stream);
}

/* ---- communicators ---- */

API HcclResult HcclGetRootInfo(HcclRootInfo *info) {
    static int number;
    memset(info, 0, sizeof *info);
    snprintf(info->internal, sizeof info->internal, "/emulated-hccl-%d-%d", getpid(), number++);
    return HCCL_SUCCESS;
}

API HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *info, uint32_t rank,
                                          const HcclCommConfig *configuration, HcclComm *result) {
    if (ranks > MAX_RANKS || rank >= ranks) return HCCL_E_PARA;
    int file = shm_open(info->internal, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return HCCL_E_SYSCALL;
    Communicator *communicator = calloc(1, sizeof *communicator);
    communicator->shared = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (communicator->shared == MAP_FAILED) return HCCL_E_MEMORY;
    communicator->ranks = ranks;
    communicator->rank = rank;
    const char *name = configuration && *configuration->name ? configuration->name : info->internal;
    snprintf(communicator->name, sizeof communicator->name, "%s", name);
    *result = communicator;
    if (wait_for_all(communicator)) return HCCL_E_TIMEOUT;
    shm_unlink(info->internal); /* everybody has it; nothing is left behind */
    return HCCL_SUCCESS;
}

API HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *info, uint32_t rank, HcclComm *result) {
    return HcclCommInitRootInfoConfig(ranks, info, rank, NULL, result);
}

API HcclResult HcclCommDestroy(HcclComm comm) {
    Communicator *communicator = comm;
    munmap(communicator->shared, sizeof(Shared));
    free(communicator);
    return HCCL_SUCCESS;
}

API HcclResult HcclGetCommName(HcclComm comm, char *name) {
    strcpy(name, ((Communicator *)comm)->name);
    return HCCL_SUCCESS;
}

API HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *error) {
    (void)comm;
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

API HcclResult HcclSetConfig(int option, int value) {
    (void)option, (void)value; /* results are deterministic anyway */
    return HCCL_SUCCESS;
}

API uint32_t HcclGetCommConfigCapability(void) { return 4; /* capabilities 0 to 3: sizes, determinism, names */ }
