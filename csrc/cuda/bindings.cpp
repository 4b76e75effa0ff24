// The CUDA kernels for Python: addresses, sizes and strides as integers, the stream as the integer that torch gives. An
// object is one product of one shape, with the way its launch is cut; the tensors come with each call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace sparse_stgcn::cuda;

namespace {

using Address = uintptr_t;
using Plane = std::array<int64_t, 3>;                   // address, stride of a sample, stride of a channel
using Index = std::array<Address, 6>;                   // row_ptr, input, tap, t_ptr, t_perm, t_row; 0 where not needed

template <class T = void> T* pointer(Address address) { return reinterpret_cast<T*>(address); }
Planes planes(const Plane& p) { return {pointer(Address(p[0])), p[1], p[2]}; }

Arithmetic arithmetic_of(const std::string& name) {
    if (name == "float32") return Arithmetic::float32;
    if (name == "tf32") return Arithmetic::tf32;
    if (name == "bfloat16") return Arithmetic::bfloat16;
    if (name == "float16") return Arithmetic::float16;
    throw std::invalid_argument("Expected arithmetic float32, tf32, bfloat16 or float16. Got " + name + ".");
}

template <class Op> struct Product {
    Tile (*tile)(const Op&, const Device&);
    int64_t (*scratch)(const Op&, const Tile&);
};
template <class Op> struct Launch {
    Op op{};
    Device device;
    Tile tile{};
    int64_t scratch = 0;
    std::string name;

    Launch(const Op& shape, Device on, const std::string& product, const Product<Op>& of)
        : op(shape), device(on), tile(of.tile(shape, on)), name(product) {
        if (!tile.reason) scratch = of.scratch(op, tile);
    }
    Op with(const Index& index) const {
        Op call = op;
        Pattern& p = call.pattern;
        const int32_t** parts[] = {&p.row_ptr, &p.input, &p.tap, &p.t_ptr, &p.t_perm, &p.t_row};
        for (int i = 0; i < 6; ++i) *parts[i] = pointer<int32_t>(index[size_t(i)]);
        return call;
    }
    void require(const char* product) const {
        const std::string text = std::string("Expected a launch of ") + product + ". Got one of " + name + ".";
        if (name != product) throw std::invalid_argument(text);
    }
    static void check(const char* error) {
        if (error) throw std::runtime_error(std::string("sparse_stgcn on CUDA: ") + error);
    }
    py::object reason() const { return tile.reason ? py::object(py::str(tile.reason)) : py::none(); }
    py::dict cut() const {
        py::dict d;
        d["frames"] = tile.frames, d["tiles"] = tile.tiles, d["chunks"] = tile.chunks;
        d["chunk_channels"] = tile.chunk_channels, d["pitch"] = tile.pitch, d["pixel_warps"] = tile.pixel_warps;
        d["slices"] = tile.slices, d["split"] = tile.split, d["splits"] = tile.splits, d["shared_bytes"] = tile.bytes;
        d["rows"] = tile.rows;
        return d;
    }
};
template <class Op> Product<Op> choose(const std::string& name, Product<Op> forward, Product<Op> input, Product<Op> weight) {
    if (name == "forward") return forward;
    if (name == "input_gradient") return input;
    if (name == "weight_gradient") return weight;
    throw std::invalid_argument("Expected product forward, input_gradient or weight_gradient. Got " + name + ".");
}

struct Conv : Launch<TemporalConv> {
    static TemporalConv shape(const std::string& arithmetic, int N, int I, int T, int V, int O, int K, int bo, int bi,
                              int blocks, int stride, int dilation) {
        return {arithmetic_of(arithmetic), N, T, V, stride, dilation, {O, I, K, bo, bi, blocks, {}, {}, {}, {}, {}, {}}};
    }
    static Product<TemporalConv> product(const std::string& name) {
        return choose<TemporalConv>(name, {temporal_conv_tile, temporal_conv_scratch},
                                    {temporal_conv_input_gradient_tile, temporal_conv_input_gradient_scratch},
                                    {temporal_conv_weight_gradient_tile, temporal_conv_weight_gradient_scratch});
    }
    using Launch::Launch;
    void forward(Plane x, Address values, Index index, Address scale, Address shift, Plane residual, bool relu, Address y,
                 Address space, Address stream) const {
        require("forward");
        const Epilogue e{pointer<float>(scale), pointer<float>(shift), nullptr, 0, planes(residual), relu};
        check(temporal_conv_forward(with(index), tile, device, planes(x), pointer(values), e, pointer(y), pointer(space),
                                    pointer(stream)));
    }
    void input_gradient(Plane dy, Address values, Index index, Address dx, Address space, Address stream) const {
        require("input_gradient");
        check(temporal_conv_input_gradient(with(index), tile, device, planes(dy), pointer(values), pointer(dx), pointer(space),
                                           pointer(stream)));
    }
    void weight_gradient(Plane x, Plane dy, Address values, Index index, Address masked, Address scale, Address dw,
                         Address dy_sums, Address space, Address stream) const {
        require("weight_gradient");
        check(temporal_conv_weight_gradient(with(index), tile, device, planes(x), planes(dy), pointer(values),
                                            {pointer<uint8_t>(masked), pointer<float>(scale)}, pointer(dw),
                                            pointer<float>(dy_sums), pointer(space), pointer(stream)));
    }
};

using Graph = std::array<int64_t, 6>;                   // address; strides of sample, subset, channel, from, to; 0: shared

struct GraphLaunch : Launch<GraphConv> {
    static GraphConv shape(const std::string& arithmetic, int N, int I, int T, int V, int O, int K, int bo, int bi, int blocks,
                           int adjacency_dims) {
        return {arithmetic_of(arithmetic), N, T, V, adjacency_dims > 3, adjacency_dims > 4,
                {O, I, K, bo, bi, blocks, {}, {}, {}, {}, {}, {}}};
    }
    static Product<GraphConv> product(const std::string& name) {
        return choose<GraphConv>(name, {graph_conv_tile, graph_conv_scratch},
                                 {graph_conv_input_gradient_tile, graph_conv_input_gradient_scratch},
                                 {graph_conv_weight_gradient_tile, graph_conv_weight_gradient_scratch});
    }
    static Adjacency adjacency(const Graph& a) { return {pointer(Address(a[0])), a[1], a[2], a[3], a[4], a[5]}; }
    using Launch::Launch;
    void forward(Plane x, Address values, Graph graph, Index index, Address map, int64_t map_batch, Address scale,
                 Address shift, Plane residual, bool relu, Address y, Address space, Address stream) const {
        require("forward");
        const Epilogue e{pointer<float>(scale), pointer<float>(shift), pointer<float>(map), map_batch, planes(residual), relu};
        check(graph_conv_forward(with(index), tile, device, planes(x), pointer(values), adjacency(graph), e, pointer(y),
                                 pointer(space), pointer(stream)));
    }
    void input_gradient(Plane x, Plane dy, Address values, Graph graph, Index index, Address dx, Address dadjacency,
                        Address space, Address stream) const {
        require("input_gradient");
        check(graph_conv_input_gradient(with(index), tile, device, planes(x), planes(dy), pointer(values), adjacency(graph),
                                        pointer(dx), pointer(dadjacency), pointer(space), pointer(stream)));
    }
    void weight_gradient(Plane x, Plane dy, Address values, Graph graph, Index index, Address masked, Address scale, Address dw,
                         Address dy_sums, Address space, Address stream) const {
        require("weight_gradient");
        check(graph_conv_weight_gradient(with(index), tile, device, planes(x), planes(dy), pointer(values), adjacency(graph),
                                         {pointer<uint8_t>(masked), pointer<float>(scale)}, pointer(dw),
                                         pointer<float>(dy_sums), pointer(space), pointer(stream)));
    }
};

Device device_at(int index) {
    Device device;
    if (const char* error = read_device(index, &device))
        throw std::runtime_error("CUDA device " + std::to_string(index) + " cannot be used: " + error);
    return device;
}

template <class L> void describe(py::class_<L>& c) {
    c.def_property_readonly("reason", &L::reason).def_property_readonly("tile", &L::cut).def_readonly("scratch", &L::scratch);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    const py::call_guard<py::gil_scoped_release> no_gil;
    py::class_<Device>(m, "Device", py::module_local())
        .def(py::init(&device_at), py::arg("index"))
        .def(py::init([](int block, int all, int count) { return Device{0, block, all, count}; }),
             py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("multiprocessors"));
    // What the static model counts with: (slots, wavefronts, instructions, and those of each 8 more target channels).
    auto counts = [](const Step& s) { return py::make_tuple(s.slots, s.wavefronts, s.issue, s.more_wavefronts, s.more_issue); };
    m.def("gather_step", [=](const std::string& arithmetic) { return counts(gather_step(arithmetic_of(arithmetic))); });
    m.def("weight_step", [=](const std::string& arithmetic) { return counts(weight_step(arithmetic_of(arithmetic))); });
    py::class_<Conv> conv(m, "TemporalConv", py::module_local());
    describe(conv);
    conv.def(py::init([](const std::string& arithmetic, int N, int I, int T, int V, int O, int K, int bo, int bi, int blocks,
                         int stride, int dilation, Device device, const std::string& product) {
             return Conv(Conv::shape(arithmetic, N, I, T, V, O, K, bo, bi, blocks, stride, dilation), device, product,
                         Conv::product(product));
         }),
         py::arg("arithmetic"), py::arg("N"), py::arg("I"), py::arg("T"), py::arg("V"), py::arg("O"), py::arg("K"),
         py::arg("bo"),
         py::arg("bi"), py::arg("blocks"), py::arg("stride"), py::arg("dilation"), py::arg("device"),
         py::arg("product") = "forward")
        .def("forward", &Conv::forward, no_gil, py::arg("x"), py::arg("values"), py::arg("index"), py::arg("scale"),
             py::arg("shift"),
             py::arg("residual"), py::arg("relu"), py::arg("y"), py::arg("scratch"), py::arg("stream"))
        .def("input_gradient", &Conv::input_gradient, no_gil, py::arg("dy"), py::arg("values"), py::arg("index"), py::arg("dx"),
             py::arg("scratch"), py::arg("stream"))
        .def("weight_gradient", &Conv::weight_gradient, no_gil, py::arg("x"), py::arg("dy"), py::arg("values"),
             py::arg("index"),
             py::arg("masked"), py::arg("scale"), py::arg("dw"), py::arg("dy_sums"),
             py::arg("scratch"), py::arg("stream"));

    py::class_<GraphLaunch> graph(m, "GraphConv", py::module_local());
    describe(graph);
    graph.def(py::init([](const std::string& arithmetic, int N, int I, int T, int V, int O, int K, int bo, int bi, int blocks,
                          int adjacency_dims, Device device, const std::string& product) {
              return GraphLaunch(GraphLaunch::shape(arithmetic, N, I, T, V, O, K, bo, bi, blocks, adjacency_dims), device,
              product,
                                 GraphLaunch::product(product));
          }),
          py::arg("arithmetic"), py::arg("N"), py::arg("I"), py::arg("T"), py::arg("V"), py::arg("O"), py::arg("K"),
          py::arg("bo"),
          py::arg("bi"), py::arg("blocks"), py::arg("adjacency_dims"), py::arg("device"), py::arg("product") = "forward")
        .def("forward", &GraphLaunch::forward, no_gil, py::arg("x"), py::arg("values"), py::arg("adjacency"), py::arg("index"),
             py::arg("map"), py::arg("map_batch"), py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("relu"),
             py::arg("y"), py::arg("scratch"), py::arg("stream"))
        .def("input_gradient", &GraphLaunch::input_gradient, no_gil, py::arg("x"), py::arg("dy"), py::arg("values"),
             py::arg("adjacency"), py::arg("index"), py::arg("dx"), py::arg("dadjacency"), py::arg("scratch"),
             py::arg("stream"))
        .def("weight_gradient", &GraphLaunch::weight_gradient, no_gil, py::arg("x"), py::arg("dy"), py::arg("values"),
             py::arg("adjacency"), py::arg("index"), py::arg("masked"), py::arg("scale"), py::arg("dw"), py::arg("dy_sums"),
             py::arg("scratch"), py::arg("stream"));
}
