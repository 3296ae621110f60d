#pragma once
// What pack.cpp does on a CPU, bit for bit, on the current GPU: values of 2, 4 or 8 bytes. Every
// pointer is to device memory; asynchronous on the stream.
#include "blocksparse/cuda.h"
#include "common/launch.cuh"

namespace gossamer::blocksparse::cuda {

void find_live(const void* dense, const Weight& shape, uint8_t* live, cudaStream_t stream);
void gather(const void* dense, const Weight& pattern, void* values, cudaStream_t stream);
void to_dense(const Weight& weight, void* dense, cudaStream_t stream);

}  // namespace gossamer::blocksparse::cuda
