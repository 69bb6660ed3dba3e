// All kernels as one translation unit: one fatbin for the GPU, one object for the host.
#include "classifier.cu"
#include "elementwise.cu"
#include "embedding.cu"
#include "norm.cu"
#include "optimizer.cu"
#include "reduce.cu"
#include "rope.cu"
#include "swiglu.cu"
