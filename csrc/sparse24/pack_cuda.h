#pragma once
// The conversions of a 2:4 weight on the current GPU: what pack.cpp does on a CPU, bit for bit.
// Every pointer is to device memory. Asynchronous on the stream, except where a result comes back.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24::cuda {

// pack.cu; values of 2, 4 or 8 bytes.
Misfits from_dense(const void* dense, const Weight& shape, void* values, uint8_t* indices,
                   int64_t* status, cudaStream_t stream);
void gather(const void* dense, const Weight& pattern, void* values, cudaStream_t stream);
void to_dense(const Weight& weight, void* dense, cudaStream_t stream);
Misfits validate(const Weight& weight, int64_t* status, cudaStream_t stream);

// pack_panels.cu; float32: panels, 16-bit and 8-bit values: fragments. What illegal indices become
// in fragments is 0 and 1: the hardware's answer to illegal metadata is undefined.
void to_panels(const Weight& weight, uint32_t* panels, cudaStream_t stream);
void from_panels(const Weight& panels, void* values, uint8_t* indices, cudaStream_t stream);

}  // namespace gossamer::sparse24::cuda
