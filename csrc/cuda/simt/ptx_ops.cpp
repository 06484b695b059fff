// What each PTX instruction computes, for the lanes that execute it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <unordered_map>

#include "cuda/simt/ptx.h"

namespace simt {
namespace ptx {
namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
static_assert(sizeof(f32) == 4 && sizeof(f64) == 8);

std::unordered_map<std::string, Opcode> table;

template <class F>
void for_lanes(u32 lanes, F f) {
    if (lanes == ~u32{0}) {
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int i = 0; i < kLanes; ++i) f(i);
    } else {
        for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
    }
}

void define_result(Warp& w, u32 slot, u32 lanes, u32 defined) {
    w.defined[slot] = (w.defined[slot] & ~lanes) | (lanes & defined);
}

template <class F, class D, class... S, size_t... I>
void lanewise_with(Warp& w, const Instr& in, u32 lanes, std::index_sequence<I...>) {
    D* d = w.lanes<D>(in.r[0]);
    for_lanes(lanes, [&](int i) { d[i] = F{}(w.lanes<S>(in.r[I + 1])[i]...); });
    define_result(w, in.r[0], lanes, (w.defined[in.r[I + 1]] & ...));
}
template <class F, class D, class... S>
void lanewise(Warp& w, const Instr& in, u32 lanes) {
    lanewise_with<F, D, S...>(w, in, lanes, std::index_sequence_for<S...>{});
}

template <class F, class S>
void compare(Warp& w, const Instr& in, u32 lanes) {
    const S *a = w.lanes<S>(in.r[1]), *b = w.lanes<S>(in.r[2]);
    u32 bits = 0;
    for_lanes(lanes, [&](int i) { bits |= static_cast<u32>(F{}(a[i], b[i])) << i; });
    w.predicate(in.r[0]) = (w.predicate(in.r[0]) & ~lanes) | bits;
    define_result(w, in.r[0], lanes, w.defined[in.r[1]] & w.defined[in.r[2]]);
}

template <class F>
void predicates(Warp& w, const Instr& in, u32 lanes) {
    const u32 value = F{}(w.predicate(in.r[1]), w.predicate(in.r[2]));
    w.predicate(in.r[0]) = (w.predicate(in.r[0]) & ~lanes) | (value & lanes);
    define_result(w, in.r[0], lanes, w.defined[in.r[1]] & w.defined[in.r[2]]);
}

template <class T>
void select(Warp& w, const Instr& in, u32 lanes) {
    T* d = w.lanes<T>(in.r[0]);
    const T *a = w.lanes<T>(in.r[1]), *b = w.lanes<T>(in.r[2]);
    const u32 p = w.predicate(in.r[3]);
    for_lanes(lanes, [&](int i) { d[i] = p >> i & 1 ? a[i] : b[i]; });
    const u32 defined = (p & w.defined[in.r[1]]) | (~p & w.defined[in.r[2]]);
    define_result(w, in.r[0], lanes, defined & w.defined[in.r[3]]);
}

// d = F(a, b, c, carry in), of more bits than u32: bit 32 of it is the carry, or the borrow.
template <class F, bool kReads, bool kWrites, int kSources>
void with_carry(Warp& w, const Instr& in, u32 lanes) {
    u32* d = w.lanes<u32>(in.r[0]);
    const u32 *a = w.lanes<u32>(in.r[1]), *b = w.lanes<u32>(in.r[2]), *c = w.lanes<u32>(in.r[kSources]);
    u32 out = w.carry;
    for_lanes(lanes, [&](int i) {
        const u64 value = F{}(u64{a[i]}, u64{b[i]}, u64{c[i]}, u64{kReads ? w.carry >> i & 1 : 0});
        d[i] = static_cast<u32>(value);
        out = (out & ~(u32{1} << i)) | static_cast<u32>(value >> 32 & 1) << i;
    });
    if (kWrites) w.carry = out;
    define_result(w, in.r[0], lanes, w.defined[in.r[1]] & w.defined[in.r[2]] & w.defined[in.r[kSources]]);
}

// --- memory

void check_set(const Warp& w, const Instr& in, u32 lanes, u32 defined, const char* what) {
    if ((defined & lanes) != lanes) refuse(w, in, __builtin_ctz(lanes & ~defined), what);
}
u32 address_defined(const Warp& w, const Instr& in) {
    return in.base < 0 ? ~u32{0} : w.defined[static_cast<u32>(in.base)];
}

template <class M, class R>
void load(Warp& w, const Instr& in, u32 lanes) {
    const size_t bytes = sizeof(M) * in.count;
    check_set(w, in, lanes, address_defined(w, in), "an address that was never set");
    if (in.space == Space::parameter && in.base < 0) {
        for (int e = 0; e < in.count; ++e) {
            M value;
            std::memcpy(&value, parameter_memory(w) + in.offset + e * static_cast<int>(sizeof(M)), sizeof(M));
            for_lanes(lanes, [&](int i) { w.lanes<R>(in.r[e])[i] = static_cast<R>(value); });
        }
    } else {
        for_lanes(lanes, [&](int i) {
            const uint8_t* from = memory(w, in, in.space, address_of(w, in, i), bytes, i, false, false);
            M values[4];  // all before any: a result may be the address
            std::memcpy(values, from, bytes);
            for (int e = 0; e < in.count; ++e) w.lanes<R>(in.r[e])[i] = static_cast<R>(values[e]);
        });
    }
    for (int e = 0; e < in.count; ++e) define_result(w, in.r[e], lanes, lanes);
}

template <class M, class R>
void store(Warp& w, const Instr& in, u32 lanes) {
    const size_t bytes = sizeof(M) * in.count;
    check_set(w, in, lanes, address_defined(w, in), "an address that was never set");
    u32 defined = lanes;
    for (int e = 0; e < in.count; ++e) defined &= w.defined[in.r[e]];
    check_set(w, in, lanes, defined, "a register is stored that was never set");
    for_lanes(lanes, [&](int i) {
        uint8_t* to = memory(w, in, in.space, address_of(w, in, i), bytes, i, true, false);
        for (int e = 0; e < in.count; ++e) {
            const M value = static_cast<M>(w.lanes<R>(in.r[e])[i]);
            std::memcpy(to + static_cast<size_t>(e) * sizeof(M), &value, sizeof(M));
        }
    });
}

// d = [a]; [a] += b
template <class T>
void atomic_add(Warp& w, const Instr& in, u32 lanes) {
    check_set(w, in, lanes, address_defined(w, in) & w.defined[in.r[1]], "an address or a number that was never set");
    for_lanes(lanes, [&](int i) {
        uint8_t* at = memory(w, in, in.space, address_of(w, in, i), sizeof(T), i, true, true);
        T old, sum;
        std::memcpy(&old, at, sizeof(T));
        sum = static_cast<T>(old + w.lanes<T>(in.r[1])[i]);
        std::memcpy(at, &sum, sizeof(T));
        w.lanes<T>(in.r[0])[i] = old;
    });
    define_result(w, in.r[0], lanes, lanes);
}

// --- what lanes do together

enum class Shuffle { up, down, bfly, idx };

// d|p = a of the lane that b and the segment c name; p: whether that lane is within the segment.
template <Shuffle kMode>
void shuffle(Warp& w, const Instr& in, u32 lanes) {
    u32 source[kLanes], value[kLanes], valid = 0, defined = 0;
    std::copy_n(w.lanes<u32>(in.r[2]), kLanes, value);
    const u32 *b = w.lanes<u32>(in.r[3]), *c = w.lanes<u32>(in.r[4]);
    const u32 known = w.defined[in.r[2]], steering = w.defined[in.r[3]] & w.defined[in.r[4]];
    for_lanes(lanes, [&](int i) {
        const int bits = static_cast<int>(b[i] & 31), clamp = static_cast<int>(c[i] & 31);
        const int segment = static_cast<int>(c[i] >> 8 & 31), low = i & segment, high = low | (clamp & ~segment);
        int from = i;
        bool inside = false;
        if (kMode == Shuffle::up) from = i - bits, inside = from >= high;
        if (kMode == Shuffle::down) from = i + bits, inside = from <= high;
        if (kMode == Shuffle::bfly) from = i ^ bits, inside = from <= high;
        if (kMode == Shuffle::idx) from = low | (bits & ~segment), inside = from <= high;
        if (!inside) from = i;
        source[i] = static_cast<u32>(from);
        valid |= static_cast<u32>(inside) << i;
        // What a lane that does not take part holds is undefined.
        if (lanes >> from & known >> from & steering >> i & 1) defined |= u32{1} << i;
    });
    for_lanes(lanes, [&](int i) { w.lanes<u32>(in.r[0])[i] = value[source[i]]; });
    w.predicate(in.r[1]) = (w.predicate(in.r[1]) & ~lanes) | valid;
    define_result(w, in.r[0], lanes, defined);
    define_result(w, in.r[1], lanes, steering);
}

void ballot(Warp& w, const Instr& in, u32 lanes) {
    const u32 votes = w.predicate(in.r[1]) & lanes;
    for_lanes(lanes, [&](int i) { w.lanes<u32>(in.r[0])[i] = votes; });
    define_result(w, in.r[0], lanes, (w.defined[in.r[1]] & lanes) == lanes ? lanes : 0);
}

void warp_barrier(Warp& w, const Instr&, u32 lanes) { sync_warp(w, lanes); }

void wait_for_kernels(Warp& w, const Instr&, u32 lanes) { w.waited |= lanes; }

f32 as_float(u32 bits) {
    f32 x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// D = A B + C, 16 x 8, with K = 16 of bfloat16, or 8 of tf32, the first 19 bits of a float. Which lane holds what is in
// the PTX ISA under "Matrix Fragments for mma.m16n8k16" and "... m16n8k8".
template <bool kBf16>
void mma(Warp& w, const Instr& in, u32 lanes) {
    constexpr int K = kBf16 ? 16 : 8;
    f32 A[16][K], B[K][8], C[16][8];
    u32 defined = lanes;
    for (int r = 4; r < 14; ++r) defined &= w.defined[in.r[r]];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane >> 2, thread = lane % 4;
        if (kBf16) {
            const auto element = [&](int first, int i) {
                return as_float((w.lanes<u32>(in.r[first + i / 2])[lane] >> (i % 2 * 16)) << 16);
            };
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                A[row][thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = element(4, i);
            }
            for (int i = 0; i < 4; ++i) B[thread * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element(8, i);
        } else {
            const auto element = [&](int slot) { return as_float(w.lanes<u32>(in.r[slot])[lane] & 0xffffe000u); };
            for (int i = 0; i < 4; ++i)
                A[i == 0 || i == 2 ? group : group + 8][i < 2 ? thread : thread + 4] = element(4 + i);
            for (int i = 0; i < 2; ++i) B[i == 0 ? thread : thread + 4][group] = element(8 + i);
        }
        for (int i = 0; i < 4; ++i)
            C[i < 2 ? group : group + 8][thread * 2 + (i & 1)] = w.lanes<f32>(in.r[10 + i])[lane];
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
            w.lanes<f32>(in.r[i])[lane] = C[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)];
    for (int i = 0; i < 4; ++i) define_result(w, in.r[i], lanes, defined == lanes ? lanes : 0);
}

// --- numbers

// The float that lies towards zero, or towards minus infinity, of value + rest, where rest is less than half a step of
// value.
f32 round_down(f64 value, f64 rest, bool to_zero) {
    f32 x = static_cast<f32>(value);
    if (!std::isfinite(x)) return x;
    const f64 over = static_cast<f64>(x) - value;
    const bool above = over > 0 || (over == 0 && rest < 0), below = over < 0 || (over == 0 && rest > 0);
    if (to_zero ? x > 0 && above : above) return std::nextafterf(x, -std::numeric_limits<f32>::infinity());
    if (to_zero && x < 0 && below) return std::nextafterf(x, std::numeric_limits<f32>::infinity());
    return x;
}
// What rounding took from a + b.
f64 rest_of_sum(f64 a, f64 b, f64 sum) {
    const f64 other = sum - a;
    return (a - (sum - other)) + (b - other);
}

template <class To, class From>
To saturate(From x) {  // x is an integer in floating point, or NaN
    if (std::isnan(x))
        return sizeof(From) == 4 && sizeof(To) == 4 ? To{0} : static_cast<To>(To{1} << (sizeof(To) * 8 - 1));
    const f64 low = static_cast<f64>(std::numeric_limits<To>::min()),
              high = std::ldexp(1.0, std::numeric_limits<To>::digits);
    if (static_cast<f64>(x) < low) return std::numeric_limits<To>::min();
    if (static_cast<f64>(x) >= high) return std::numeric_limits<To>::max();
    return static_cast<To>(x);
}

u16 to_bf16(f32 x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    const u32 kept = bits >> 16, rest = bits & 0xffff;
    return static_cast<u16>(kept + (rest > 0x8000 || (rest == 0x8000 && kept % 2)));
}

f32 from_half(u16 h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    f32 x;
    if (exponent == 31)
        x = fraction ? std::numeric_limits<f32>::quiet_NaN() : std::numeric_limits<f32>::infinity();
    else
        x = exponent ? std::ldexp(1024.0f + static_cast<f32>(fraction), exponent - 25)
                     : std::ldexp(static_cast<f32>(fraction), -24);
    return h >> 15 ? -x : x;
}

f32 flush(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <class T>
T larger(T a, T b) {
    return a == b ? (std::signbit(a) ? b : a) : a > b || std::isnan(b) ? a : b;
}
template <class T>
T smaller(T a, T b) {
    return a == b ? (std::signbit(a) ? a : b) : a < b || std::isnan(b) ? a : b;
}

template <class T>
T insert_bits(T a, T b, u32 at, u32 count) {
    at &= 255, count &= 255;
    constexpr u32 kBits = sizeof(T) * 8;
    if (at >= kBits || count == 0) return b;
    const T mask = static_cast<T>((count >= kBits ? ~T{0} : static_cast<T>((T{1} << count) - 1)) << at);
    return static_cast<T>((b & ~mask) | (static_cast<T>(a << at) & mask));
}

u32 choose_bytes(u32 a, u32 b, u32 selectors) {
    const u64 bytes = u64{b} << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 selector = selectors >> (4 * i) & 15;
        u32 byte = static_cast<u32>(bytes >> (8 * (selector & 7))) & 255;
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

u32 any_function(u32 a, u32 b, u32 c, u32 truth) {
    u32 result = 0;
    for (u32 i = 0; i < 8; ++i)
        if (truth >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

u32 reverse_bits(u32 x) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
    return result;
}

// --- the table

template <class T>
constexpr int kWidth = static_cast<int>(sizeof(T)) * 8;

void enter(const std::string& names, const Opcode& opcode) {
    std::istringstream list(names);
    for (std::string name; list >> name;) table[name] = opcode;
}
template <class D, class... S, class F>
void define(const std::string& names, F) {
    enter(names, {&lanewise<F, D, S...>, {kWidth<D>, kWidth<S>...}});
}
template <class F>
void integers(const std::string& name, F f) {  // the same for signed and unsigned
    define<u16, u16, u16>(name + ".s16 " + name + ".u16", f);
    define<u32, u32, u32>(name + ".s32 " + name + ".u32", f);
    define<u64, u64, u64>(name + ".s64 " + name + ".u64", f);
}
template <class F>
void signed_and_unsigned(const std::string& name, F f) {
    define<s32, s32, s32>(name + ".s32", f), define<u32, u32, u32>(name + ".u32", f);
    define<s64, s64, s64>(name + ".s64", f), define<u64, u64, u64>(name + ".u64", f);
}
template <class F>
void floats(const std::string& name, F f) {
    define<f32, f32, f32>(name + ".f32 " + name + ".rn.f32", f);
    define<f64, f64, f64>(name + ".f64 " + name + ".rn.f64", f);
}
template <class F>
void bitwise(const std::string& name, F f) {
    define<u16, u16, u16>(name + ".b16", f), define<u32, u32, u32>(name + ".b32", f);
    define<u64, u64, u64>(name + ".b64", f);
    enter(name + ".pred", {&predicates<F>, {1, 1, 1}});
}
template <class S, class F>
void comparison(const std::string& name, F) {
    enter("setp." + name, {&compare<F, S>, {1, kWidth<S>, kWidth<S>}});
}
template <class F>
void comparisons(const std::string& name, F f) {
    for (const char* b : {"s", "b", "u"}) {
        if (*b == 's' || name == "eq" || name == "ne") {
            comparison<s16>(name + "." + b + "16", f), comparison<s32>(name + "." + b + "32", f);
            comparison<s64>(name + "." + b + "64", f);
        }
    }
    comparison<u16>(name + ".u16", f), comparison<u32>(name + ".u32", f), comparison<u64>(name + ".u64", f);
    comparison<f32>(name + ".f32", f), comparison<f64>(name + ".f64", f);
    // "u": true where one of them is NaN
    const auto unordered = [](auto a, auto b) { return F{}(a, b) || a != a || b != b; };
    comparison<f32>(name + "u.f32", unordered), comparison<f64>(name + "u.f64", unordered);
}
template <class T>
T low_product(T a, T b) {
    return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <class T>
T shifted_right(T a, u32 n) {
    constexpr u32 kBits = sizeof(T) * 8;
    return n >= kBits ? (a < T{0} ? static_cast<T>(-1) : T{0}) : static_cast<T>(a >> n);
}
template <class T>
void of_width(const std::string& bits) {
    define<T, T>("mov.b" + bits + " mov.u" + bits + " mov.s" + bits + " mov.f" + bits, [](T a) { return a; });
    define<T, T>("not.b" + bits, [](T a) { return static_cast<T>(~a); });
    define<T, T>("neg.s" + bits, [](T a) { return static_cast<T>(-a); });
    define<T, T, u32>("shl.b" + bits, [](T a, u32 n) { return n >= sizeof(T) * 8 ? T{0} : static_cast<T>(a << n); });
    for (const char* b : {"u", "b"})
        define<T, T, u32>("shr." + (b + bits), [](T a, u32 n) { return shifted_right(a, n); });
    using S = std::make_signed_t<T>;
    define<S, S, u32>("shr.s" + bits, [](S a, u32 n) { return shifted_right(a, n); });
    for (const char* b : {"b", "u", "s", "f"})
        enter("selp." + (b + bits), {&select<T>, {kWidth<T>, kWidth<T>, kWidth<T>, 1}});
}
template <class To, class From>
void conversion(const std::string& types) {
    define<To, From>("cvt." + types, [](From x) { return static_cast<To>(x); });
}
template <bool kReads, bool kWrites, int kSources, class F>
void carrying(const std::string& name, F) {
    enter(name, {&with_carry<F, kReads, kWrites, kSources>, std::vector<int>(static_cast<size_t>(kSources) + 1, 32)});
}

void fill_table() {
    of_width<u16>("16"), of_width<u32>("32"), of_width<u64>("64");
    integers("add", [](auto a, auto b) { return static_cast<decltype(a)>(a + b); });
    integers("sub", [](auto a, auto b) { return static_cast<decltype(a)>(a - b); });
    integers("mul.lo", [](auto a, auto b) { return low_product(a, b); });
    const auto multiply_add = [](auto a, auto b, auto c) { return static_cast<decltype(a)>(low_product(a, b) + c); };
    define<u32, u32, u32, u32>("mad.lo.s32 mad.lo.u32", multiply_add);
    define<u64, u64, u64, u64>("mad.lo.s64 mad.lo.u64", multiply_add);
    define<u32, u32, u32>("mul.hi.u32", [](u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); });
    define<u64, u32, u32>("mul.wide.u32", [](u32 a, u32 b) { return u64{a} * b; });
    define<s64, s32, s32>("mul.wide.s32", [](s32 a, s32 b) { return s64{a} * b; });
    // What x / 0 and x % 0 give is not specified; the least number over -1 must not trap here.
    signed_and_unsigned("div", [](auto a, auto b) {
        using T = decltype(a);
        return b == 0 ? static_cast<T>(-1) : b == static_cast<T>(-1) && T(-1) < T(0) ? static_cast<T>(0 - a) : a / b;
    });
    signed_and_unsigned("rem", [](auto a, auto b) {
        using T = decltype(a);
        return b == 0 ? a : b == static_cast<T>(-1) && T(-1) < T(0) ? T(0) : a % b;
    });
    signed_and_unsigned("min", [](auto a, auto b) { return std::min(a, b); });
    signed_and_unsigned("max", [](auto a, auto b) { return std::max(a, b); });

    const auto add = [](u64 a, u64 b, u64, u64 carry) { return a + b + carry; };
    carrying<false, true, 2>("add.cc.u32", add), carrying<true, true, 2>("addc.cc.u32", add);
    carrying<true, false, 2>("addc.u32", add);
    const auto subtract = [](u64 a, u64 b, u64, u64 borrow) { return a - b - borrow; };
    carrying<false, true, 2>("sub.cc.u32", subtract), carrying<true, true, 2>("subc.cc.u32", subtract);
    carrying<true, false, 2>("subc.u32", subtract);
    const auto low = [](u64 a, u64 b, u64 c, u64 carry) { return static_cast<u32>(a * b) + c + carry; };
    const auto high = [](u64 a, u64 b, u64 c, u64 carry) { return (a * b >> 32) + c + carry; };
    carrying<false, true, 3>("mad.lo.cc.u32", low), carrying<true, true, 3>("madc.lo.cc.u32", low);
    carrying<true, true, 3>("madc.hi.cc.u32", high), carrying<true, false, 3>("madc.hi.u32", high);

    bitwise("and", [](auto a, auto b) { return static_cast<decltype(a)>(a & b); });
    bitwise("or", [](auto a, auto b) { return static_cast<decltype(a)>(a | b); });
    bitwise("xor", [](auto a, auto b) { return static_cast<decltype(a)>(a ^ b); });
    const auto negation = [](u32 a, u32) { return ~a; };
    const auto copy = [](u32 a, u32) { return a; };
    enter("not.pred", {&predicates<decltype(negation)>, {1, 1}});
    enter("mov.pred", {&predicates<decltype(copy)>, {1, 1}});
    define<u32, u32, u32, u32, u32>("lop3.b32", [](u32 a, u32 b, u32 c, u32 t) { return any_function(a, b, c, t); });
    define<u32, u32, u32, u32>("prmt.b32", [](u32 a, u32 b, u32 c) { return choose_bytes(a, b, c); });
    define<u32, u32, u32, u32, u32>("bfi.b32", [](u32 a, u32 b, u32 p, u32 n) { return insert_bits(a, b, p, n); });
    define<u64, u64, u64, u32, u32>("bfi.b64", [](u64 a, u64 b, u32 p, u32 n) { return insert_bits(a, b, p, n); });
    define<u32, u32>("clz.b32", [](u32 a) { return a ? static_cast<u32>(__builtin_clz(a)) : 32; });
    define<u32, u64>("clz.b64", [](u64 a) { return a ? static_cast<u32>(__builtin_clzll(a)) : 64; });
    define<u32, u32>("bfind.shiftamt.u32", [](u32 a) { return a ? static_cast<u32>(__builtin_clz(a)) : ~u32{0}; });
    define<u32, u32>("popc.b32", [](u32 a) { return static_cast<u32>(__builtin_popcount(a)); });
    define<u32, u32>("brev.b32", [](u32 a) { return reverse_bits(a); });
    // mov of a vector: the first element is the lowest.
    define<u32, u16, u16>("pack.b32", [](u16 a, u16 b) { return static_cast<u32>(a) | static_cast<u32>(b) << 16; });
    define<u64, u32, u32>("pack.b64", [](u32 a, u32 b) { return u64{a} | u64{b} << 32; });
    define<u16, u32>("low.b32", [](u32 a) { return static_cast<u16>(a); });
    define<u16, u32>("high.b32", [](u32 a) { return static_cast<u16>(a >> 16); });
    define<u32, u64>("low.b64", [](u64 a) { return static_cast<u32>(a); });
    define<u32, u64>("high.b64", [](u64 a) { return static_cast<u32>(a >> 32); });

    comparisons("eq", [](auto a, auto b) { return a == b; });
    comparisons("lt", [](auto a, auto b) { return a < b; });
    comparisons("le", [](auto a, auto b) { return a <= b; });
    comparisons("gt", [](auto a, auto b) { return a > b; });
    comparisons("ge", [](auto a, auto b) { return a >= b; });
    comparisons("ne", [](auto a, auto b) { return a < b || a > b; });  // false for NaN
    comparison<f32>("nan.f32", [](f32 a, f32 b) { return a != a || b != b; });
    comparison<f32>("num.f32", [](f32 a, f32 b) { return a == a && b == b; });

    floats("add", [](auto a, auto b) { return a + b; });
    floats("sub", [](auto a, auto b) { return a - b; });
    floats("mul", [](auto a, auto b) { return a * b; });
    floats("div", [](auto a, auto b) { return a / b; });
    floats("max", [](auto a, auto b) { return larger(a, b); });
    floats("min", [](auto a, auto b) { return smaller(a, b); });
    define<f32, f32, f32>("copysign.f32", [](f32 a, f32 b) { return std::copysign(b, a); });
    define<f32, f32>("abs.f32", [](f32 a) { return std::fabs(a); });
    define<f64, f64>("abs.f64", [](f64 a) { return std::fabs(a); });
    define<f32, f32>("neg.f32", [](f32 a) { return -a; });
    define<f64, f64>("neg.f64", [](f64 a) { return -a; });
    define<f32, f32, f32, f32>("fma.rn.f32", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
    define<f64, f64, f64, f64>("fma.rn.f64", [](f64 a, f64 b, f64 c) { return std::fma(a, b, c); });
    define<f32, f32, f32, f32>("fma.rm.f32", [](f32 a, f32 b, f32 c) {
        const f64 product = static_cast<f64>(a) * b, sum = product + c;
        return round_down(sum, rest_of_sum(product, c, sum), false);
    });
    define<f32, f32, f32>("add.rz.f32", [](f32 a, f32 b) {
        const f64 sum = static_cast<f64>(a) + b;
        return round_down(sum, rest_of_sum(a, b, sum), true);
    });
    define<u32, u32, u32, u32>("fma.rn.bf16x2", [](u32 a, u32 b, u32 c) {
        // The sum in double is exact: products have 16 bits, and exponents of what is rounded here lie close.
        const auto half = [&](int shift) {
            const auto part = [&](u32 x) { return static_cast<f64>(as_float(x >> shift << 16)); };
            const f64 product = part(a) * part(b), sum = product + part(c);
            f32 odd = round_down(sum, rest_of_sum(product, part(c), sum), true);
            u32 bits;  // rounded to odd, so that rounding once more is rounding once
            std::memcpy(&bits, &odd, 4);
            if (std::isfinite(odd) && (static_cast<f64>(odd) != sum || rest_of_sum(product, part(c), sum) != 0))
                bits |= 1;
            return static_cast<u32>(to_bf16(as_float(bits)));
        };
        return half(0) | half(16) << 16;
    });
    define<f32, f32>("rcp.rn.f32", [](f32 a) { return 1.0f / a; });
    define<f32, f32>("sqrt.rn.f32", [](f32 a) { return std::sqrt(a); });
    define<f32, f32>("rsqrt.approx.f32", [](f32 a) { return static_cast<f32>(1.0 / std::sqrt(static_cast<f64>(a))); });
    define<f32, f32>("ex2.approx.ftz.f32",
                     [](f32 a) { return flush(static_cast<f32>(std::exp2(static_cast<f64>(flush(a))))); });

    conversion<u64, u32>("u64.u32"), conversion<s64, s32>("s64.s32"), conversion<u32, u64>("u32.u64");
    conversion<u16, u32>("u16.u32"), conversion<u32, u16>("u32.u16"), conversion<s32, s16>("s32.s16");
    conversion<u64, u16>("u64.u16"), conversion<u16, u64>("u16.u64");
    conversion<f64, f32>("f64.f32"), conversion<f32, f64>("rn.f32.f64"), conversion<f32, s32>("rn.f32.s32");
    conversion<f32, u32>("rn.f32.u32"), conversion<f32, s64>("rn.f32.s64"), conversion<f32, u64>("rn.f32.u64");
    conversion<f32, u16>("rn.f32.u16"), conversion<f32, s16>("rn.f32.s16");
    conversion<f64, s32>("rn.f64.s32"), conversion<f64, u64>("rn.f64.u64"), conversion<f64, s64>("rn.f64.s64");
    define<f32, u16>("cvt.f32.f16", [](u16 a) { return from_half(a); });
    define<u16, f32>("cvt.rn.bf16.f32", [](f32 a) { return to_bf16(a); });
    define<f32, f32>("cvt.rmi.f32.f32", [](f32 a) { return std::floor(a); });
    define<f32, f32>("cvt.sat.f32.f32", [](f32 a) { return a > 0.0f ? std::min(a, 1.0f) : 0.0f; });
    define<s32, f64>("cvt.rni.s32.f64", [](f64 a) { return saturate<s32>(std::nearbyint(a)); });
    define<s64, f32>("cvt.rzi.s64.f32", [](f32 a) { return saturate<s64>(std::trunc(a)); });
    define<s32, f32>("cvt.rzi.s32.f32", [](f32 a) { return saturate<s32>(std::trunc(a)); });
    define<u64, f64>("cvt.rzi.u64.f64", [](f64 a) { return saturate<u64>(std::trunc(a)); });

    define<u64, u64>("cvta.to.global.u64 cvta.global.u64", [](u64 a) { return a; });
    define<u64, u64>("cvta.shared.u64", [](u64 a) { return a + kSharedWindow; });
    define<u64, u64>("cvta.to.shared.u64", [](u64 a) { return a - kSharedWindow; });
    define<u64, u64>("cvta.local.u64", [](u64 a) { return a + kLocalWindow; });
    define<u64, u64>("cvta.to.local.u64", [](u64 a) { return a - kLocalWindow; });

    // The last operand is the mask of lanes.
    const std::vector<int> shuffled = {32, 1, 32, 32, 32, 32}, product(14, 32);
    enter("shfl.sync.up.b32", {&shuffle<Shuffle::up>, shuffled, Kind::together});
    enter("shfl.sync.down.b32", {&shuffle<Shuffle::down>, shuffled, Kind::together});
    enter("shfl.sync.bfly.b32", {&shuffle<Shuffle::bfly>, shuffled, Kind::together});
    enter("shfl.sync.idx.b32", {&shuffle<Shuffle::idx>, shuffled, Kind::together});
    enter("vote.sync.ballot.b32", {&ballot, {32, 1, 32}, Kind::together});
    enter("bar.warp.sync", {&warp_barrier, {32}, Kind::together});
    enter("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {&mma<true>, product, Kind::together});
    enter("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", {&mma<false>, product, Kind::together});
    enter("griddepcontrol.wait", {&wait_for_kernels, {}});
    // Kernels run one after another here, and what one thread has written all see.
    enter("griddepcontrol.launch_dependents membar.gl", {nullptr, {}});
}

template <class M>
Execute memory_of(const std::string& what, int width) {
    if (what == "ld") return width == 16 ? &load<M, u16> : width == 32 ? &load<M, u32> : &load<M, u64>;
    if (what == "st") return width == 16 ? &store<M, u16> : width == 32 ? &store<M, u32> : &store<M, u64>;
    return nullptr;
}

}  // namespace

// What is computed in 32 bits wraps there.
u64 address_of(Warp& w, const Instr& in, int lane) {
    if (in.base < 0) return static_cast<u64>(in.offset);
    const u32 slot = static_cast<u32>(in.base);
    return in.wide_base ? w.lanes<u64>(slot)[lane] + static_cast<u64>(in.offset)
                        : w.lanes<u32>(slot)[lane] + static_cast<u32>(in.offset);
}

const Opcode* find_opcode(const std::string& name) {
    if (table.empty()) fill_table();
    const auto found = table.find(name);
    return found == table.end() ? nullptr : &found->second;
}

int type_bytes(const std::string& type) {
    if (type.size() < 2 || std::string("busf").find(type[0]) == std::string::npos) return 0;
    const std::string bits = type.substr(1);
    return bits == "8" ? 1 : bits == "16" ? 2 : bits == "32" ? 4 : bits == "64" ? 8 : 0;
}

Execute memory_opcode(const std::string& what, const std::string& type, int width) {
    const int bytes = type_bytes(type);
    if (what == "atom.add") {
        if (width != bytes * 8) return nullptr;
        if (type == "f32") return &atomic_add<f32>;
        return type == "u32" || type == "s32" ? &atomic_add<u32> : type == "u64" ? &atomic_add<u64> : nullptr;
    }
    if (width < bytes * 8) return nullptr;
    const bool extends = type[0] == 's' && what == "ld";
    switch (bytes) {
        case 1:
            return extends ? memory_of<int8_t>(what, width) : memory_of<uint8_t>(what, width);
        case 2:
            return extends ? memory_of<s16>(what, width) : memory_of<u16>(what, width);
        case 4:
            return extends ? memory_of<s32>(what, width) : memory_of<u32>(what, width);
        case 8:
            return memory_of<u64>(what, width);
    }
    return nullptr;
}

}  // namespace ptx
}  // namespace simt
