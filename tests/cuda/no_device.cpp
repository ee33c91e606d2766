// In place of what needs CUDA: with this, the bindings, the checks and the choice of tiles compile by themselves.
#include "cuda/error.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace qbert::cuda {

Device current_device() { fail("a build without CUDA has no device"); }

void check_on_device(const char*, const void*, const Device&) {}

void launch_add_layer_norm_quantize(const AddLayerNormQuantize&, const Launch&) {}

template <TileIndex kIndex>
void launch_w8a8(const W8a8Linear&, const Launch&) {}

template void launch_w8a8<k128x256>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k128x192>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k128x128>(const W8a8Linear&, const Launch&);
template void launch_w8a8<k64x128>(const W8a8Linear&, const Launch&);

}  // namespace qbert::cuda
