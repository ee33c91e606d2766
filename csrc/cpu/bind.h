// What the bindings of qbert._cpu share. Functions take pointers and sizes, never torch objects, so one build serves every torch;
// pointers are integers, 0 for none.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace qbert {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_weight(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_weight_only(pybind11::module_& module);
void bind_watch(pybind11::module_& module);

}  // namespace qbert
