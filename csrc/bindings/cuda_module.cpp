// The CUDA extension: device addresses and a stream come in as integers, kernels are launched. It links no libtorch, so
// one build serves every torch version; whoever calls it (deltaic/ops/cuda.py) checks shapes and owns the memory. Built
// a second time against the emulator (csrc/cuda/simt) for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "core/error.h"
#include "cuda/ops.h"
#if defined(DELTAIC_EMULATE)
#include "cuda/simt/ptx_count.h"
#else
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace deltaic {
namespace cuda {
namespace {

// What Python passes for a C++ parameter: an address for a pointer, the handle for a weight, the number itself
// otherwise.
template <class T>
struct Passed {
    using type = T;
    static T convert(T value) { return value; }
};
template <class T>
struct Passed<T*> {
    using type = uintptr_t;
    static T* convert(uintptr_t value) { return reinterpret_cast<T*>(value); }
};
template <>
struct Passed<const Matrices&> {
    using type = const Matrices&;
    static const Matrices& convert(const Matrices& value) { return value; }
};

#if defined(DELTAIC_EMULATE)
struct DeviceGuard {};
#endif

template <class... A>
void define(py::module_& m, const char* name, void (*function)(A...)) {
    m.def(name, [function](typename Passed<A>::type... values) {
        [[maybe_unused]] const DeviceGuard guard;
        function(Passed<A>::convert(values)...);
    });
}

const char* const kFormats[] = {"f32", "bf16", "int8", "int4"};  // order of enum Format

// parts: (format, rows, columns, stride, address of q, of s, of d)
Matrices make_matrices(
    const std::vector<std::tuple<std::string, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>>& parts,
    int64_t count, bool glu) {
    Matrices w;
    if (parts.empty() || parts.size() > Matrices::kMaxParts) throw Error("Matrices: takes 1 to 8 parts");
    if (count < 1 || (glu && (parts.size() != 1 || std::get<1>(parts[0]) % 2)))
        throw Error("Matrices: count or glu do not fit the parts");
    w.count = count, w.glu = glu, w.parts = static_cast<int64_t>(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
        const auto& [format, rows, columns, stride, q, s, d] = parts[i];
        Matrix& m = w.part[i];
        m.format = -1;
        for (int64_t f = 0; f < 4; ++f)
            if (format == kFormats[f]) m.format = f;
        const bool quantised = m.format >= 2;
        if (m.format < 0) throw Error("Matrices: unknown format '" + format + "'");
        if (rows < 1 || columns < 1 || stride < columns || stride % (quantised ? kRun : 8) || q % 16 || !q ||
            (quantised && !d) || (m.format == 3 && !s) || columns != std::get<2>(parts[0]))
            throw Error("Matrices: a part has impossible sizes or addresses");
        m.rows = rows, m.columns = columns, m.stride = stride;
        m.q = reinterpret_cast<const uint8_t*>(q), m.s = reinterpret_cast<const uint8_t*>(s),
        m.d = reinterpret_cast<const uint16_t*>(d);
    }
    return w;
}

}  // namespace
}  // namespace cuda

}  // namespace deltaic

#if defined(DELTAIC_EMULATE)
#define DELTAIC_MODULE _cuda_emulated
#else
#define DELTAIC_MODULE _cuda
#endif

PYBIND11_MODULE(DELTAIC_MODULE, m) {
    using namespace deltaic;
    using namespace deltaic::cuda;
    static py::exception<Error> error(m, "KernelError", PyExc_RuntimeError);
    py::register_local_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const Error& e) {
            py::set_error(error, e.what());
        }
    });
    m.attr("formats") = py::make_tuple(kFormats[0], kFormats[1], kFormats[2], kFormats[3]);
    py::class_<Matrices>(m, "Matrices", py::module_local())  // with a card, tests load both builds into one process
        .def(py::init(&make_matrices), py::arg("parts"), py::arg("count"), py::arg("glu"));

#define X(name, arguments) define(m, #name, &name);
    DELTAIC_CUDA_OPS(X)
#undef X

    m.def("gated_delta_net_chunk_floats", &gated_delta_net_chunk_floats);
    m.def("moe_max_tiles", &moe_max_tiles);

#if defined(DELTAIC_EMULATE)
    m.attr("emulated") = true;
    m.def("use_tensor_cores", &use_tensor_cores);
    m.def("set_order", [](const std::string& order, uint64_t seed) {
        if (order != "forward" && order != "reverse" && order != "random")
            throw Error("set_order: forward, reverse or random");
        simt::set_order(order == "forward"   ? simt::Order::forward
                        : order == "reverse" ? simt::Order::reverse
                                             : simt::Order::random,
                        seed);
    });
    m.def("load_ptx", &simt::load_ptx);
    m.def("use_ptx", &simt::use_ptx);
    m.def("run_ptx", &simt::run_ptx);
    m.def("ptx_coverage", &simt::ptx_coverage);
    m.def("count_traffic", &simt::ptx::count_traffic);
    m.def("take_traffic", &simt::ptx::take_traffic);
    namespace ptx = simt::ptx;
    py::class_<ptx::Tally>(m, "Tally", py::module_local())
        .def_readonly("place", &ptx::Tally::place)
        .def_readonly("kind", &ptx::Tally::kind)
        .def_readonly("requests", &ptx::Tally::requests)
        .def_readonly("bytes", &ptx::Tally::bytes)
        .def_readonly("taken", &ptx::Tally::taken)
        .def_readonly("at_least", &ptx::Tally::at_least);
    py::class_<ptx::BufferTraffic>(m, "BufferTraffic", py::module_local())
        .def_readonly("name", &ptx::BufferTraffic::name)
        .def_readonly("size", &ptx::BufferTraffic::size)
        .def_readonly("requested", &ptx::BufferTraffic::requested)
        .def_readonly("per_block", &ptx::BufferTraffic::per_block)
        .def_readonly("shared", &ptx::BufferTraffic::shared)
        .def_readonly("alone", &ptx::BufferTraffic::alone);
    py::class_<ptx::LaunchTraffic>(m, "LaunchTraffic", py::module_local())
        .def_readonly("name", &ptx::LaunchTraffic::name)
        .def_readonly("kernel", &ptx::LaunchTraffic::kernel)
        .def_readonly("grid", &ptx::LaunchTraffic::grid)
        .def_readonly("threads", &ptx::LaunchTraffic::threads)
        .def_readonly("columns", &ptx::LaunchTraffic::columns)
        .def_readonly("shared_bytes", &ptx::LaunchTraffic::shared_bytes)
        .def_readonly("instructions", &ptx::LaunchTraffic::instructions)
        .def_readonly("lanes", &ptx::LaunchTraffic::lanes)
        .def_readonly("longest", &ptx::LaunchTraffic::longest)
        .def_readonly("places", &ptx::LaunchTraffic::places)
        .def_readonly("read", &ptx::LaunchTraffic::read)
        .def_readonly("written", &ptx::LaunchTraffic::written);
    m.def("guarded_alloc", [](size_t bytes, const std::string& name) {
        return reinterpret_cast<uintptr_t>(simt::guarded_alloc(bytes, name.c_str()));
    });
    m.def("guarded_free", [](uintptr_t data) { simt::guarded_free(reinterpret_cast<void*>(data)); });
#else
    m.attr("emulated") = false;
    m.attr("architectures") = DELTAIC_CUDA_ARCHITECTURES;
    m.attr("toolkit_version") = toolkit_version();
    m.def("driver_version", &driver_version);
    m.def("device_problem", &device_problem);
    m.def("has_kernels", &has_kernels);
    m.def("use_device", &use_device);
#endif
}
