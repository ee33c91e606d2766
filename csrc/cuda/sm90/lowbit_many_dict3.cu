#include "cuda/sm90/lowbit_many.cuh"

template void qbert::cuda::launch_lowbit_code<qbert::cuda::Code::dict3>(const LowbitLinear&, LowbitTileIndex, const Launch&);
