/* The profiler's hooks, which torch_npu calls around every operator: accepted, never reporting anything. */
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

API int32_t MsprofRegisterCallback(uint32_t module, void *callback) { (void)module, (void)callback; return 0; }
API int32_t MsprofReportApi(uint32_t aging, const void *api) { (void)aging, (void)api; return 0; }
API int32_t MsprofReportCompactInfo(uint32_t aging, const void *data, uint32_t size) { (void)aging, (void)data, (void)size; return 0; }
API int32_t MsprofReportAdditionalInfo(uint32_t aging, const void *data, uint32_t size) { (void)aging, (void)data, (void)size; return 0; }
API uint64_t MsprofGetHashId(const char *text, size_t size) { (void)text, (void)size; return 0; }
API uint64_t MsprofSysCycleTime(void) { return 0; }
