#include "check.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace deltaic::test {

double Random::uniform() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<double>(state_ >> 11) * 0x1p-53;
}

double Random::normal() {
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(6.283185307179586 * uniform());
}

Floats normal(Random& random, Shape shape, double scale) {
    Floats x(std::move(shape));
    for (float& v : x.data) v = static_cast<float>(scale * random.normal());
    return x;
}

Floats poisoned(Shape shape) {
    Floats x(std::move(shape));
    for (float& v : x.data) v = std::numeric_limits<float>::quiet_NaN();
    return x;
}

Integers offsets(const Shape& lengths) {
    Integers x({static_cast<int64_t>(lengths.size()) + 1});
    for (size_t i = 0; i < lengths.size(); ++i)
        x[static_cast<int64_t>(i) + 1] = x[static_cast<int64_t>(i)] + lengths[i];
    return x;
}

Numbers wide(const Floats& x) { return Numbers(x.data.begin(), x.data.end()); }

uint16_t to_bf16(double value) {
    const float f = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // nearest even; callers have no NaN
}

double from_bf16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

Numbers rms_norm(const double* x, const Floats& weight, double eps) {
    const int64_t D = weight.size();
    double squares = 0.0;
    for (int64_t i = 0; i < D; ++i) squares += x[i] * x[i];
    Numbers y(static_cast<size_t>(D));
    for (int64_t i = 0; i < D; ++i)
        y[static_cast<size_t>(i)] = (1.0 + weight[i]) * x[i] / std::sqrt(squares / static_cast<double>(D) + eps);
    return y;
}

double from_half(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits >> 15 ? -magnitude : magnitude;
}

namespace {

// Element (row r, column k) of one block of 16 rows: the layouts of core/view.h.
double stored(Format format, const uint8_t* block, int64_t K, int64_t r, int64_t k) {
    const int64_t runs = ceil_div(K, 128), run = k / 128, c = k % 128;
    switch (format) {
        case Format::f32: {
            float value;
            std::memcpy(&value, block + (k * 16 + r) * 4, 4);
            return value;
        }
        case Format::bf16: {
            uint16_t value;
            std::memcpy(&value, block + (k / 2 * 32 + r * 2 + k % 2) * 2, 2);
            return from_bf16(value);
        }
        case Format::int8: {
            const int q = block[runs * 32 + run * 2048 + c / 4 * 64 + r * 4 + c % 4] - 128;
            return q * from_half(block + (run * 16 + r) * 2);
        }
        default: {
            const int64_t g = c / 16;
            const int byte = block[runs * 96 + run * 1024 + g * 128 + c % 16 / 8 * 64 + r * 4 + c % 4];
            const int scales = block[runs * 32 + run * 64 + g / 2 * 16 + r];
            const int q = (c / 4 % 2 ? byte >> 4 : byte & 15) - 8, s = (g % 2 ? scales >> 4 : scales & 15) + 1;
            return q * s * from_half(block + (run * 16 + r) * 2);
        }
    }
}

// Packs rows [first, first + rows) of every expert of p.source as segment `g`, block b at b * step + start, and reads
// them back.
void pack_rows(Suite& t, Packed& p, int64_t segment, Format format, int64_t first, int64_t rows, int64_t start,
               int64_t step) {
    const int64_t K = p.weight.columns, bytes = block_bytes(format, K),
                  per_expert = p.weight.segment[segment].blocks * bytes;
    Bytes& out = p.bytes[static_cast<size_t>(segment)];
    for (int64_t e = 0; e < p.weight.count; ++e) {
        Floats source({rows, K});
        for (int64_t i = 0; i < rows * K; ++i) source[i] = p.source[(e * p.rows + first) * K + i];
        View packed = out.view();
        packed.data = out.data.data() + e * per_expert;
        packed.shape[0] = per_expert;
        t.call([&] { t.ops.pack(source.view(), static_cast<int64_t>(format), start, step, packed); });
        for (int64_t n = 0; n < rows; ++n) {
            const uint8_t* block = out.data.data() + e * per_expert + (start + n / 16 * step) * bytes;
            for (int64_t k = 0; k < K; ++k)
                p.values[static_cast<size_t>((e * p.rows + first + n) * K + k)] = stored(format, block, K, n % 16, k);
        }
    }
}

Packed empty(Random& random, int64_t rows, int64_t K, int64_t count) {
    Packed p{Weight{}, {}, normal(random, {count * rows, K}, 1.0 / std::sqrt(static_cast<double>(K))), {}, rows};
    p.values.resize(p.source.data.size());
    p.weight.count = count, p.weight.columns = K, p.weight.rows = rows;
    return p;
}

void add_segment(Packed& p, Format format, int64_t rows, int64_t blocks) {
    Segment& g = p.weight.segment[p.weight.segments++];
    g.format = format, g.rows = rows, g.blocks = blocks;
    p.bytes.emplace_back(Shape{p.weight.count * blocks * block_bytes(format, p.weight.columns)});
    for (uint8_t& b : p.bytes.back().data) b = 0xff;
    g.data = p.bytes.back().data.data();
}

}  // namespace

Packed pack(Suite& t, Random& random, const std::vector<Part>& parts, int64_t K, int64_t count) {
    int64_t rows = 0, segment = 0, first = 0;
    for (const Part& part : parts) rows += part.rows;
    Packed p = empty(random, rows, K, count);
    for (const Part& part : parts) add_segment(p, part.format, part.rows, ceil_div(part.rows, 16));
    for (const Part& part : parts) {
        pack_rows(t, p, segment++, part.format, first, part.rows, 0, 1);
        first += part.rows;
    }
    return p;
}

Packed pack_glu(Suite& t, Random& random, int64_t rows, int64_t K, Format format, int64_t count) {
    Packed p = empty(random, 2 * rows, K, count);
    p.weight.glu = true;
    add_segment(p, format, 2 * rows, 2 * ceil_div(rows, 16));
    pack_rows(t, p, 0, format, 0, rows, 0, 2);
    pack_rows(t, p, 0, format, rows, rows, 1, 2);
    return p;
}

void Suite::check(bool ok, const std::string& what) {
    ++(ok ? passed : failed);
    if (!ok) std::printf("    FAILED %s: %s\n", name_, what.c_str());
}

void Suite::close(const Floats& found, const Numbers& expected, double tolerance, const std::string& what) {
    double largest = 0.0, worst = -1.0;
    size_t place = 0;
    for (const double e : expected) largest = std::max(largest, std::fabs(e));
    bool ok = found.data.size() == expected.size();
    for (size_t i = 0; ok && i < expected.size(); ++i) {
        double error = std::fabs(static_cast<double>(found.data[i]) - expected[i]);
        if (!(error >= 0.0)) error = std::numeric_limits<double>::infinity();  // NaN
        if (error > worst) worst = error, place = i;
        uint32_t bits;
        std::memcpy(&bits, &found.data[i], 4);
        hash = (hash ^ bits) * 1099511628211ull;
    }
    ok = ok && worst <= tolerance * largest;
    std::string text = what;
    if (!ok && found.data.size() == expected.size())
        text += " [" + std::to_string(place) + "] is " + std::to_string(found.data[place]) + ", expected " +
                std::to_string(expected[place]) + ", allowed difference " + std::to_string(tolerance * largest);
    check(ok, text);
}

void Suite::same_bits(const Floats& found, const Floats& expected, const std::string& what) {
    check(found.data.size() == expected.data.size() &&
              (found.data.empty() || std::memcmp(found.data.data(), expected.data.data(), found.data.size() * 4) == 0),
          what + " gives the same bits");
}

}  // namespace deltaic::test
