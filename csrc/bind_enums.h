// The enums of enums.h as a module's attribute ENUMS, which qbert/ops/abi.py compares with its own.
#pragma once

#include <pybind11/pybind11.h>

#include "enums.h"

namespace qbert {

// Name of each enum to the numbers of its members by their names.
inline pybind11::dict enums() {
    pybind11::dict all, members;
#define QBERT_NUMBER(name, name_in_python) members[#name_in_python] = static_cast<int>(Enum::name);
#define QBERT_ENUM(name, list)       \
    {                                \
        using Enum = name;           \
        members = pybind11::dict();  \
        list(QBERT_NUMBER)           \
        all[#name] = members;        \
    }
    QBERT_ENUM(Activation, QBERT_ACTIVATIONS)
    QBERT_ENUM(Keeps, QBERT_KEEPS)
    QBERT_ENUM(FloatType, QBERT_FLOAT_TYPES)
    QBERT_ENUM(WeightFormat, QBERT_WEIGHT_FORMATS)
#undef QBERT_ENUM
#undef QBERT_NUMBER
    return all;
}

}  // namespace qbert
