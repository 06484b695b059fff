// How Python values become the arguments of an operator: arrays in, views out, contract checked.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/contract.h"
#include "core/error.h"
#include "core/view.h"

namespace deltaic {

namespace py = pybind11;

struct PyWeight {
    Weight weight;
    std::vector<py::array> arrays;  // keeps the packed bytes alive
};

struct PyBlockTable {
    BlockTable table;
    std::vector<void*> pointers;
    std::vector<py::array> arrays;
};

inline View view_of(const py::array& array, const char** dtype_name) {
    using Numpy = py::detail::npy_api;
    View v;
    // The structs behind the handles: a py::dtype made for every array of every call would cost more than the rest.
    const auto* a = py::detail::array_proxy(array.ptr());
    const auto* descr = py::detail::array_descriptor_proxy(a->descr);
    const int type = descr->byteorder == '=' || descr->byteorder == '|' ? descr->type_num : -1;
    if (type == Numpy::NPY_FLOAT_) {
        v.dtype = Dtype::f32, *dtype_name = "f32";
    } else if (type == Numpy::NPY_USHORT_) {
        v.dtype = Dtype::u16, *dtype_name = "u16";
    } else if (type == Numpy::NPY_UBYTE_) {
        v.dtype = Dtype::u8, *dtype_name = "u8";
    } else if (type == Numpy::NPY_LONGLONG_ || (sizeof(long) == 8 && type == Numpy::NPY_LONG_)) {
        v.dtype = Dtype::i64, *dtype_name = "i64";
    } else {
        *dtype_name = "unsupported";
    }
    v.data = a->data;
    v.ndim = a->nd;
    for (int i = 0; i < v.ndim && i < 5; ++i) v.shape[i] = a->dimensions[i];
    return v;
}

// One call of an operator: converts the arguments in order and remembers the sizes.
class Call {
  public:
    Call(const Contract& contract, const py::args& args) : contract_(contract), sizes_(contract), args_(args) {
        if (args.size() != contract.arguments.size())
            throw Error(contract.op + ": takes " + std::to_string(contract.arguments.size()) + " arguments, got " +
                        std::to_string(args.size()));
        size_t items = 0;  // neither vector may move while pointers into it are handed out
        for (const py::handle value : args)
            if (py::isinstance<py::list>(value)) items += py::len(value);
        views_.reserve(items), tables_.reserve(items);
    }

    template <class T>
    T next() {
        const Argument& argument = contract_.arguments[index_];
        const py::handle value = args_[index_++];
        if constexpr (std::is_same_v<T, View>) {
            return array(argument, value);
        } else if constexpr (std::is_same_v<T, Views>) {
            const py::sequence items = sequence(argument, value);
            const size_t first = views_.size();
            for (const py::handle item : items) views_.push_back(array(argument, item));
            return Views{views_.data() + first, static_cast<int64_t>(items.size())};
        } else if constexpr (std::is_same_v<T, const Weight&>) {
            if (!py::isinstance<PyWeight>(value)) fail(argument, "is not a packed weight");
            const Weight& w = value.cast<const PyWeight&>().weight;
            const int64_t dims[3] = {w.count, w.rows, w.columns};
            const bool experts = argument.dims.size() == 3;
            if (!experts && w.count != 1) fail(argument, "holds several experts, expected one matrix");
            sizes_.shape(argument, "weight", experts ? dims : dims + 1, experts ? 3 : 2);
            return w;
        } else if constexpr (std::is_same_v<T, Tables>) {
            const py::sequence items = sequence(argument, value);
            const size_t first = tables_.size();
            for (const py::handle item : items) {
                if (!py::isinstance<PyBlockTable>(item)) fail(argument, "holds something that is not a BlockTable");
                tables_.push_back(&item.cast<const PyBlockTable&>().table);
            }
            return Tables{tables_.data() + first, static_cast<int64_t>(items.size())};
        } else if constexpr (std::is_integral_v<T>) {
            if (!py::isinstance<py::int_>(value)) fail(argument, "is not an int");
            const T number = value.cast<T>();
            sizes_.integer(argument, number);
            return number;
        } else {
            return value.cast<T>();
        }
    }

    void finish() { sizes_.finish(); }

    // What the views and tables handed out point into; they stay valid when it is moved.
    std::vector<View> take_views() { return std::move(views_); }
    std::vector<const BlockTable*> take_tables() { return std::move(tables_); }

  private:
    [[noreturn]] void fail(const Argument& argument, const char* what) const {
        throw Error(contract_.op + ": " + argument.name + " " + what);
    }

    py::sequence sequence(const Argument& argument, py::handle value) {
        if (!py::isinstance<py::list>(value)) fail(argument, "is not a list");
        auto items = py::reinterpret_borrow<py::sequence>(value);
        sizes_.list(argument, static_cast<int64_t>(items.size()));
        return items;
    }

    View array(const Argument& argument, py::handle value) {
        if (value.is_none() && argument.optional) return View{};
        if (!py::isinstance<py::array>(value)) fail(argument, "is not a numpy array");
        const auto a = py::reinterpret_borrow<py::array>(value);
        const char* dtype = nullptr;
        const View v = view_of(a, &dtype);
        if (!(a.flags() & py::array::c_style)) fail(argument, "is not C-contiguous");
        if (argument.written && !a.writeable()) fail(argument, "is read-only, but the operator writes to it");
        sizes_.shape(argument, dtype, v.shape, v.ndim);
        return v;
    }

    const Contract& contract_;
    Sizes sizes_;
    const py::args& args_;
    size_t index_ = 0;
    std::vector<View> views_;
    std::vector<const BlockTable*> tables_;
};

}  // namespace deltaic
