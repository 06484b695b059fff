// A recorded sequence of operator calls. A decoded token is always the same hundred calls, on other inputs: recorded
// once, they are repeated in one call from Python, without its interpreter lock and without checking again what cannot
// have changed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>

#include "bindings/arguments.h"
#include "core/pool.h"

namespace deltaic {

inline std::atomic<int64_t> kernel_nanoseconds{0};  // in all kernels since the start

// Around kernels: one caller at a time, and their time counts.
class KernelScope {
  public:
    KernelScope() : start_(std::chrono::steady_clock::now()) {}
    ~KernelScope() {
        const std::chrono::nanoseconds taken = std::chrono::steady_clock::now() - start_;
        kernel_nanoseconds.fetch_add(taken.count(), std::memory_order_relaxed);
    }
    KernelScope(const KernelScope&) = delete;
    KernelScope& operator=(const KernelScope&) = delete;
    void next() { scope_.next(); }  // between two kernels

  private:
    OperatorScope scope_;
    std::chrono::steady_clock::time_point start_;
};

// A new float32 array that begins a cache line: a vector of 16 numbers is then one line.
inline py::array new_f32(const py::tuple& shape) {
    constexpr size_t kLine = 64;
    const auto sizes = shape.cast<std::vector<py::ssize_t>>();
    py::ssize_t n = 1;
    for (const py::ssize_t size : sizes) n *= size;
    const py::array_t<float> memory(n + static_cast<py::ssize_t>(kLine / sizeof(float)));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return py::array_t<float>(sizes, memory.data() + (kLine - address % kLine) % kLine / sizeof(float), memory);
}

// One call with its arguments; `run` is called within a KernelScope.
class AnyStep {
  public:
    virtual ~AnyStep() = default;
    virtual void run() const = 0;
    virtual std::vector<View*> views() = 0;
    virtual std::vector<const BlockTable*>& tables() = 0;
};

template <class... A>
class Step final : public AnyStep {
  public:
    Step(void (*function)(A...), const std::tuple<A...>& values, std::vector<View> items,
         std::vector<const BlockTable*> tables)
        : function_(function), values_(values), items_(std::move(items)), tables_(std::move(tables)) {}

    void run() const override { std::apply(function_, values_); }

    std::vector<View*> views() override {
        std::vector<View*> found;
        const auto visit = [&](auto& value) {
            if constexpr (std::is_same_v<std::remove_reference_t<decltype(value)>, View>) found.push_back(&value);
        };
        std::apply([&](auto&... value) { (visit(value), ...); }, values_);
        for (View& item : items_) found.push_back(&item);
        return found;
    }

    std::vector<const BlockTable*>& tables() override { return tables_; }

  private:
    void (*function_)(A...);
    std::tuple<A...> values_;
    std::vector<View> items_;                // of list arguments; values_ points into them
    std::vector<const BlockTable*> tables_;  // likewise
};

// Inputs are arrays, block tables, None, and lists of these. An argument that lies in an input is found at the same
// place of the input of the same number when the tape is replayed, and so is an output; everything else is the tape's
// own or is kept alive by it.
class Tape {
  public:
    // The tape that records what this thread calls, or null.
    static Tape*& recording() {
        static thread_local Tape* tape = nullptr;
        return tape;
    }

    // Calls run(*inputs), which returns arrays, and remembers the operators that it calls. Returns copies of the
    // arrays.
    py::tuple record(const py::list& inputs, const py::function& run) {
        if (recording()) throw Error("Tape: another tape is being recorded");
        if (!inputs_.empty() || !steps_.empty()) throw Error("Tape: it is recorded already; make a new one");
        inputs_ = inputs_of(inputs);
        for (size_t i = 0; i < inputs_.size(); ++i)
            for (size_t j = 0; j < i; ++j)
                if (inputs_[i].begin < inputs_[j].end && inputs_[j].begin < inputs_[i].end)
                    throw Error("Tape: inputs " + std::to_string(j) + " and " + std::to_string(i) +
                                " overlap; a tape cannot tell them apart");
        recording() = this;
        try {
            const py::tuple found = run(*inputs);
            recording() = nullptr;
            for (const py::handle value : found) outputs_.push_back(output_of(value));
        } catch (...) {
            recording() = nullptr;
            throw;
        }
        std::vector<Copy> copies;
        const py::tuple results = new_results(inputs_, copies);
        for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
        return results;
    }

    size_t size() const { return steps_.size(); }

    // Runs a step and remembers it.
    void add(std::unique_ptr<AnyStep> step, const py::args& args) {
        for (const py::handle value : args) keep(value);
        {
            const py::gil_scoped_release released;
            const KernelScope scope;
            step->run();
        }
        for (View* view : step->views()) {
            const char* data = static_cast<const char*>(view->data);
            for (size_t i = 0; i < inputs_.size(); ++i)
                if (data && inputs_[i].begin <= data && data < inputs_[i].end)
                    places_.push_back({view, i, data - inputs_[i].begin});
        }
        for (const BlockTable*& table : step->tables())
            for (size_t i = 0; i < inputs_.size(); ++i)
                if (inputs_[i].table == table) table_places_.push_back({&table, i});
        steps_.push_back(std::move(step));
    }

    // A float32 array for an output: one that nobody but the tape refers to any more, else a new one.
    py::array buffer(const py::tuple& shape) {
        for (const py::array& array : buffers_) {
            if (array.ref_count() > 1 || static_cast<size_t>(array.ndim()) != shape.size()) continue;
            bool same = true;
            for (size_t i = 0; i < shape.size(); ++i)
                same = same && array.shape(static_cast<py::ssize_t>(i)) == shape[i].cast<py::ssize_t>();
            if (same) return array;
        }
        buffers_.push_back(new_f32(shape));
        return buffers_.back();
    }

    // Repeats all steps on other inputs of the same shapes and returns copies of the outputs.
    py::tuple replay(const py::list& inputs) {
        const std::vector<Input> now = inputs_of(inputs);
        if (now.size() != inputs_.size())
            throw Error("Tape: takes " + std::to_string(inputs_.size()) + " inputs, got " + std::to_string(now.size()));
        for (size_t i = 0; i < now.size(); ++i)
            if (!now[i].like(inputs_[i]))
                throw Error("Tape: input " + std::to_string(i) + " is " + now[i].shown() + ", expected " +
                            inputs_[i].shown());
        std::vector<Copy> copies;
        py::tuple results = new_results(now, copies);
        const py::gil_scoped_release released;
        const std::lock_guard<std::mutex> alone(running_);
        for (const Place& p : places_) p.view->data = now[p.input].begin + p.offset;
        for (const TablePlace& p : table_places_) *p.table = now[p.input].table;
        {
            KernelScope scope;
            for (const auto& step : steps_) {
                step->run();
                scope.next();
            }
        }
        for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
        return results;
    }

  private:
    struct Input {
        View view;
        const char* dtype = "table";
        const BlockTable* table = nullptr;
        char *begin = nullptr, *end = nullptr;

        bool like(const Input& other) const {
            return !table == !other.table && view.dtype == other.view.dtype && view.ndim == other.view.ndim &&
                   std::memcmp(view.shape, other.view.shape, sizeof view.shape) == 0;
        }
        std::string shown() const { return table ? "a table" : begin ? show(dtype, view.shape, view.ndim) : "nothing"; }
    };
    struct Output {
        py::array array;
        size_t input;    // in which it lies, or kOwn
        int64_t offset;  // there
    };
    struct Place {
        View* view;
        size_t input;
        int64_t offset;
    };
    struct Copy {
        void* to;
        const void* from;
        size_t bytes;
    };
    struct TablePlace {
        const BlockTable** table;
        size_t input;
    };

    static void add_input(py::handle value, std::vector<Input>& found) {
        if (PyList_Check(value.ptr())) {
            for (const py::handle item : py::reinterpret_borrow<py::list>(value)) add_input(item, found);
            return;
        }
        Input input;
        if (value.is_none()) {
        } else if (!py::isinstance<py::array>(value)) {
            if (!py::isinstance<PyBlockTable>(value))
                throw Error("Tape: an input is neither a numpy array nor a BlockTable");
            input.table = &value.cast<const PyBlockTable&>().table;
        } else {
            const auto array = py::reinterpret_borrow<py::array>(value);
            input.view = view_of(array, &input.dtype);
            if (std::strcmp(input.dtype, "unsupported") == 0 || !(array.flags() & py::array::c_style))
                throw Error("Tape: an input is of an unsupported dtype or not C-contiguous");
            input.begin = static_cast<char*>(input.view.data);
            input.end = input.begin + array.nbytes();
        }
        found.push_back(input);
    }

    std::vector<Input> inputs_of(const py::list& values) const {
        std::vector<Input> found;
        found.reserve(inputs_.size());
        for (const py::handle value : values) add_input(value, found);
        return found;
    }

    Output output_of(py::handle value) const {
        if (!py::isinstance<py::array>(value)) throw Error("Tape: an output is not a numpy array");
        Output output{py::reinterpret_borrow<py::array>(value), kOwn, 0};
        const char* data = static_cast<const char*>(output.array.data());
        for (size_t i = 0; i < inputs_.size(); ++i)
            if (inputs_[i].begin <= data && data < inputs_[i].end)
                output.input = i, output.offset = data - inputs_[i].begin;
        return output;
    }

    // Arrays for the outputs, and what has to be copied there once the steps have run on the inputs `now`.
    py::tuple new_results(const std::vector<Input>& now, std::vector<Copy>& copies) const {
        py::tuple results(outputs_.size());
        copies.reserve(outputs_.size());
        for (size_t i = 0; i < outputs_.size(); ++i) {
            const auto& [array, input, offset] = outputs_[i];
            const py::array result(array.dtype(), {array.shape(), array.shape() + array.ndim()});
            const void* from = input == kOwn ? array.data() : now[input].begin + offset;
            copies.push_back({const_cast<void*>(result.data()), from, static_cast<size_t>(array.nbytes())});
            results[i] = result;
        }
        return results;
    }

    // Keeps an argument alive, unless it is an input or one of `buffers_`.
    void keep(py::handle value) {
        if (py::isinstance<py::list>(value)) {
            for (const py::handle item : py::reinterpret_borrow<py::list>(value)) keep(item);
        } else if (py::isinstance<PyBlockTable>(value)) {
            const BlockTable* table = &value.cast<const PyBlockTable&>().table;
            for (const Input& input : inputs_)
                if (input.table == table) return;
            kept_.push_back(py::reinterpret_borrow<py::object>(value));
        } else if (py::isinstance<py::array>(value)) {
            for (const py::array& array : buffers_)
                if (array.is(value)) return;
            const char* data = static_cast<const char*>(py::reinterpret_borrow<py::array>(value).data());
            for (const Input& input : inputs_)
                if (input.begin <= data && data < input.end) return;
            kept_.push_back(py::reinterpret_borrow<py::object>(value));
        } else if (py::isinstance<PyWeight>(value)) {
            kept_.push_back(py::reinterpret_borrow<py::object>(value));
        }
    }

    static constexpr size_t kOwn = SIZE_MAX;

    std::vector<Input> inputs_;
    std::vector<Output> outputs_;
    std::vector<std::unique_ptr<AnyStep>> steps_;
    std::vector<Place> places_;
    std::vector<TablePlace> table_places_;
    std::vector<py::array> buffers_;
    std::vector<py::object> kept_;
    std::mutex running_;
};

}  // namespace deltaic
