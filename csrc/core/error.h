// Errors that an operator reports to its caller. Thrown on the calling thread only, never from a worker.
#pragma once

#include <stdexcept>
#include <string>

namespace deltaic {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const char* op, const char* message);

}  // namespace deltaic
