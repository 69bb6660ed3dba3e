/* A driver for tests: answers what the environment says, and calls no GPU.
 *   FAKE_CUDA_INIT     what cuInit returns (0); -1: it ends the process
 *   FAKE_CUDA_VERSION  what cuDriverGetVersion says (13000)
 *   FAKE_CUDA_GPUS     GPUs with `;` between: name,major,minor,GiB in all,GiB free,what a context's creation returns
 * FAKE_PREFIX goes before the variables' names, so that several may be open in one process. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FAKE_PREFIX
#define FAKE_PREFIX ""
#endif

struct gpu {
	char name[64];
	int major, minor, total, free, retain;
};

static int number(const char *name, int otherwise) {
	const char *text = getenv(name);
	return text ? atoi(text) : otherwise;
}

static int gpu(int ordinal, struct gpu *found) {
	const char *text = getenv(FAKE_PREFIX "FAKE_CUDA_GPUS");
	for (int i = 0; text && *text; i++) {
		if (i == ordinal)
			return sscanf(text, "%63[^,],%d,%d,%d,%d,%d", found->name, &found->major, &found->minor, &found->total,
				      &found->free, &found->retain) == 6;
		text = strchr(text, ';');
		if (text) text++;
	}
	return 0;
}

static int current = 0;

static unsigned contexts = 0;

/* The GPUs on which a context was created since the last call: bit i is GPU i. */
unsigned fake_contexts(void) {
	unsigned created = contexts;
	return contexts = 0, created;
}

int cuInit(unsigned flags) {
	int status = number(FAKE_PREFIX "FAKE_CUDA_INIT", 0);
	if (status < 0) abort();
	return (void)flags, status;
}

int cuDriverGetVersion(int *version) { return *version = number(FAKE_PREFIX "FAKE_CUDA_VERSION", 13000), 0; }

int cuGetErrorName(int status, const char **text) {
	*text = status == 100 ? "CUDA_ERROR_NO_DEVICE" : status == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
	return 0;
}

int cuGetErrorString(int status, const char **text) { return (void)status, *text = "a fake error", 0; }

int cuDeviceGetCount(int *count) {
	struct gpu ignored;
	for (*count = 0; gpu(*count, &ignored);) ++*count;
	return 0;
}

int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }

int cuDeviceGetName(char *name, int length, int device) {
	struct gpu found = {0};
	gpu(device, &found);
	return snprintf(name, (size_t)length, "%s", found.name), 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
	struct gpu found = {0};
	gpu(device, &found);
	*value = attribute == 75 ? found.major : attribute == 76 ? found.minor : 0;
	return 0;
}

int cuDeviceGetUuid_v2(char *uuid, int device) {
	memset(uuid, 0, 16);
	return uuid[15] = (char)(device + 1), 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
	struct gpu found = {0};
	gpu(device, &found);
	return *bytes = (size_t)found.total << 30, 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
	struct gpu found = {0};
	gpu(device, &found);
	*context = &current;
	current = device;
	contexts |= 1u << device;
	return found.retain;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxPushCurrent_v2(void *context) { return (void)context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = &current, 0; }

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
	struct gpu found = {0};
	gpu(current, &found);
	*free_bytes = (size_t)found.free << 30;
	*total_bytes = (size_t)found.total << 30;
	return 0;
}
