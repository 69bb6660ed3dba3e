// All kernels as one translation unit: one fatbin for the GPU, one object for the host.
#include "attention_backward.cu"
#include "attention_cached.cu"
#include "attention_forward.cu"
#include "elementwise.cu"
#include "norm.cu"
