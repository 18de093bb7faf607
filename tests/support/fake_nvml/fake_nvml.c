/* An NVML that answers from a text file, so that a test can lose a GPU or load a process while the daemon runs.
 *
 * The file is named by FAKE_NVML_STATE and read anew at every call. A line is "key value"; keys of a device begin with
 * "gpu<index>." and of a MIG instance with "gpu<index>.mig<place>.". A reading whose key is missing is NOT_SUPPORTED.
 *
 *   init 9                      nvmlInit answers 9 (DRIVER_NOT_LOADED)
 *   generation 2                the driver was reloaded: whoever initialised under another number gets 999
 *   count 5                     overrides the number of devices
 *   block_ms 3000               every call takes that long
 *   gpu0.error 15               every call on the device answers 15 (GPU_IS_LOST)
 *   gpu0.block_ms 3000          every call on the device takes that long
 *   gpu0.fail.<function> 4      that call on the device answers 4
 *   gpu0.xid 3 79               event number 3: Xid 79; each number is delivered once
 *   gpu0.process 4711 1048576   a process with a context
 *   gpu0.sample 1700000000000000 4711 40   at that microsecond the driver noted 40 % for process 4711 (0: nobody)
 *   dead 4711                   the process has ended
 *
 * Samples are served as driver 580 serves them: the newest 72; per process the mean over all samples asked for, rounded
 * up, with the time of its last one; none of processes that have ended.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NOT_SUPPORTED 3
#define BUFFER 72

typedef unsigned long long u64;
typedef int ret;
typedef void *dev; /* 1 + 64 * (number of the UUID), plus 1 + place for an instance: it stays with the device */

static int initialised_under = -1;

static char *state(void) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char *text = calloc(1, 1 << 20);
    if (file) {
        size_t got = fread(text, 1, (1 << 20) - 1, file);
        text[got] = 0;
        fclose(file);
    }
    return text;
}

/* The nth value of key, or 0. */
static int find(const char *text, const char *key, int nth, char *value, size_t room) {
    size_t length = strlen(key);
    for (const char *line = text; line && *line; line = strchr(line, '\n'), line += line ? 1 : 0) {
        if (strncmp(line, key, length) || line[length] != ' ' || nth--) continue;
        const char *end = strchr(line, '\n');
        size_t size = end ? (size_t)(end - line) - length - 1 : strlen(line) - length - 1;
        if (size >= room) size = room - 1;
        memcpy(value, line + length + 1, size);
        value[size] = 0;
        return 1;
    }
    return 0;
}

static int text_of(const char *key, int nth, char *value, size_t room) {
    char *text = state();
    int found = find(text, key, nth, value, room);
    free(text);
    return found;
}

static long number(const char *key, long otherwise) {
    char value[64];
    return text_of(key, 0, value, sizeof value) ? atol(value) : otherwise;
}

static char seen[64][96]; /* UUIDs by their number */

static dev handle_of(const char *uuid) {
    size_t number = 0;
    while (number < 63 && seen[number][0] && strcmp(seen[number], uuid)) number++;
    snprintf(seen[number], sizeof seen[number], "%s", uuid);
    return (dev)(1 + 64 * number);
}

/* Where the device is now, -1 if nowhere. */
static int gpu_of(dev d) {
    char key[64], value[96];
    const char *uuid = seen[((size_t)d - 1) / 64];
    for (int gpu = 0; sprintf(key, "gpu%d.uuid", gpu), text_of(key, 0, value, sizeof value); gpu++)
        if (!strcmp(value, uuid)) return gpu;
    return -1;
}
static int place_of(dev d) { return (int)(((size_t)d - 1) % 64) - 1; }

static const char *key_of(dev d, const char *name, char *key) {
    if (place_of(d) >= 0) sprintf(key, "gpu%d.mig%d.%s", gpu_of(d), place_of(d), name);
    else sprintf(key, "gpu%d.%s", gpu_of(d), name);
    return key;
}

static ret ready(void) {
    long block = number("block_ms", 0);
    if (block) usleep((useconds_t)block * 1000);
    if (initialised_under < 0) return 1;
    if (initialised_under != number("generation", 0)) return 999;
    return 0;
}

static ret entered(dev d, const char *function) {
    char key[160], name[128];
    ret code = ready();
    if (code) return code;
    if (gpu_of(d) < 0) return 2;
    sprintf(key, "gpu%d.block_ms", gpu_of(d));
    long block = number(key, 0);
    if (block) usleep((useconds_t)block * 1000);
    sprintf(key, "gpu%d.error", gpu_of(d));
    if ((code = (ret)number(key, 0))) return code;
    sprintf(name, "fail.%s", function);
    return (ret)number(key_of(d, name, key), 0);
}

static ret number_of(dev d, const char *function, const char *name, long *value) {
    char key[160], text[64];
    ret code = entered(d, function);
    if (code) return code;
    if (!text_of(key_of(d, name, key), 0, text, sizeof text)) return NOT_SUPPORTED;
    *value = atol(text);
    return 0;
}

static ret string_of(dev d, const char *function, const char *name, char *value, unsigned room) {
    char key[160];
    ret code = entered(d, function);
    if (code) return code;
    return text_of(key_of(d, name, key), 0, value, room) ? 0 : NOT_SUPPORTED;
}

#define READING(function, name, type)                                  \
    ret function(dev d, type *value) {                                 \
        long found;                                                    \
        ret code = number_of(d, #function, name, &found);              \
        if (!code) *value = (type)found;                               \
        return code;                                                   \
    }
#define READING2(function, name)                                       \
    ret function(dev d, unsigned *current, unsigned *other) {          \
        long found;                                                    \
        ret code = number_of(d, #function, name, &found);              \
        if (!code) *current = *other = (unsigned)found;                \
        return code;                                                   \
    }

/* -- the library ---------------------------------------------------------------------------------------------------- */

ret nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ret code = (ret)number("init", 0);
    if (!code) initialised_under = (int)number("generation", 0);
    return code;
}
ret nvmlShutdown(void) {
    initialised_under = -1;
    return 0;
}
const char *nvmlErrorString(ret code) { return code == 999 ? "Unknown Error" : "an error of the fake"; }
static ret version(const char *key, char *value, unsigned room) {
    ret code = ready();
    if (!code && !text_of(key, 0, value, room)) snprintf(value, room, "580.0");
    return code;
}
ret nvmlSystemGetDriverVersion(char *value, unsigned room) { return version("driver", value, room); }
ret nvmlSystemGetNVMLVersion(char *value, unsigned room) { return version("nvml", value, room); }
ret nvmlSystemGetCudaDriverVersion_v2(int *value) {
    ret code = ready();
    *value = (int)number("cuda", 13000);
    return code;
}
ret nvmlDeviceGetCount_v2(unsigned *count) {
    char key[64], value[64];
    ret code = ready();
    unsigned found = 0;
    while (sprintf(key, "gpu%u.uuid", found), text_of(key, 0, value, sizeof value)) found++;
    *count = (unsigned)number("count", (long)found);
    return code;
}
ret nvmlDeviceGetHandleByIndex_v2(unsigned index, dev *d) {
    char key[64], value[96];
    ret code = ready();
    if (code) return code;
    sprintf(key, "gpu%u.uuid", index);
    if (!text_of(key, 0, value, sizeof value)) return 2;
    *d = handle_of(value);
    return entered(*d, "nvmlDeviceGetHandleByIndex_v2");
}
ret nvmlDeviceGetHandleByUUID(const char *uuid, dev *d) {
    char key[64], value[96];
    ret code = ready();
    if (code) return code;
    for (int gpu = 0; sprintf(key, "gpu%d.uuid", gpu), text_of(key, 0, value, sizeof value); gpu++) {
        *d = handle_of(value);
        if (!strcmp(value, uuid)) return 0;
        for (int place = 0; place < 8; place++) {
            *d = (dev)((size_t)handle_of(value) + 1 + (size_t)place);
            char instance[96];
            if (text_of(key_of(*d, "uuid", key), 0, instance, sizeof instance) && !strcmp(instance, uuid)) return 0;
        }
    }
    return 6;
}

/* -- readings ------------------------------------------------------------------------------------------------------- */

ret nvmlDeviceGetUUID(dev d, char *value, unsigned room) { return string_of(d, "nvmlDeviceGetUUID", "uuid", value, room); }
ret nvmlDeviceGetName(dev d, char *value, unsigned room) { return string_of(d, "nvmlDeviceGetName", "name", value, room); }
READING(nvmlDeviceGetMinorNumber, "minor", unsigned)
READING(nvmlDeviceGetEnforcedPowerLimit, "power_limit_mw", unsigned)
READING(nvmlDeviceGetCurrPcieLinkGeneration, "pcie_generation", unsigned)
READING(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_generation", unsigned)
READING(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width", unsigned)
READING(nvmlDeviceGetMaxPcieLinkWidth, "pcie_width", unsigned)
READING(nvmlDeviceGetPersistenceMode, "persistence", int)
READING(nvmlDeviceGetDisplayActive, "display", int)
READING(nvmlDeviceGetDisplayMode, "display_attached", int)
READING(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pages_pending", int)
READING(nvmlDeviceGetCurrentClocksEventReasons, "clocks_event_reasons", u64)
READING(nvmlDeviceGetMaxMigDeviceCount, "mig_places", unsigned)
READING(nvmlDeviceGetGpuInstanceId, "gpu_instance", unsigned)
READING(nvmlDeviceGetComputeInstanceId, "compute_instance", unsigned)
READING2(nvmlDeviceGetMigMode, "mig")
READING2(nvmlDeviceGetEccMode, "ecc")
#define WITH(function, name, type)                                     \
    ret function(dev d, int which, type *value) {                      \
        long found;                                                    \
        (void)which;                                                   \
        ret code = number_of(d, #function, name, &found);              \
        if (!code) *value = (type)found;                               \
        return code;                                                   \
    }
WITH(nvmlDeviceGetTemperature, "temperature", unsigned)
WITH(nvmlDeviceGetTemperatureThreshold, "slowdown_temperature", unsigned)
WITH(nvmlDeviceGetMaxClockInfo, "max_clock", unsigned)
WITH(nvmlDeviceGetClockInfo, "clock", unsigned)
ret nvmlDeviceGetNvLinkState(dev d, unsigned link, int *up) {
    long found;
    ret code = number_of(d, "nvmlDeviceGetNvLinkState", "nvlinks", &found);
    if (!code && link >= 18) return 2;
    *up = !code && (long)link < found;
    return code;
}
ret nvmlDeviceGetCudaComputeCapability(dev d, int *major, int *minor) {
    char text[64];
    ret code = string_of(d, "nvmlDeviceGetCudaComputeCapability", "compute_capability", text, sizeof text);
    return code ? code : sscanf(text, "%d.%d", major, minor) == 2 ? 0 : 999;
}
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
ret nvmlDeviceGetPciInfo_v3(dev d, struct pci *info) {
    memset(info, 0, sizeof *info);
    return string_of(d, "nvmlDeviceGetPciInfo_v3", "pci", info->bus_id, sizeof info->bus_id);
}
struct memory2 { unsigned version; u64 total, reserved, free, used; };
ret nvmlDeviceGetMemoryInfo_v2(dev d, struct memory2 *info) {
    long total = 0, used = 0;
    ret code = number_of(d, "nvmlDeviceGetMemoryInfo_v2", "memory_total", &total);
    if (code) return code;
    (void)number_of(d, "nvmlDeviceGetMemoryInfo_v2", "memory_used", &used);
    info->total = (u64)total, info->used = (u64)used, info->free = (u64)(total - used), info->reserved = 0;
    return 0;
}
ret nvmlDeviceGetTotalEccErrors(dev d, int kind, int counter, u64 *value) {
    long found;
    (void)kind, (void)counter;
    ret code = number_of(d, "nvmlDeviceGetTotalEccErrors", "ecc_uncorrected", &found);
    if (!code) *value = (u64)found;
    return code;
}
ret nvmlDeviceGetRemappedRows(dev d, unsigned *c, unsigned *u, unsigned *pending, unsigned *failed) {
    long found;
    ret code = number_of(d, "nvmlDeviceGetRemappedRows", "rows_pending", &found);
    if (code) return code;
    *c = *u = 0, *pending = (unsigned)found, *failed = 0;
    if (!number_of(d, "nvmlDeviceGetRemappedRows", "rows_failed", &found)) *failed = (unsigned)found;
    return 0;
}

/* -- MIG ------------------------------------------------------------------------------------------------------------ */

ret nvmlDeviceGetMigDeviceHandleByIndex(dev d, unsigned place, dev *instance) {
    char key[160], value[128];
    ret code = entered(d, "nvmlDeviceGetMigDeviceHandleByIndex");
    if (code) return code;
    *instance = (dev)((size_t)d + 1 + place);
    return text_of(key_of(*instance, "uuid", key), 0, value, sizeof value) ? 0 : 6;
}
ret nvmlDeviceGetDeviceHandleFromMigDeviceHandle(dev instance, dev *d) {
    *d = (dev)(((size_t)instance - 1) / 64 * 64 + 1);
    return entered(*d, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle");
}
struct gpm_support { unsigned version, supported; };
ret nvmlGpmQueryDeviceSupport(dev d, struct gpm_support *support) {
    long found = 0;
    (void)number_of(d, "nvmlGpmQueryDeviceSupport", "gpm", &found);
    support->supported = (unsigned)found;
    return 0;
}
ret nvmlGpmSampleAlloc(void **sample) { return (*sample = calloc(1, sizeof(int))) ? 0 : 20; }
ret nvmlGpmSampleFree(void *sample) { return free(sample), 0; }
ret nvmlGpmMigSampleGet(dev d, unsigned instance, int *sample) {
    ret code = entered(d, "nvmlGpmMigSampleGet");
    if (code) return code;
    for (int place = 0; place < 8; place++) {
        long found;
        dev each = (dev)((size_t)d + 1 + (size_t)place);
        if (!number_of(each, "nvmlGpmMigSampleGet", "gpu_instance", &found) && (unsigned)found == instance) {
            *sample = 1 + (int)(size_t)each;
            return 0;
        }
    }
    return 2;
}
struct gpm_metric { unsigned id; ret code; double value; char *name, *unit, *short_name; };
struct gpm_get { unsigned version, count; int *first, *second; struct gpm_metric metrics[210]; };
ret nvmlGpmMetricsGet(struct gpm_get *wanted) {
    char key[160], text[64];
    dev d = (dev)(size_t)(*wanted->second - 1);
    wanted->metrics[0].code = text_of(key_of(d, "percent", key), 0, text, sizeof text) ? 0 : NOT_SUPPORTED;
    wanted->metrics[0].value = wanted->metrics[0].code ? 0 : atof(text);
    return 0;
}

/* -- processes and samples ------------------------------------------------------------------------------------------ */

struct process { unsigned pid; u64 memory; unsigned gpu_instance, compute_instance; };
static ret processes(dev d, const char *function, const char *name, unsigned *count, struct process *room) {
    char key[160], value[64];
    unsigned found = 0;
    ret code = entered(d, function);
    if (code) return code;
    char *text = state();
    for (; find(text, key_of(d, name, key), (int)found, value, sizeof value); found++)
        if (room && found < *count) sscanf(value, "%u %llu", &room[found].pid, &room[found].memory);
    free(text);
    code = found > *count || (!room && found) ? 7 : 0;
    *count = found;
    return code;
}
ret nvmlDeviceGetComputeRunningProcesses_v3(dev d, unsigned *count, struct process *room) {
    return processes(d, "nvmlDeviceGetComputeRunningProcesses_v3", "process", count, room);
}
ret nvmlDeviceGetGraphicsRunningProcesses_v3(dev d, unsigned *count, struct process *room) {
    return processes(d, "nvmlDeviceGetGraphicsRunningProcesses_v3", "drawing", count, room);
}

struct raw { u64 at; unsigned pid, percent; };
static int buffered(dev d, u64 since, struct raw *samples) {
    char key[160], value[64];
    static struct raw all[4096];
    int count = 0, kept = 0;
    char *text = state();
    while (count < 4096 && find(text, key_of(d, "sample", key), count, value, sizeof value)) {
        sscanf(value, "%llu %u %u", &all[count].at, &all[count].pid, &all[count].percent);
        count++;
    }
    free(text);
    for (int i = count > BUFFER ? count - BUFFER : 0; i < count; i++)
        if (all[i].at > since) samples[kept++] = all[i];
    return kept;
}
static int dead(unsigned pid) {
    char value[32];
    for (int nth = 0; text_of("dead", nth, value, sizeof value); nth++)
        if ((unsigned)atol(value) == pid) return 1;
    return pid == 0;
}
struct usage { unsigned pid; u64 at; unsigned sm, memory, encoder, decoder; };
ret nvmlDeviceGetProcessUtilization(dev d, struct usage *room, unsigned *count, u64 since) {
    struct raw samples[BUFFER];
    struct usage found[BUFFER];
    unsigned processes_found = 0;
    ret code = entered(d, "nvmlDeviceGetProcessUtilization");
    if (code) return code;
    if (!room) return *count = BUFFER, 7;
    int kept = buffered(d, since, samples);
    for (int i = kept - 1; i >= 0; i--) {
        unsigned sum = 0, known = 0;
        for (unsigned j = 0; j < processes_found; j++) known |= found[j].pid == samples[i].pid;
        if (known || dead(samples[i].pid)) continue;
        for (int j = 0; j < kept; j++) sum += samples[j].pid == samples[i].pid ? samples[j].percent : 0;
        unsigned mean = sum > 100u * (unsigned)kept ? sum : (sum + (unsigned)kept - 1) / (unsigned)kept;
        found[processes_found++] = (struct usage){samples[i].pid, samples[i].at, mean, 0, 0, 0};
    }
    if (!processes_found) return 6;
    if (processes_found > *count) return *count = processes_found, 7;
    memcpy(room, found, processes_found * sizeof *found);
    *count = processes_found;
    return 0;
}
struct sample { u64 at; union { double d; int i; unsigned u; u64 ll; } value; };
ret nvmlDeviceGetSamples(dev d, int kind, u64 since, int *type, unsigned *count, struct sample *room) {
    struct raw samples[BUFFER];
    (void)kind;
    ret code = entered(d, "nvmlDeviceGetSamples");
    if (code) return code;
    *type = 1;
    if (!room) return *count = BUFFER, 0;
    int kept = buffered(d, since, samples);
    if (!kept) return 6;
    for (int i = 0; i < kept && i < (int)*count; i++) {
        room[i].at = samples[i].at;
        room[i].value.ll = samples[i].percent;
    }
    *count = (unsigned)kept;
    return 0;
}

/* -- events --------------------------------------------------------------------------------------------------------- */

static dev watched[32];
static long delivered[32];
struct event { dev device; u64 type, data; unsigned gpu_instance, compute_instance; };

/* The first event of the device after number *after*, or 0. */
static long next_xid(dev d, long after, long *xid) {
    char key[160], value[64];
    for (int nth = 0; gpu_of(d) >= 0 && text_of(key_of(d, "xid", key), nth, value, sizeof value); nth++) {
        long serial;
        if (sscanf(value, "%ld %ld", &serial, xid) == 2 && serial > after) return serial;
    }
    return 0;
}
ret nvmlEventSetCreate(void **set) {
    ret code = ready();
    *set = (void *)1;
    memset(watched, 0, sizeof watched);
    return code;
}
ret nvmlEventSetFree(void *set) { return (void)set, 0; }
ret nvmlDeviceRegisterEvents(dev d, u64 types, void *set) {
    (void)types, (void)set;
    ret code = entered(d, "nvmlDeviceRegisterEvents");
    if (code) return code;
    int slot = 0;
    while (slot < 31 && watched[slot] && watched[slot] != d) slot++;
    watched[slot] = d;
    long serial, xid;
    delivered[slot] = 0; /* what happened before is not told */
    while ((serial = next_xid(d, delivered[slot], &xid))) delivered[slot] = serial;
    return 0;
}
ret nvmlEventSetWait_v2(void *set, struct event *event, unsigned timeout_ms) {
    (void)set, (void)timeout_ms;
    ret code = ready();
    if (code) return code;
    for (int slot = 0; slot < 32 && watched[slot]; slot++) {
        long xid, serial = next_xid(watched[slot], delivered[slot], &xid);
        if (!serial) continue;
        delivered[slot] = serial;
        *event = (struct event){watched[slot], 8, (u64)xid, ~0u, ~0u};
        return 0;
    }
    return 10;
}
