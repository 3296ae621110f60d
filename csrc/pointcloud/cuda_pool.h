#pragma once
// Pooling on a GPU. It reads the pairs of a map by output: the rows that each output reduces, by
// tap, in the order of the map (ops/pointcloud_layout.py). A voxel's points are such lists, too.
#include <cstdint>

#include "common/dtype.h"

namespace gossamer::pointcloud {

struct CudaLists {
  int64_t n_in, n_out, pairs;
  const int32_t* rows;       // [pairs]
  const int64_t* begins;     // [n_out + 1], where the rows of each rank of the outputs begin
  const int32_t* out_order;  // [n_out], the rows of these ranks, or null
};

// How lists are made of a map: `ranks` [pairs] ascend, and the pair at each place is place[i], or
// i.
struct CudaListing {
  int64_t n_in, n_out, pairs;
  const int32_t *ranks, *in, *in_order;  // in_order may be null
  const int64_t* places;                 // or null
  int32_t* rows;
  int64_t* begins;
};

enum class CudaPool : uint8_t {
  kSum,
  kMean,
  kMax,       // and whose it was
  kToWinner,  // the sum of those that were the maximum of this output
};

struct CudaPoolArgs {
  DType dtype;  // float32, bfloat16, float16, float64
  CudaPool pool;
  CudaLists lists;
  int64_t channels;
  const void* feats;  // [n_in, channels], its rows feats_stride elements apart
  int64_t feats_stride;
  void* out;  // [n_out, channels]
  // kMax: [n_out, channels], the rows that were taken, or -1. kToWinner: of each row of feats the
  // output it was taken from.
  int32_t* winner;
  // Each list in so many parts, of which partial and took [splits, n_out, channels] keep what is
  // reduced before the parts are, in their order. No part has to be kept where there is one.
  int64_t splits;
  double* partial;
  int32_t* took;
};

}  // namespace gossamer::pointcloud
