// Which instruction set's operators this process uses.
#pragma once

#include "ops.h"

namespace deltaic {

struct Isa {
    const char* name;
    bool usable;          // by this CPU and operating system
    bool rounds_to_bf16;  // activations that meet bf16 matrices, unless Weight::float_activations
    const Ops* ops;
};

// Best first. `count` receives the number of entries.
const Isa* isa_list(int* count);

}  // namespace deltaic
