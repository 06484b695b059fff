// The operators of one instruction set, gathered into a table. Compiled once per instruction set.
#include "core/isa.h"
#include "cpu/simd.h"
#include "ops.h"

namespace deltaic {
namespace DELTAIC_ISA {

#define X(name, contract, arguments) void name arguments;
DELTAIC_OPS(X)
#undef X

extern const Ops kOps;
const Ops kOps = {
#define X(name, contract, arguments) name,
    DELTAIC_OPS(X)
#undef X
};

extern const Numerics kNumerics;
const Numerics kNumerics = {kBf16Dot, kInt8KvBits};

}  // namespace DELTAIC_ISA
}  // namespace deltaic
