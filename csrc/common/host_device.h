// Functions that the CPU and CUDA share.
#pragma once
#ifdef __CUDACC__
#define FASTRET_HOST_DEVICE __host__ __device__
#else
#define FASTRET_HOST_DEVICE
#endif
