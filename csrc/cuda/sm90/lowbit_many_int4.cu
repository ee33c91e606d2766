#include "cuda/sm90/lowbit_many.cuh"

template void qbert::cuda::launch_lowbit_code<qbert::cuda::Code::int4>(const LowbitLinear&, LowbitTileIndex, const Launch&);
