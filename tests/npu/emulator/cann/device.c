/* Devices: which product is emulated, how many there are, and what they say of themselves. */
#include "emulated.h"

static __thread int device_of_thread;

int current_device(void) { return device_of_thread; }

static const char *soc(void) { return setting_text("EMULATED_NPU_SOC", "Ascend910B2"); }
static const char *cann_version(void) { return setting_text("EMULATED_NPU_CANN", "9.1.0"); }
int is_310p(void) { return strncmp(soc(), "Ascend310P", 10) == 0; }

static int device_count(void) {
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int count = (int)setting("EMULATED_NPU_DEVICES", 2);
    if (!visible) return count;
    int listed = *visible != 0;
    for (; *visible; visible++) listed += *visible == ',';
    return listed < count ? listed : count;
}

API aclError aclInit(const char *configuration) {
    (void)configuration;
    start_kernels();
    return ACL_SUCCESS;
}

API aclError aclFinalize(void) { return ACL_SUCCESS; }
API const char *aclrtGetSocName(void) { return soc(); }

API aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = device_count();
    return ACL_SUCCESS;
}

API aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= device_count())
        return fail(ACL_ERROR_RT_INVALID_DEVICEID, "device %d of %d", device, device_count());
    device_of_thread = device;
    return ACL_SUCCESS;
}

API aclError aclrtGetDevice(int32_t *device) {
    *device = device_of_thread;
    return ACL_SUCCESS;
}

API aclError aclrtResetDevice(int32_t device) { (void)device; return ACL_SUCCESS; }

/* A context stands for a device: its handle is the number plus one. */
API aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = (aclrtContext)(intptr_t)(device_of_thread + 1);
    return ACL_SUCCESS;
}

API aclError aclrtSetCurrentContext(aclrtContext context) { return aclrtSetDevice((int)(intptr_t)context - 1); }

API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}

API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return ACL_SUCCESS;
}

API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { (void)peer, (void)flags; return ACL_SUCCESS; }

API aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = 0; return ACL_SUCCESS; }

static int64_t core_count(int vector) { return is_310p() ? 8 : vector ? 48 : 24; }

API aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value) {
    (void)device;
    *value = info == ACL_DEVICE_INFO_L2_SIZE ? 192 << 20 : core_count(info == ACL_DEVICE_INFO_VECTOR_CORE_NUM);
    return ACL_SUCCESS;
}

API aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t *value) {
    (void)device;
    switch (attribute) {
        case ACL_DEV_ATTR_AICORE_CORE_NUM:
        case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = core_count(0); break;
        case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = core_count(1); break;
        case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = 192 << 20; break;
        case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = setting("EMULATED_NPU_MEMORY_MB", 2048) << 20; break;
        case ACL_DEV_ATTR_IS_VIRTUAL: *value = 0; break;
        default: return fail(ACL_ERROR_FEATURE_UNSUPPORTED, "device attribute %d", attribute);
    }
    return ACL_SUCCESS;
}

API aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) {
    (void)device;
    *value = core_count(type == ACL_RT_DEV_RES_VECTOR_CORE);
    return ACL_SUCCESS;
}

API aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) {
    (void)stream;
    return aclrtGetDeviceResLimit(0, type, value);
}

API aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t *value) {
    return aclrtGetDeviceResLimit(0, type, value);
}

/* ---- versions ---- */

API aclError aclsysGetVersionStr(char *package, char *version) {
    (void)package;
    strcpy(version, cann_version());
    return ACL_SUCCESS;
}

API aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
    (void)name;
    memset(version, 0, sizeof *version);
    strcpy(version->version, cann_version());
    int major = 0, minor = 0, patch = 0;
    sscanf(cann_version(), "%d.%d.%d", &major, &minor, &patch);
    snprintf(version->majorVersion, sizeof version->majorVersion, "%d", major);
    snprintf(version->minorVersion, sizeof version->minorVersion, "%d", minor);
    snprintf(version->releaseVersion, sizeof version->releaseVersion, "%d", patch);
    strcpy(version->patchVersion, "0");
    return ACL_SUCCESS;
}

/* ---- what a product can do, and options ---- */

static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};

API aclError aclGetCannAttributeList(const aclCannAttr **list, size_t *count) {
    *list = attributes;
    *count = 3;
    return ACL_SUCCESS;
}

API aclError aclGetCannAttribute(aclCannAttr attribute, int32_t *value) {
    *value = attribute == ACL_CANN_ATTR_JIT_COMPILE ? 1 : !is_310p();
    return ACL_SUCCESS;
}

static char compile_options[64][64];

API aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
    if ((unsigned)option < 64) snprintf(compile_options[option], 64, "%s", value);
    return ACL_SUCCESS;
}

API size_t aclGetCompileoptSize(aclCompileOpt option) { (void)option; return 64; }

API aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    const char *set = (unsigned)option < 64 && *compile_options[option] ? compile_options[option] : "disable";
    snprintf(value, length, "%s", set);
    return ACL_SUCCESS;
}

/* Settings whose effect (overflow handling, timeouts, determinism, logging) the emulation has no use for. */
API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return ACL_SUCCESS; }
API aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { (void)stream, (void)mode; return ACL_SUCCESS; }
API aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute, aclrtStreamAttrValue *value) {
    (void)stream, (void)attribute, (void)value;
    return ACL_SUCCESS;
}
API aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { (void)stream, (void)flag; return ACL_SUCCESS; }
API aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) { (void)stream; *flag = 0; return ACL_SUCCESS; }
API aclError aclrtSetOpWaitTimeout(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
API aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { (void)seconds; return ACL_SUCCESS; }
API aclError aclrtSetOpExecuteTimeOutV2(uint64_t asked, uint64_t *given) { *given = asked; return ACL_SUCCESS; }
API aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option, (void)value; return ACL_SUCCESS; }
API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option, (void)value; return ACL_SUCCESS; }
API aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { (void)option; *value = 0; return ACL_SUCCESS; }
API aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { (void)level; return ACL_SUCCESS; }
API aclError aclrtGetLastError(aclrtLastErrLevel level) { (void)level; return ACL_SUCCESS; }
API aclError aclmdlInitDump(void) { return ACL_SUCCESS; }
API aclError aclmdlFinalizeDump(void) { return ACL_SUCCESS; }
API void aclAppLog(aclLogLevel level, const char *function, const char *file, uint32_t line, const char *format, ...) {
    (void)level, (void)function, (void)file, (void)line, (void)format;
}
