// The Python extension: arrays in, views out, contract checked, GIL released. Nothing here knows an operator by name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/tape.h"
#include "core/isa.h"
#include "core/pool.h"
#include "ops.h"

namespace deltaic {
namespace {

const char* const kFormats[] = {"f32", "bf16", "int8", "int4"};  // order of enum Format

const Isa* chosen = nullptr;

template <class... A>
void define(py::module_& m, const char* name, const char* text, void (*function)(A...)) {
    auto* contract = new Contract(name, text);  // lives as long as the module
    if (contract->arguments.size() != sizeof...(A))
        throw Error(std::string(name) + ": contract and arguments differ in ops.h");
    m.def(
        name,
        [contract, function](const py::args& args) {
            Call call(*contract, args);
            std::tuple<A...> values{call.template next<A>()...};  // braces: left to right
            call.finish();
            if (Tape* tape = Tape::recording()) {
                tape->add(std::make_unique<Step<A...>>(function, values, call.take_views(), call.take_tables()), args);
                return;
            }
            const py::gil_scoped_release released;
            const KernelScope scope;
            std::apply(function, values);
        },
        text);
}

Format format_of(const std::string& name) {
    for (size_t i = 0; i < std::size(kFormats); ++i)
        if (name == kFormats[i]) return static_cast<Format>(i);
    throw Error("Weight: unknown format '" + name + "'");
}

PyWeight make_weight(const std::vector<std::tuple<std::string, int64_t, py::array>>& parts, int64_t count,
                     int64_t columns, bool glu) {
    PyWeight result;
    Weight& w = result.weight;
    if (parts.empty() || parts.size() > Weight::kMaxSegments) throw Error("Weight: takes 1 to 8 parts");
    if (count < 1 || columns < 1) throw Error("Weight: count and columns must be positive");
    w.count = count, w.columns = columns, w.glu = glu;
    for (const auto& [format, rows, array] : parts) {
        Segment& g = w.segment[w.segments++];
        g.format = format_of(format);
        g.rows = glu ? 2 * rows : rows;
        g.blocks = ceil_div(rows, kBlockRows) * (glu ? 2 : 1);
        const char* dtype = nullptr;
        const View v = view_of(array, &dtype);
        const int64_t bytes = count * g.blocks * block_bytes(g.format, columns);
        if (std::strcmp(dtype, "u8") != 0 || v.ndim != 1 || v.shape[0] != bytes)
            throw Error("Weight: data is " + show(dtype, v.shape, v.ndim) + ", expected u8[" + std::to_string(bytes) +
                        "]");
        g.data = v.u8();
        w.rows += g.rows;
        result.arrays.push_back(array);
    }
    return result;
}

void set_block(PyBlockTable& t, size_t index, const py::array& block) {
    const char* dtype = nullptr;
    const View v = view_of(block, &dtype);
    if ((v.dtype != Dtype::f32 && v.dtype != Dtype::u16 && v.dtype != Dtype::u8) || v.ndim != 5 || v.shape[1] != 2 ||
        !(block.flags() & py::array::c_style) || !block.writeable())
        throw Error("BlockTable: block is " + show(dtype, v.shape, v.ndim) +
                    ", expected a writeable C-contiguous f32, u16 or u8 [layers,2,kv_heads,tokens,width]");
    BlockTable& b = t.table;
    if (t.arrays.empty()) {
        b.dtype = v.dtype, b.layers = v.shape[0], b.kv_heads = v.shape[2], b.tokens = v.shape[3], b.width = v.shape[4];
    } else if (b.dtype != v.dtype || b.layers != v.shape[0] || b.kv_heads != v.shape[2] || b.tokens != v.shape[3] ||
               b.width != v.shape[4]) {
        throw Error("BlockTable: block is " + show(dtype, v.shape, v.ndim) + ", unlike the blocks before it");
    }
    if (index == t.arrays.size()) {
        t.arrays.push_back(block);
        t.pointers.push_back(v.data);
    } else {
        t.arrays[index] = block;
        t.pointers[index] = v.data;
    }
    b.blocks = t.pointers.data();
    b.size = static_cast<int64_t>(t.pointers.size());
}

// DELTAIC_ISA asks for a lower instruction set; a name that is unknown or unusable here is an error.
const Isa* choose_isa() {
    int count = 0;
    const Isa* list = isa_list(&count);
    const char* asked = std::getenv("DELTAIC_ISA");
    std::string names;
    for (int i = 0; i < count; ++i) {
        if (!asked || !*asked) {
            if (list[i].usable) return &list[i];
            continue;
        }
        if (std::strcmp(list[i].name, asked) == 0) {
            if (list[i].usable) return &list[i];
            throw py::import_error(std::string("DELTAIC_ISA=") + asked + ": this CPU lacks that instruction set");
        }
        names += std::string(i ? ", " : "") + list[i].name;
    }
    throw py::import_error(std::string("DELTAIC_ISA=") + asked +
                           " is not an instruction set of this build; expected one of: " + names);
}

}  // namespace
}  // namespace deltaic

PYBIND11_MODULE(_core, m) {
    using namespace deltaic;
    m.doc() = "Compiled operators of deltaic. Use deltaic.ops.cpu.";
    static py::exception<Error> error(m, "ContractError", py::module_::import("deltaic.errors").attr("ArgumentError"));
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const Error& e) {
            py::set_error(error, e.what());
        }
    });

    chosen = choose_isa();
    m.attr("isa") = chosen->name;
    m.attr("rounds_to_bf16") = chosen->numerics->rounds_to_bf16;
    m.attr("int8_kv_bits") = chosen->numerics->int8_kv_bits;
    py::list usable;
    int count = 0;
    const Isa* list = isa_list(&count);
    for (int i = 0; i < count; ++i)
        if (list[i].usable) usable.append(list[i].name);
    m.attr("usable_isas") = py::tuple(usable);
    m.attr("formats") = py::make_tuple(kFormats[0], kFormats[1], kFormats[2], kFormats[3]);

    m.def(
        "kernel_seconds", [] { return 1e-9 * static_cast<double>(kernel_nanoseconds.load()); },
        "Seconds spent inside kernels since the start of the process; what a call takes besides is its overhead.");
    m.def("thread_count", &thread_count);
    m.def(
        "set_thread_count",
        [](int threads) {
            if (threads < 1 || threads > 1024) throw Error("set_thread_count: threads must be 1..1024");
            const py::gil_scoped_release released;
            set_thread_count(threads);
        },
        py::arg("threads"));
    m.def(
        "block_bytes",
        [](const std::string& format, int64_t columns) { return block_bytes(format_of(format), columns); },
        "Bytes of one packed block of 16 rows.");

    py::class_<PyWeight>(m, "Weight")
        .def(py::init(&make_weight), py::arg("parts"), py::arg("count"), py::arg("columns"), py::arg("glu"))
        .def_property_readonly("shape",
                               [](const PyWeight& self) -> py::tuple {
                                   const Weight& w = self.weight;
                                   if (w.count > 1) return py::make_tuple(w.count, w.rows, w.columns);
                                   return py::make_tuple(w.rows, w.columns);
                               })
        .def_property_readonly(
            "dtype", [](const PyWeight& self) { return kFormats[static_cast<int>(self.weight.segment[0].format)]; })
        .def_property(
            "float_activations", [](const PyWeight& self) { return self.weight.float_activations; },
            [](PyWeight& self, bool value) { self.weight.float_activations = value; })
        .def_property_readonly("glu", [](const PyWeight& self) { return self.weight.glu; })
        .def_property_readonly(
            "parts",  // as the constructor takes them
            [](const PyWeight& self) {
                py::list parts;
                for (int i = 0; i < self.weight.segments; ++i) {
                    const Segment& g = self.weight.segment[i];
                    parts.append(py::make_tuple(kFormats[static_cast<int>(g.format)],
                                                self.weight.glu ? g.rows / 2 : g.rows, self.arrays[i]));
                }
                return parts;
            })
        .def_property_readonly("nbytes", [](const PyWeight& self) {
            int64_t bytes = 0;
            for (const auto& a : self.arrays) bytes += a.nbytes();
            return bytes;
        });

    py::class_<PyBlockTable>(m, "BlockTable")
        .def(py::init<>())
        .def("__len__", [](const PyBlockTable& self) { return self.arrays.size(); })
        .def("append", [](PyBlockTable& self, const py::array& block) { set_block(self, self.arrays.size(), block); })
        .def("replace",
             [](PyBlockTable& self, size_t index, const py::array& block) {
                 if (index >= self.arrays.size()) throw py::index_error("BlockTable: no such block");
                 set_block(self, index, block);
             })
        .def_property_readonly("blocks", [](const PyBlockTable& self) { return self.arrays; });

    py::class_<Tape>(m, "Tape", "A recorded sequence of operator calls: see deltaic.ops.cpu.")
        .def(py::init<>())
        .def("record", &Tape::record, py::arg("inputs"), py::arg("run"))
        .def("replay", &Tape::replay, py::arg("inputs"))
        .def("__len__", &Tape::size);
    m.def(
        "empty",
        [](const py::tuple& shape) { return Tape::recording() ? Tape::recording()->buffer(shape) : new_f32(shape); },
        "A float32 array for the output of an operator: of the tape that is being recorded, else new.");

#define X(name, contract, arguments) define(m, #name, contract, chosen->ops->name);
    DELTAIC_OPS(X)
#undef X
}
