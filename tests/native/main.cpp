// qbert_native_tests [part of a test's name]: runs all tests, or those whose names contain the argument.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "cpu/threads.h"

#include "check.h"
#include "data.h"

namespace {

bool passes(const check::Test& test) {
    try {
        test.body();
        std::cout << "ok      " << test.name << std::endl;
    } catch (const check::Skipped& why) {
        std::cout << "skipped " << test.name << ": " << why.what() << std::endl;
    } catch (const std::exception& error) {
        std::cout << "FAILED  " << test.name << ": " << error.what() << std::endl;
        return false;
    }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string filter = count > 1 ? arguments[1] : "";
    // What torch does: the OpenMP runtime comes with a library of its own, in the global scope.
    const char* threads = std::getenv("QBERT_THREADS");
    if (threads != nullptr && std::strcmp(threads, "openmp") == 0 && !dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL)) {
        std::cout << "no OpenMP runtime here: " << dlerror() << std::endl;
        return 77;
    }
    for (const qbert::Kernels* kernels : data::usable_kernels()) std::cout << qbert::name(kernels->isa) << ' ';
    std::cout << "| " << qbert::thread_backend() << std::endl;
    int failed = 0;
    for (const check::Test& test : check::tests()) {
        if (std::string(test.name).find(filter) != std::string::npos) failed += !passes(test);
    }
    return failed == 0 ? 0 : 1;
}
