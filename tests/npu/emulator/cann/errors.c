/* Error messages and settings. */
#include "emulated.h"

static __thread char message[8192];

aclError fail(aclError code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    size_t used = snprintf(message, sizeof message, "[emulated Ascend] ");
    vsnprintf(message + used, sizeof message - used, format, arguments);
    va_end(arguments);
    if (setting("EMULATED_NPU_VERBOSE", 0)) fprintf(stderr, "error %d: %s\n", code, message);
    return code;
}

API const char *aclGetRecentErrMsg() { return message; }

const char *setting_text(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value && *value ? strtol(value, NULL, 0) : otherwise;
}
