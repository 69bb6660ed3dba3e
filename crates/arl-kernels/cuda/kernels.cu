// All kernels as one translation unit: one fatbin for the GPU, one object for the host.
#include "elementwise.cu"
#include "norm.cu"
#include "reduce.cu"
#include "rope.cu"
#include "swiglu.cu"
