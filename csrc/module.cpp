#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "actsparse/actsparse.h"
#include "actsparse/spikes.h"
#include "actsparse/topk.h"
#include "blocksparse/blocksparse.h"
#include "common/cuda_border.h"
#include "common/parallel.h"
#include "common/py_tensor.h"
#include "common/target.h"
#include "csr/csr.h"
#include "cuda_build.h"
#include "grouped/grouped.h"
#include "pointcloud/maps.h"
#include "pointcloud/pointcloud.h"
#include "pointcloud/pool.h"
#include "probe/probe.h"
#include "sparse24/conv.h"
#include "sparse24/quantized.h"
#include "sparse24/sparse24.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  gossamer::dlpack::initialise();

  m.def("targets_built", &gossamer::targets_built);
  m.def("machine_targets", &gossamer::machine_targets);
  m.def("intel_cores", &gossamer::intel_cores);
  m.def("target", [] { return std::string(gossamer::name(gossamer::target())); });
  m.def(
      "force_target",
      [](const std::optional<std::string>& name) { gossamer::force_target(name.value_or("")); },
      py::arg("name"));
  m.def(
      "parallel_team",
      [](int threads) {
        int size = 0;
        gossamer::parallel_run(threads, [&](int thread, int team) {
          if (thread == 0) size = team;
        });
        return size;
      },
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  gossamer::bind_cuda(m, gossamer::build_of_cuda());
  gossamer::actsparse::bind(m);
  gossamer::actsparse::bind_cuda(m);
  gossamer::actsparse::spikes::bind(m);
  gossamer::actsparse::topk::bind(m);
  gossamer::actsparse::topk::bind_cuda(m);
  gossamer::blocksparse::bind(m);
  gossamer::csr::bind(m);
  gossamer::grouped::bind(m);
  gossamer::pointcloud::bind_conv(m);
  gossamer::pointcloud::bind_conv_cuda(m);
  gossamer::pointcloud::bind_layout_cuda(m);
  gossamer::pointcloud::bind_maps(m);
  gossamer::pointcloud::bind_maps_cuda(m);
  gossamer::pointcloud::bind_pool(m);
  gossamer::pointcloud::bind_pool_cuda(m);
  gossamer::pointcloud::bind_voxelize(m);
  gossamer::pointcloud::bind_voxelize_cuda(m);
  gossamer::probe::bind(m);
  gossamer::sparse24::bind(m);
  gossamer::sparse24::bind_conv(m);
  gossamer::sparse24::bind_conv_cuda(m);
  gossamer::sparse24::bind_quantized(m);
}
