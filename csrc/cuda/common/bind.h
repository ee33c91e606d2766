// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace qbert::cuda {

void bind_w8a8(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_lowbit(pybind11::module_& module);
void bind_weight_only(pybind11::module_& module);
void bind_layer(pybind11::module_& module);

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace qbert::cuda
