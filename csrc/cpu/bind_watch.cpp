// Whether things in memory are still what they were: Python objects by their identity, tensors by their bytes. What the watch of
// a fused encoder asks before every call, so each answer costs nanoseconds.
#include <cstring>

#include "cpu/bind.h"

namespace py = pybind11;

namespace qbert {
namespace {

// Whether each dictionary holds that thing under that name; None: nothing. Borrowed references only.
bool same_places(const py::list& dicts, const py::list& names, const py::list& things) {
    const Py_ssize_t count = PyList_GET_SIZE(dicts.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* found = PyDict_GetItemWithError(PyList_GET_ITEM(dicts.ptr(), i), PyList_GET_ITEM(names.ptr(), i));
        if (found == nullptr) {
            if (PyErr_Occurred() != nullptr) throw py::error_already_set();
            found = Py_None;
        }
        if (found != PyList_GET_ITEM(things.ptr(), i)) return false;
    }
    return true;
}

bool same_types(const py::list& objects, const py::list& types) {
    const Py_ssize_t count = PyList_GET_SIZE(objects.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(objects.ptr(), i)));
        if (type != PyList_GET_ITEM(types.ptr(), i)) return false;
    }
    return true;
}

bool same_lengths(const py::list& things, const py::list& lengths) {
    const Py_ssize_t count = PyList_GET_SIZE(things.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        const Py_ssize_t length = PyObject_Size(PyList_GET_ITEM(things.ptr(), i));
        if (length < 0) throw py::error_already_set();
        if (length != PyLong_AsSsize_t(PyList_GET_ITEM(lengths.ptr(), i))) return false;
    }
    return true;
}

// One step of a hash: a bijection of the state for each word, and of the word for each state, so that no single change is lost.
inline uint64_t mixed(uint64_t state, uint64_t word) {
    const uint64_t x = state ^ word;
    return ((x << 27) | (x >> 37)) * 0x9E3779B97F4A7C15ull;
}

// Four states side by side: a multiplication takes as long as the next three need to begin.
uint64_t digest_of(const char* bytes, int64_t size) {
    uint64_t states[4] = {1, 2, 3, 4}, words[4];
    int64_t done = 0;
    for (; done + 32 <= size; done += 32) {
        std::memcpy(words, bytes + done, 32);
        for (int lane = 0; lane < 4; ++lane) states[lane] = mixed(states[lane], words[lane]);
    }
    std::memset(words, 0, sizeof words);
    std::memcpy(words, bytes + done, static_cast<size_t>(size - done));
    for (int lane = 0; lane < 4; ++lane) states[lane] = mixed(states[lane], words[lane]);
    return mixed(mixed(mixed(states[0], states[1]), states[2]), states[3]);
}

// Of `count` pieces of memory, whose addresses and sizes in bytes stand in a table of int64 pairs.
uint64_t digest_of_pieces(uintptr_t table, int64_t count) {
    const auto* pieces = at<const int64_t>(table);
    uint64_t digest = 0;
    for (int64_t i = 0; i < count; ++i) {
        digest = mixed(digest, digest_of(at<const char>(static_cast<uintptr_t>(pieces[2 * i])), pieces[2 * i + 1]));
    }
    return digest;
}

}  // namespace

void bind_watch(py::module_& module) {
    module.def("same_places", &same_places, py::arg("dicts"), py::arg("names"), py::arg("things"),
               "Whether each dictionary holds that very thing under that name; None stands for no entry.");
    module.def("same_types", &same_types, py::arg("objects"), py::arg("types"), "Whether each object is of that very type.");
    module.def("same_lengths", &same_lengths, py::arg("things"), py::arg("lengths"), "Whether each thing has that many in it.");
    module.def("digest_of_pieces", &digest_of_pieces, py::arg("table"), py::arg("count"),
               "A 64-bit hash of pieces of memory: address of a table of int64 pairs (address, bytes), and how many.");
}

}  // namespace qbert
