// What the kernel tests are made of: random arrays, poisoned outputs, packed weights and comparisons. Test functions
// are called test_<operator> and are declared from the list in ops.h: an operator without a test does not link.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "core/isa.h"
#include "core/pool.h"
#include "ops.h"

namespace deltaic::test {

using Numbers = std::vector<double>;
using Shape = std::vector<int64_t>;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
    double uniform();  // [0, 1)
    double normal();
    int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * static_cast<double>(n)); }

  private:
    uint64_t state_;
};

template <class T>
struct Array {
    Shape shape;
    std::vector<T> data;

    explicit Array(Shape s) : shape(std::move(s)) {
        int64_t size = 1;
        for (const int64_t n : shape) size *= n;
        data.resize(static_cast<size_t>(size));
    }
    T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
    const T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
    int64_t size() const { return static_cast<int64_t>(data.size()); }
    View view() {
        View v;
        v.data = data.data();
        v.dtype = std::is_same_v<T, float>      ? Dtype::f32
                  : std::is_same_v<T, uint16_t> ? Dtype::u16
                  : std::is_same_v<T, uint8_t>  ? Dtype::u8
                                                : Dtype::i64;
        v.ndim = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) v.shape[i] = shape[i];
        return v;
    }
};

using Floats = Array<float>;
using Bytes = Array<uint8_t>;
using Integers = Array<int64_t>;

Floats normal(Random& random, Shape shape, double scale = 1.0);
Floats poisoned(Shape shape);            // all NaN: an element that is not written shows
Integers offsets(const Shape& lengths);  // cu_seqlens
Numbers wide(const Floats& x);           // as double
uint16_t to_bf16(double value);
double from_bf16(uint16_t bits);
double from_half(const uint8_t* p);  // two bytes

// y = W x over stored values, and the other small pieces of the formulas, in double.
double silu(double x);
double sigmoid(double x);
Numbers rms_norm(const double* x, const Floats& weight, double eps);

class Suite;

// Random matrices [count][rows][K] in one format, packed by the operator under test and read back here by the layout in
// view.h.
struct Packed {
    Weight weight;
    std::vector<Bytes> bytes;
    Floats source;   // [count * rows, K] what was packed; gate rows, then up rows of each, if glu
    Numbers values;  // the same as stored
    int64_t rows = 0;

    double at(int64_t expert, int64_t row, int64_t k) const {
        return values[static_cast<size_t>((expert * rows + row) * weight.columns + k)];
    }
};

struct Part {
    int64_t rows;
    Format format;
};

Packed pack(Suite& t, Random& random, const std::vector<Part>& parts, int64_t K, int64_t count = 1);
Packed pack_glu(Suite& t, Random& random, int64_t rows, int64_t K, Format format, int64_t count = 1);

// One operator of one instruction set: counts its checks.
class Suite {
  public:
    Suite(const Isa& isa, const char* name)
        : ops(*isa.ops),
          rounds_to_bf16(isa.numerics->rounds_to_bf16),
          int8_kv_bits(isa.numerics->int8_kv_bits),
          name_(name) {}

    const Ops& ops;
    // Whether it multiplies bfloat16 pairs where an operator is free to: what meets bf16 matrices without
    // float_activations, and in attention.
    const bool rounds_to_bf16;
    // Bits of what the int8 keys and values of a decoded row meet; 24 of a float.
    const int int8_kv_bits;
    int passed = 0, failed = 0;
    uint64_t hash = 1469598103934665603ull;  // of every output compared

    void check(bool ok, const std::string& what);
    // |found - expected| <= tolerance * largest |expected|, element by element; NaN fails.
    void close(const Floats& found, const Numbers& expected, double tolerance, const std::string& what);
    void same_bits(const Floats& found, const Floats& expected, const std::string& what);

    template <class F>
    void call(const F& body) {
        const OperatorScope scope;
        body();
    }
    template <class F>
    void refuses(const std::string& what, const F& body) {
        bool refused = false;
        try {
            body();  // applies the operator through call()
        } catch (const Error&) {
            refused = true;
        }
        check(refused, what + " is refused");
    }

  private:
    const char* name_;
};

// What `isa`, one of the list, computes of integer formats is what the others do.
void check_agreement(const Isa* list, int isas, const Isa& isa, int* passed, int* failed);

// parallel_for covers its range, whatever the timing.
void check_pool(int* passed, int* failed);

#define X(name, contract, arguments) void test_##name(Suite&);
DELTAIC_OPS(X)
#undef X

}  // namespace deltaic::test
