// Errors that reach Python as QBertError: one line, the offending value, what is allowed.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qbert::cuda {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

}  // namespace qbert::cuda
