// The kernels and what runs them, as one object for the host.
#include "emulation.cpp"

#include "../cuda/kernels.cu"
