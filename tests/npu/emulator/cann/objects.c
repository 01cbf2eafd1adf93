/* The host-side objects operators take: tensors, scalars, arrays and lists. kernels/decode.py reads these structs. */
#include "emulated.h"

#define MAX_DIMS 16
enum object_kind { TENSOR = 0x7E450001, SCALAR, INT_ARRAY, FLOAT_ARRAY, BOOL_ARRAY, TENSOR_LIST, SCALAR_LIST, DEAD };

typedef struct {
    uint32_t object, dtype, format;
    uint32_t dims;
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
    int64_t offset; /* elements */
    uint32_t storage_dims;
    int64_t storage_sizes[MAX_DIMS];
    void *data;
} Tensor;

typedef struct {
    uint32_t object, dtype;
    char bytes[16];
} Scalar;

typedef struct {
    uint32_t object, unused;
    uint64_t count;
    char items[]; /* int64, float, bool or pointers */
} Array;

API void *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType dtype, const int64_t *strides, int64_t offset,
                          aclFormat format, const int64_t *storage_sizes, uint64_t storage_dims, void *data) {
    if (dims > MAX_DIMS || storage_dims > MAX_DIMS) return NULL;
    Tensor *tensor = calloc(1, sizeof *tensor);
    tensor->object = TENSOR;
    tensor->dtype = dtype;
    tensor->format = format;
    tensor->dims = dims;
    tensor->offset = offset;
    tensor->storage_dims = storage_dims;
    tensor->data = data;
    memcpy(tensor->sizes, sizes, dims * sizeof *sizes);
    memcpy(tensor->strides, strides, dims * sizeof *strides);
    memcpy(tensor->storage_sizes, storage_sizes, storage_dims * sizeof *storage_sizes);
    return tensor;
}

static size_t scalar_size(aclDataType dtype) {
    switch (dtype) {
        case ACL_BOOL: case ACL_INT8: case ACL_UINT8: return 1;
        case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: return 2;
        case ACL_FLOAT: case ACL_INT32: return 4;
        case ACL_COMPLEX128: return 16;
        default: return 8;
    }
}

API void *aclCreateScalar(void *value, aclDataType dtype) {
    Scalar *scalar = calloc(1, sizeof *scalar);
    scalar->object = SCALAR;
    scalar->dtype = dtype;
    memcpy(scalar->bytes, value, scalar_size(dtype));
    return scalar;
}

static void *new_array(uint32_t object, const void *items, uint64_t count, size_t item) {
    Array *array = calloc(1, sizeof *array + count * item);
    array->object = object;
    array->count = count;
    if (count) memcpy(array->items, items, count * item);
    return array;
}

API void *aclCreateIntArray(const int64_t *items, uint64_t count) { return new_array(INT_ARRAY, items, count, 8); }
API void *aclCreateFloatArray(const float *items, uint64_t count) { return new_array(FLOAT_ARRAY, items, count, 4); }
API void *aclCreateBoolArray(const char *items, uint64_t count) { return new_array(BOOL_ARRAY, items, count, 1); }
API void *aclCreateTensorList(const void *const *items, uint64_t count) { return new_array(TENSOR_LIST, items, count, 8); }
API void *aclCreateScalarList(const void *const *items, uint64_t count) { return new_array(SCALAR_LIST, items, count, 8); }

static aclError destroy(uint32_t *object) {
    if (!object) return ACL_SUCCESS;
    *object = DEAD;
    free(object);
    return ACL_SUCCESS;
}

API aclError aclDestroyTensor(void *object) { return destroy(object); }
API aclError aclDestroyScalar(void *object) { return destroy(object); }
API aclError aclDestroyIntArray(void *object) { return destroy(object); }
API aclError aclDestroyFloatArray(void *object) { return destroy(object); }
API aclError aclDestroyBoolArray(void *object) { return destroy(object); }

static aclError destroy_list(Array *list) {
    if (!list) return ACL_SUCCESS;
    for (uint64_t i = 0; i < list->count; i++) destroy(((uint32_t **)list->items)[i]);
    return destroy(&list->object);
}

API aclError aclDestroyTensorList(void *list) { return destroy_list(list); }
API aclError aclDestroyScalarList(void *list) { return destroy_list(list); }

API aclError aclGetViewShape(const Tensor *tensor, int64_t **sizes, uint64_t *dims) {
    *dims = tensor->dims;
    *sizes = malloc(tensor->dims * sizeof **sizes); /* the caller frees it */
    memcpy(*sizes, tensor->sizes, tensor->dims * sizeof **sizes);
    return ACL_SUCCESS;
}
