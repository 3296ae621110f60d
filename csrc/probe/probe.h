#pragma once
// What this machine can do at best: the two limits that every benchmark is held against.
#include <cstdint>
#include <string>

namespace pybind11 {
class module_;
}

namespace gossamer::probe {

// FLOP/s of `threads` threads that run nothing but independent multiply-add chains in registers,
// a multiply-add counted as two. dtype is "float32", "bfloat16" or "float16"; bfloat16 uses the
// dot-product instruction where the machine has one and float32 arithmetic elsewhere, float16
// always float32 arithmetic, as the kernels do. The machine is measured, not the forced target.
double measure_peak(const std::string& dtype, int threads);

// Bytes/s of `threads` threads that read a buffer of `bytes` bytes over and over, each thread its
// own part. The size chooses the level of the memory hierarchy that is measured.
double measure_read_bandwidth(int64_t bytes, int threads);

void bind(pybind11::module_& m);

}  // namespace gossamer::probe
