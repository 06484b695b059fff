#include "core/error.h"

namespace deltaic {

void fail(const char* op, const char* message) { throw Error(std::string(op) + ": " + message); }

}  // namespace deltaic
