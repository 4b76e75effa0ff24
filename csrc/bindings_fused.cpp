// Networks of runtime/: sizes and arrays by name into a FusedNetwork.
#include <cstring>
#include <memory>
#include <stdexcept>

#include "bindings.h"

namespace sparse_stgcn::bindings {
namespace {

// Owns what a FusedNetwork points to. Built by runtime/ from plain dicts: sizes by name, arrays as buffers.
class Fused {
 public:
  Fused(const py::dict& sizes, const py::buffer& scale, const py::buffer& shift, const py::list& steps) {
    net_.joints = size(sizes, "joints"), net_.channels = size(sizes, "channels"), net_.frames = size(sizes, "frames");
    net_.input = size(sizes, "input"), net_.input_ld = size(sizes, "input_ld"), net_.features = size(sizes, "features");
    net_.arena = size(sizes, "arena"), net_.persons = size(sizes, "persons");
    net_.columns = size(sizes, "columns"), net_.column = size(sizes, "column"), net_.strips = size(sizes, "strips");
    net_.strip_frames = size(sizes, "strip_frames");
    net_.scale = keep<float>(scale), net_.shift = keep<float>(shift);
    for (const auto& item : steps) {
      const auto d = item.cast<py::dict>();
      FusedStep s;
      s.kind = size(d, "kind"), s.src = size(d, "src"), s.src_ld = size(d, "src_ld"), s.src_frames = size(d, "src_frames");
      s.dst = size(d, "dst"), s.dst_ld = size(d, "dst_ld"), s.frames = size(d, "frames"), s.lead = size(d, "lead");
      s.trail = size(d, "trail"), s.rows = size(d, "rows"), s.bo = size(d, "bo"), s.relu = size(d, "relu");
      s.residual = d.contains("residual") ? size(d, "residual") : -1, s.residual_ld = size(d, "residual_ld");
      s.subsets = size(d, "subsets"), s.scratch = size(d, "scratch"), s.scratch_ld = size(d, "scratch_ld");
      s.tile = size(d, "tile"), s.planes = size(d, "planes"), s.plane_ld = size(d, "plane_ld"), s.bias_ld = size(d, "bias_ld");
      s.row_ptr = array<int32_t>(d, "row_ptr"), s.offset = array<int32_t>(d, "offset"), s.weight = array<float>(d, "weight");
      s.bias = array<float>(d, "bias"), s.made_subset = array<int32_t>(d, "made_subset", &s.made);
      s.made_input = array<int32_t>(d, "made_input"), s.ptr = array<int32_t>(d, "ptr");
      s.source = array<int32_t>(d, "source", &s.entries), s.coef = array<float>(d, "coef");
      s.diagonal = array<int32_t>(d, "diagonal"), s.lane_coef = array<float>(d, "lane_coef");
      s.joints = size(d, "joints"), s.graphs = graphs(d);
      s.maps = size(d, "maps"), s.hidden = size(d, "hidden");
      s.groups = s.bo > 0 ? (s.rows + s.bo - 1) / s.bo : 0;
      steps_.push_back(s);
    }
    net_.steps = steps_.data(), net_.num_steps = (int64_t)steps_.size();
    char* tables = room(table().fused_tables_room(net_));
    table().fused_make_tables(net_, tables);
    net_.tables = tables;
    auto* absent = (float*)room(net_.persons * net_.features * sizeof(float));
    const float zero = 0;
    const int64_t stride[5] = {};
    const FusedNetwork* self = &net_;
    table().fused_run(&self, 1, 1, net_.persons, &zero, stride, &absent, 1);
    net_.absent = absent;
  }
  const FusedNetwork& network() const { return net_; }

 private:
  FusedGraphs graphs(const py::dict& d) {
    FusedGraphs g;
    g.x1 = size(d, "x1"), g.x2 = size(d, "x2"), g.joint_ld = size(d, "joint_ld"), g.maps = size(d, "maps");
    g.graph = size(d, "graph"), g.work = size(d, "work"), g.mix_bo = size(d, "mix_bo");
    g.adjacency = array<float>(d, "adjacency"), g.scale = array<float>(d, "scale");
    g.read = array<int32_t>(d, "read");
    g.live_row = array<int32_t>(d, "live_row", &g.live), g.mix_ptr = array<int32_t>(d, "mix_ptr");
    g.mix_offset = array<int32_t>(d, "mix_offset"), g.mix_weight = array<float>(d, "mix_weight");
    g.mix_bias = array<float>(d, "mix_bias");
    return g;
  }
  static int64_t size(const py::dict& d, const char* name) { return d.contains(name) ? d[name].cast<int64_t>() : 0; }
  template <class T>
  const T* keep(const py::buffer& buffer, int64_t* count = nullptr) {
    const py::buffer_info info = buffer.request();
    if (info.itemsize != (py::ssize_t)sizeof(T)) throw std::invalid_argument("Expected 4-byte elements in an array of a fused step.");
    const size_t bytes = (size_t)info.size * sizeof(T);
    char* block = room(bytes + 64);
    if (bytes) std::memcpy(block, info.ptr, bytes);
    if (count) *count = info.size;
    return (const T*)block;
  }
  char* room(size_t bytes) {
    kept_.emplace_back(new char[bytes + 64]);
    return (char*)(((uintptr_t)kept_.back().get() + 63) / 64 * 64);
  }
  template <class T>
  const T* array(const py::dict& d, const char* name, int64_t* count = nullptr) {
    return d.contains(name) ? keep<T>(d[name].cast<py::buffer>(), count) : nullptr;
  }
  std::vector<std::unique_ptr<char[]>> kept_;
  std::vector<FusedStep> steps_;
  FusedNetwork net_;
};

}  // namespace

void bind_fused(py::module_& m) {
  py::class_<Fused>(m, "Fused")
      .def(py::init<const py::dict&, const py::buffer&, const py::buffer&, const py::list&>());

  // One batch through several networks of the same input: a list of Fused and the addresses of their features.
  m.def("fused_run", [](const std::vector<const Fused*>& networks, int64_t batch, int64_t persons, Address x,
                        const std::array<int64_t, 5>& stride, const Addresses& features, int threads) {
    py::gil_scoped_release release;
    std::vector<const FusedNetwork*> nets;
    for (const Fused* network : networks) nets.push_back(&network->network());
    table().fused_run(nets.data(), (int64_t)nets.size(), batch, persons, (const float*)x, stride.data(),
                      (float* const*)features.data(), threads);
  });
}

}  // namespace sparse_stgcn::bindings
