/* The older operator interface (aclop), which torch_npu still uses for a few operators, most of them on the 310P.
 *
 * Emulated are "Identity", torch_npu's way to bring a tensor into another format, and "ZerosLike" for tensors in such a
 * format. FRACTAL_NZ keeps the last two dimensions [m, n] as [ceil(n / 16), ceil(m / 16), 16, 16]. Running any other
 * operator is an error that names it. */
#include "emulated.h"

#define TILE 16
#define MAX_DIMS 16

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    int dims;
    int64_t sizes[MAX_DIMS]; /* as the user sees them, whatever the format */
};

struct aclDataBuffer {
    void *data;
    size_t size;
};

API aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *sizes, aclFormat format) {
    aclTensorDesc *descriptor = calloc(1, sizeof *descriptor);
    *descriptor = (aclTensorDesc){.type = type, .format = format, .dims = dims};
    if (dims) memcpy(descriptor->sizes, sizes, dims * sizeof *sizes);
    return descriptor;
}

API void aclDestroyTensorDesc(const aclTensorDesc *descriptor) { free((void *)descriptor); }

API aclError aclSetTensorFormat(aclTensorDesc *descriptor, aclFormat format) {
    descriptor->format = format;
    return ACL_SUCCESS;
}

API aclError aclSetTensorShape(aclTensorDesc *descriptor, int dims, const int64_t *sizes) {
    (void)descriptor, (void)dims, (void)sizes; /* the stored shape follows from the format */
    return ACL_SUCCESS;
}

API void aclSetTensorDescName(aclTensorDesc *descriptor, const char *name) { (void)descriptor, (void)name; }

API aclError aclSetTensorPlaceMent(aclTensorDesc *descriptor, aclMemType type) {
    (void)descriptor, (void)type;
    return ACL_SUCCESS;
}

API aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
    aclDataBuffer *buffer = calloc(1, sizeof *buffer);
    *buffer = (aclDataBuffer){data, size};
    return buffer;
}

API aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    free((void *)buffer);
    return ACL_SUCCESS;
}

/* ---- changing the format ---- */

typedef struct {
    char *from, *to;
    int from_tiles, to_tiles;
    size_t item, matrices, rows, columns;
} Conversion;

static size_t place(const Conversion *c, int tiles, size_t matrix, size_t row, size_t column) {
    if (!tiles) return (matrix * c->rows + row) * c->columns + column;
    size_t down = (c->rows + TILE - 1) / TILE, across = (c->columns + TILE - 1) / TILE;
    size_t tile = (matrix * across + column / TILE) * down + row / TILE;
    return tile * TILE * TILE + row % TILE * TILE + column % TILE;
}

static int run_conversion(void *arg) {
    const Conversion *c = arg;
    for (size_t matrix = 0; matrix < c->matrices; matrix++)
        for (size_t row = 0; row < c->rows; row++)
            for (size_t column = 0; column < c->columns; column++)
                memcpy(c->to + place(c, c->to_tiles, matrix, row, column) * c->item,
                       c->from + place(c, c->from_tiles, matrix, row, column) * c->item, c->item);
    return 0;
}

static aclError change_format(const aclTensorDesc *from, const aclDataBuffer *source, const aclTensorDesc *to,
                              const aclDataBuffer *target, aclrtStream stream) {
    if (from->type != to->type || from->dims < 2)
        return fail(ACL_ERROR_FORMAT_NOT_MATCH, "Identity: dtype %d to %d, %d dimensions", from->type, to->type, from->dims);
    Conversion *c = calloc(1, sizeof *c);
    *c = (Conversion){source->data, target->data, from->format == ACL_FORMAT_FRACTAL_NZ,
                      to->format == ACL_FORMAT_FRACTAL_NZ, 2, 1, from->sizes[from->dims - 2], from->sizes[from->dims - 1]};
    if (from->type != ACL_FLOAT16 && from->type != ACL_BF16) {
        free(c);
        return fail(ACL_ERROR_FORMAT_NOT_MATCH, "Identity: tiles of dtype %d are not emulated", from->type);
    }
    for (int i = 0; i < from->dims - 2; i++) c->matrices *= from->sizes[i];
    if (c->to_tiles) memset(c->to, 0, target->size);
    return submit_work(stream, (Work){"Identity", run_conversion, free, c});
}

static int run_zeros(void *arg) {
    const aclDataBuffer *buffer = arg;
    memset(buffer->data, 0, buffer->size);
    return 0;
}

static aclError zeros(const aclDataBuffer *target, aclrtStream stream) {
    if (memory_kind_of(target->data, target->size, NULL) != MEMORY_DEVICE)
        return fail(ACL_ERROR_RT_PARAM_INVALID, "ZerosLike: %zu bytes at %p are not device memory", target->size, target->data);
    aclDataBuffer *kept = malloc(sizeof *kept);
    *kept = *target;
    return submit_work(stream, (Work){"ZerosLike", run_zeros, free, kept});
}

API aclError aclopCompileAndExecute(const char *operator_type, int inputs, const aclTensorDesc *const input_descriptors[],
                                    const aclDataBuffer *const input_buffers[], int outputs,
                                    const aclTensorDesc *const output_descriptors[],
                                    aclDataBuffer *const output_buffers[], const aclopAttr *attribute,
                                    aclopEngineType engine, aclopCompileType compile, const char *path,
                                    aclrtStream stream) {
    (void)attribute, (void)engine, (void)compile, (void)path;
    if (strcmp(operator_type, "Identity") == 0 && inputs == 1 && outputs == 1)
        return change_format(input_descriptors[0], input_buffers[0], output_descriptors[0], output_buffers[0], stream);
    if (strcmp(operator_type, "ZerosLike") == 0 && outputs == 1) return zeros(output_buffers[0], stream);
    return fail(ACL_ERROR_OP_NOT_FOUND, "the legacy operator %s is not emulated", operator_type);
}

/* ---- attributes: no emulated operator has any ---- */

static char attributes;

API aclopAttr *aclopCreateAttr(void) { return (aclopAttr *)&attributes; }
API void aclopDestroyAttr(const aclopAttr *attribute) { (void)attribute; }

#define ATTRIBUTE(name, ...) \
    API aclError name(aclopAttr *attribute, const char *key, __VA_ARGS__) { (void)attribute, (void)key; return ACL_SUCCESS; }
#pragma GCC diagnostic ignored "-Wunused-parameter"
ATTRIBUTE(aclopSetAttrBool, uint8_t value)
ATTRIBUTE(aclopSetAttrInt, int64_t value)
ATTRIBUTE(aclopSetAttrFloat, float value)
ATTRIBUTE(aclopSetAttrString, const char *value)
ATTRIBUTE(aclopSetAttrDataType, aclDataType value)
ATTRIBUTE(aclopSetAttrListBool, int count, const uint8_t *values)
ATTRIBUTE(aclopSetAttrListInt, int count, const int64_t *values)
ATTRIBUTE(aclopSetAttrListFloat, int count, const float *values)
ATTRIBUTE(aclopSetAttrListListInt, int lists, const int *counts, const int64_t *const values[])
