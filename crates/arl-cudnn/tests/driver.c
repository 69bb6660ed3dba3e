/* A driver for tests, of what cuDNN asks a driver for while it makes a plan: a kernel that was compiled is taken, and named
 * into `arl_loaded_kernel`. It counts one device, without which nothing is loaded, but cudart's own start is refused. */
#include <stdio.h>

char arl_loaded_kernel[256];
static char token;

int cuInit(unsigned flags) { return (void)flags, 100; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuGetErrorName(int status, const char **text) { return (void)status, *text = "CUDA_ERROR", 0; }
int cuGetErrorString(int status, const char **text) { return (void)status, *text = "an error of the tests' driver", 0; }
int cuLibraryLoadData(void **library) { return *library = &token, 0; }
int cuLibraryUnload(void *library) { return (void)library, 0; }
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
	snprintf(arl_loaded_kernel, sizeof arl_loaded_kernel, "%s", name);
	return (void)library, *kernel = &token, 0;
}

#define REFUSED(name) int name(void) { return 801; }
REFUSED(cuCtxGetCurrent)
REFUSED(cuCtxGetDevice)
REFUSED(cuCtxGetLimit)
REFUSED(cuCtxPopCurrent)
REFUSED(cuCtxPushCurrent)
REFUSED(cuDeviceGet)
REFUSED(cuDeviceGetAttribute)
REFUSED(cuDevicePrimaryCtxRelease)
REFUSED(cuDevicePrimaryCtxReset)
REFUSED(cuDevicePrimaryCtxRetain)
REFUSED(cuFuncGetAttribute)
REFUSED(cuFuncSetAttribute)
REFUSED(cuKernelGetAttribute)
REFUSED(cuKernelSetAttribute)
REFUSED(cuLaunchCooperativeKernel)
REFUSED(cuLaunchKernel)
REFUSED(cuLaunchKernelEx)
REFUSED(cuLibraryLoadFromFile)
REFUSED(cuLinkAddData)
REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkAddFile_v2)
REFUSED(cuLinkComplete)
REFUSED(cuLinkCreate)
REFUSED(cuLinkCreate_v2)
REFUSED(cuLinkDestroy)
REFUSED(cuMemcpyDtoH_v2)
REFUSED(cuModuleGetFunction)
REFUSED(cuModuleGetGlobal_v2)
REFUSED(cuModuleLoadData)
REFUSED(cuModuleLoadDataEx)
REFUSED(cuModuleLoadFatBinary)
REFUSED(cuModuleUnload)
REFUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSED(cuOccupancyMaxPotentialClusterSize)
REFUSED(cuStreamSynchronize)
REFUSED(cuKernelGetFunction)
REFUSED(cuStreamGetCtx)
REFUSED(cuTensorMapEncodeIm2col)
REFUSED(cuTensorMapEncodeTiled)
