// The CUDA kernels for Python: addresses, sizes and strides as integers, the stream as the integer that torch gives.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace sparse_stgcn::cuda;

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

Arithmetic arithmetic_of(const std::string& name) {
    if (name == "float32") return Arithmetic::float32;
    if (name == "tf32") return Arithmetic::tf32;
    if (name == "bfloat16") return Arithmetic::bfloat16;
    if (name == "float16") return Arithmetic::float16;
    throw std::invalid_argument("Expected arithmetic float32, tf32, bfloat16 or float16. Got " + name + ".");
}

// One shape of the temporal convolution, with the way its launch is cut; the tensors come with each call.
struct Conv {
    TemporalConv op{};
    Device device;
    Tile tile;

    Conv(const std::string& arithmetic, int N, int I, int T, int V, int O, int K, int bo, int bi, int blocks, int stride,
         int dilation, Device on)
        : device(on) {
        op.arithmetic = arithmetic_of(arithmetic);
        op.N = N, op.I = I, op.T = T, op.V = V, op.O = O, op.K = K, op.bo = bo, op.bi = bi, op.blocks = blocks;
        op.stride = stride, op.dilation = dilation;
        tile = temporal_conv_tile(op, device);
    }
    int64_t scratch() const { return tile.reason ? 0 : temporal_conv_scratch(op, tile); }
    py::object reason() const { return tile.reason ? py::object(py::str(tile.reason)) : py::none(); }
    py::dict cut() const {
        py::dict d;
        d["frames"] = tile.frames, d["tiles"] = tile.tiles, d["chunks"] = tile.chunks;
        d["chunk_channels"] = tile.chunk_channels, d["pitch"] = tile.pitch, d["pixel_warps"] = tile.pixel_warps;
        d["slices"] = tile.slices, d["split"] = tile.split, d["shared_bytes"] = tile.bytes;
        return d;
    }
    void forward(uintptr_t x, int64_t x_batch, int64_t x_channel, uintptr_t values, uintptr_t row_ptr, uintptr_t input,
                 uintptr_t tap, uintptr_t scale, uintptr_t shift, uintptr_t residual, int64_t residual_batch,
                 int64_t residual_channel, bool relu, uintptr_t y, uintptr_t scratch_space, uintptr_t stream) const {
        TemporalConv call = op;
        call.x = pointer<void>(x), call.x_batch = x_batch, call.x_channel = x_channel;
        call.values = pointer<void>(values);
        call.row_ptr = pointer<int32_t>(row_ptr), call.input = pointer<int32_t>(input), call.tap = pointer<int32_t>(tap);
        call.scale = pointer<float>(scale), call.shift = pointer<float>(shift);
        call.residual = pointer<void>(residual), call.residual_batch = residual_batch;
        call.residual_channel = residual_channel, call.relu = relu;
        call.y = pointer<void>(y), call.scratch = pointer<int32_t>(scratch_space);
        const char* error = temporal_conv_forward(call, tile, device, pointer<void>(stream));
        if (error) throw std::runtime_error(std::string("temporal_conv on CUDA: ") + error);
    }
};

Device device_at(int index) {
    Device device;
    if (!read_device(index, &device)) throw std::runtime_error("there is no CUDA device " + std::to_string(index));
    return device;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    py::class_<Device>(m, "Device", py::module_local())
        .def(py::init(&device_at), py::arg("index"))
        .def(py::init([](int block, int all, int count) { return Device{0, block, all, count}; }),
             py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"), py::arg("multiprocessors"));
    py::class_<Conv>(m, "TemporalConv", py::module_local())
        .def(py::init<const std::string&, int, int, int, int, int, int, int, int, int, int, int, Device>(),
             py::arg("arithmetic"), py::arg("N"), py::arg("I"), py::arg("T"), py::arg("V"), py::arg("O"), py::arg("K"),
             py::arg("bo"), py::arg("bi"), py::arg("blocks"), py::arg("stride"), py::arg("dilation"), py::arg("device"))
        .def_property_readonly("reason", &Conv::reason)
        .def_property_readonly("scratch", &Conv::scratch)
        .def_property_readonly("tile", &Conv::cut)
        .def("forward", &Conv::forward, py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("x_batch"),
             py::arg("x_channel"), py::arg("values"), py::arg("row_ptr"), py::arg("input"), py::arg("tap"),
             py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("residual_batch"),
             py::arg("residual_channel"), py::arg("relu"), py::arg("y"), py::arg("scratch"), py::arg("stream"));
}
