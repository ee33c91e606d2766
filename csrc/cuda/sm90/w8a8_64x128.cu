#include "cuda/sm90/w8a8_gemm.cuh"

template void qbert::cuda::launch_w8a8<qbert::cuda::k64x128>(const W8a8Linear&, const Launch&);
