#include "core/contract.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

namespace deltaic {
namespace {

std::string trim(const std::string& s) {
    size_t a = 0, b = s.size();
    while (a < b && std::isspace(static_cast<unsigned char>(s[a]))) ++a;
    while (b > a && std::isspace(static_cast<unsigned char>(s[b - 1]))) --b;
    return s.substr(a, b - a);
}

std::vector<std::string> split(const std::string& s, char separator) {
    std::vector<std::string> parts;
    size_t begin = 0;
    while (begin <= s.size()) {
        size_t end = s.find(separator, begin);
        if (end == std::string::npos) end = s.size();
        parts.push_back(trim(s.substr(begin, end - begin)));
        begin = end + 1;
    }
    return parts;
}

bool is_name(const std::string& s) { return !s.empty() && std::isalpha(static_cast<unsigned char>(s[0])); }

}  // namespace

std::string show(const char* dtype, const int64_t* dims, int ndim) {
    std::string s = std::string(dtype) + "[";
    for (int i = 0; i < ndim; ++i) s.append(i ? "," : "").append(std::to_string(dims[i]));
    return s + "]";
}

Contract::Contract(const char* op_name, const char* text) : op(op_name) {
    for (const std::string& entry : split(text, ';')) {
        Argument a;
        const size_t space = entry.find(' ');
        a.name = entry.substr(0, space);
        std::string rest = trim(entry.substr(space));
        std::vector<std::string> dims;
        const size_t bracket = rest.find('[');
        if (bracket != std::string::npos) {
            dims = split(rest.substr(bracket + 1, rest.size() - bracket - 2), ',');
            rest = rest.substr(0, bracket);
        }
        const size_t star = rest.find('*');
        if (star != std::string::npos) {
            a.list = rest.substr(star + 1);
            rest = rest.substr(0, star);
            a.size = add_name(a.list);
        }
        for (; rest.ends_with('?') || rest.ends_with('!'); rest.pop_back())
            (rest.back() == '?' ? a.optional : a.written) = true;
        a.type = rest;
        a.kind = rest == "weight"                      ? Kind::weight
                 : rest == "table"                     ? Kind::table
                 : rest == "int"                       ? Kind::integer
                 : rest == "float" || rest == "double" ? Kind::number
                                                       : Kind::array;
        if (a.kind == Kind::integer) a.size = add_name(a.name);
        for (const std::string& dim : dims) a.dims.push_back(parse_dim(dim));
        arguments.push_back(a);
    }
}

int Contract::name_index(const std::string& name) const {
    for (size_t i = 0; i < names.size(); ++i)
        if (names[i] == name) return static_cast<int>(i);
    return -1;
}

int Contract::add_name(const std::string& name) {
    const int index = name_index(name);
    if (index >= 0) return index;
    names.push_back(name);
    return static_cast<int>(names.size()) - 1;
}

Dim Contract::parse_dim(const std::string& text) {
    Dim dim;
    dim.text = text;
    dim.any = text == "_";
    if (dim.any) return dim;
    for (const std::string& part : split(text, '+')) {
        Dim::Term term;
        for (const std::string& factor : split(part, '*')) {
            if (is_name(factor)) {
                term.names.push_back(add_name(factor));
            } else {
                term.number *= std::strtoll(factor.c_str(), nullptr, 10);
            }
        }
        dim.terms.push_back(term);
    }
    if (is_name(text) && text.find_first_of("+*") == std::string::npos) dim.name = dim.terms[0].names[0];
    return dim;
}

int64_t Sizes::evaluate(const Dim& dim) const {
    int64_t sum = 0;
    for (const Dim::Term& term : dim.terms) {
        int64_t product = term.number;
        for (const int name : term.names) {
            const int64_t value = known_[static_cast<size_t>(name)];
            if (value < 0) return -1;
            product *= value;
        }
        sum += product;
    }
    return sum;
}

void Sizes::mismatch(const Argument& argument, const std::string& shown) const {
    std::string expected = argument.type + "[";
    for (size_t i = 0; i < argument.dims.size(); ++i) {
        const Dim& dim = argument.dims[i];
        expected += (i ? "," : "") + dim.text;
        const int64_t value = dim.any ? -1 : evaluate(dim);
        if (value >= 0 && is_name(dim.text)) expected.append("=").append(std::to_string(value));
    }
    throw Error(contract_.op + ": " + argument.name + " is " + shown + ", expected " + expected + "]");
}

void Sizes::integer(const Argument& argument, int64_t value) {
    int64_t& known = known_[static_cast<size_t>(argument.size)];
    if (value >= 0 && known >= 0 && known != value)
        throw Error(contract_.op + ": " + argument.name + " is " + std::to_string(value) + ", expected " +
                    std::to_string(known));
    if (value >= 0) known = value;
}

void Sizes::list(const Argument& argument, int64_t size) {
    int64_t& known = known_[static_cast<size_t>(argument.size)];
    if (known < 0) known = size;
    if (known != size)
        throw Error(contract_.op + ": " + argument.name + " is a list of " + std::to_string(size) + ", expected " +
                    std::to_string(known));
}

void Sizes::shape(const Argument& argument, const char* dtype, const int64_t* dims, int ndim) {
    const bool type_fits =
        argument.type == dtype ||
        (argument.type == "kv" && (std::strcmp(dtype, "f32") == 0 || std::strcmp(dtype, "u16") == 0));
    if (!type_fits || static_cast<size_t>(ndim) != argument.dims.size()) mismatch(argument, show(dtype, dims, ndim));
    // The text is needed for errors only; the common case must not build it.
    for (int i = 0; i < ndim; ++i) {
        const Dim& dim = argument.dims[static_cast<size_t>(i)];
        if (dim.any) continue;
        if (dim.name >= 0 && known_[static_cast<size_t>(dim.name)] < 0) known_[static_cast<size_t>(dim.name)] = dims[i];
        const int64_t expected = evaluate(dim);
        if (expected < 0) {
            pending_.push_back({&argument, &dim, dims[i], show(dtype, dims, ndim)});
        } else if (expected != dims[i]) {
            mismatch(argument, show(dtype, dims, ndim));
        }
    }
}

void Sizes::finish() {
    for (const Pending& p : pending_) {
        const int64_t expected = evaluate(*p.dim);
        if (expected != p.found) mismatch(*p.argument, p.shown);
    }
}

}  // namespace deltaic
