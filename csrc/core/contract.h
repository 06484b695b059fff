// Turns an operator's contract text (ops.h) into checks. The binding feeds it one argument after another; sizes are
// compared by name, and whatever does not fit is reported as `op: argument is f32[7], expected f32[D=8]`.
#pragma once

#include <string>
#include <vector>

#include "core/view.h"

namespace deltaic {

// A size of an array: sums of products of names and numbers, taken apart once.
struct Dim {
    struct Term {
        int64_t number = 1;      // product of the numbers in it
        std::vector<int> names;  // indices into Contract::names
    };
    std::string text;
    bool any = false;  // `_`
    int name = -1;     // of a size that is one name
    std::vector<Term> terms;
};

enum class Kind { array, weight, table, integer, number };

struct Argument {
    std::string name;
    Kind kind = Kind::array;
    std::string type;       // f32, u8, u16, i64, kv, weight, table, int, float, double
    bool optional = false;  // may be None
    bool written = false;   // the operator writes to it
    std::string list;       // size name of a list argument, or empty
    int size = -1;          // index of that name, or of an integer's own
    std::vector<Dim> dims;
};

struct Contract {
    std::string op;
    std::vector<Argument> arguments;
    std::vector<std::string> names;  // all size names, in order of appearance

    Contract(const char* op, const char* text);
    int name_index(const std::string& name) const;  // -1 where unknown

  private:
    int add_name(const std::string& name);
    Dim parse_dim(const std::string& text);
};

// The sizes seen during one call.
class Sizes {
  public:
    explicit Sizes(const Contract& contract) : contract_(contract), known_(contract.names.size(), -1) {}

    void integer(const Argument& argument, int64_t value);
    void list(const Argument& argument, int64_t size);
    void shape(const Argument& argument, const char* dtype, const int64_t* dims, int ndim);
    // Compares everything that was put off because a size was not known yet.
    void finish();

  private:
    struct Pending {
        const Argument* argument;
        const Dim* dim;
        int64_t found;
        std::string shown;
    };
    int64_t evaluate(const Dim& dim) const;  // -1: not known yet
    [[noreturn]] void mismatch(const Argument& argument, const std::string& shown) const;

    const Contract& contract_;
    std::vector<int64_t> known_;
    std::vector<Pending> pending_;
};

std::string show(const char* dtype, const int64_t* dims, int ndim);

}  // namespace deltaic
