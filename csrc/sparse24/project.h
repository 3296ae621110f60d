#pragma once
// The border between project.cpp, which cuts a projection into rows, and the units that project a
// row with one instruction set.
#include <cstdint>

#include "common/dtype.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

// The first columns of a row, as many as fill whole registers, to `out`; how many those were.
using ProjectRow = int64_t (*)(const void* weight, int64_t k, float scale, void* out);

struct ProjectUnit {
  ProjectRow hard, soft;
};
// Null where the unit does not compute in the dtype.
const ProjectUnit* project_unit_avx2(DType dtype);
const ProjectUnit* project_unit_avx512(DType dtype);

}  // namespace gossamer::sparse24
