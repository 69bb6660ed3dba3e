// All kernels as one translation unit: one fatbin for the GPU, one object for the host.
#include "elementwise.cu"
#include "grouped.cu"
#include "matmul.cu"
#include "moe.cu"
#include "norm.cu"
