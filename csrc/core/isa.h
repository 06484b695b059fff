// Which instruction set's operators this process uses.
#pragma once

#include "ops.h"

namespace deltaic {

// To what its operators round where they may, from the constants of its header in cpu/simd: what tolerances follow
// from.
struct Numerics {
    bool rounds_to_bf16;  // multiplies bfloat16 pairs (not with Weight::float_activations)
    int int8_kv_bits;     // bits, with the sign, of what a decoded row's int8 keys and values meet; a float has 24
};

struct Isa {
    const char* name;
    bool usable;  // by this CPU and operating system
    const Numerics* numerics;
    const Ops* ops;
};

// Best first. `count` receives the number of entries.
const Isa* isa_list(int* count);

}  // namespace deltaic
