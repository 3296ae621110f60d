#include <pybind11/pybind11.h>

#include "probe/probe.h"

namespace gossamer::probe {

namespace py = pybind11;

void bind(py::module_& m) {
  m.def("measure_peak", &measure_peak, py::arg("dtype"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("measure_read_bandwidth", &measure_read_bandwidth, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace gossamer::probe
