#pragma once
// What the decode and the prefill kernel share: the records of Fragments (cuda.h), the product of
// one step, and the end of every sum:
//
//   y[m,n] = act(x_scale[m] * row_scale[n] * sum_k x[m,k] W[n,k] + b[n])
//
// A step is 64 bytes of each row of x and 16 bytes of A a lane, whatever the type: for 16-bit
// values 32 columns and half a word of metadata, for 8-bit values 64 columns and a word.
#include "common/activation.cuh"
#include "common/check.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

constexpr int kStepBytes = 64;  // of a row of x
constexpr int kLaneBytes = 16;
constexpr int kFragmentBytes = kWarp * kLaneBytes;  // the A fragment of a step

template <class T>
struct Record {
  static constexpr int kXBytes = kFragmentColumns * sizeof(T);  // of a row of x
  static constexpr int kSteps = kXBytes / kStepBytes;
  static constexpr int kMetadata = kSteps * kFragmentBytes;  // where it begins
  static constexpr int kBytes = kMetadata + kFragmentBytes;
};

// The metadata word of a step, of the lane's four of a record.
template <class T>
__host__ __device__ constexpr int metadata_word(int step) {
  return sizeof(T) == 2 ? step / 2 : step;
}

// D[16 rows of W][8 rows of x] += the products of one step. Where T has no mma.sp, none: so that
// the file compiles, and check_architecture() keeps such code from being launched.
template <class T>
__device__ __forceinline__ void multiply_step(ptx::Accumulator<T> (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[4], uint32_t metadata, int step) {
  if constexpr (!ptx::kHasMmaSp<T>) {
    return;
  } else if constexpr (sizeof(T) == 1) {
    ptx::mma_sp_m16n8k64<T>(d, a, b, metadata);
  } else if (step % 2 == 0) {  // known where the loop over steps is unrolled
    ptx::mma_sp_m16n8k32<T, 0>(d, a, b, metadata);
  } else {
    ptx::mma_sp_m16n8k32<T, 1>(d, a, b, metadata);
  }
}

__device__ __forceinline__ void to_registers(uint32_t (&registers)[4], uint4 v) {
  registers[0] = v.x, registers[1] = v.y, registers[2] = v.z, registers[3] = v.w;
}

// ---- the end of a sum ---------------------------------------------------------------------------

// One thread finishes eight consecutive rows of W for one row of x: 16 bytes of a 16-bit result.
constexpr int kRun = 8;

struct Epilogue {
  void* out;
  const void* bias;
  const float *x_scales, *row_scales;
  int64_t m, n;
  DType out_dtype;
  Activation activation;
};

inline Epilogue epilogue_of(const CudaGemmArgs& args) {
  return {args.out, args.bias, args.x_scales,  args.row_scales,
          args.m,   args.n,    args.out_dtype, args.activation};
}

template <class S>  // float or int32_t
using Four = std::conditional_t<std::is_same_v<S, float>, float4, int4>;

template <class S>
__device__ __forceinline__ void load_run(S (&run)[kRun], const S* from) {  // 16-byte aligned
  const auto* four = reinterpret_cast<const Four<S>*>(from);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Four<S> v = four[half];
    run[4 * half] = v.x, run[4 * half + 1] = v.y;
    run[4 * half + 2] = v.z, run[4 * half + 3] = v.w;
  }
}
template <class S>
__device__ __forceinline__ void store_run(S* to, const S (&run)[kRun]) {
  auto* four = reinterpret_cast<Four<S>*>(to);
  four[0] = {run[0], run[1], run[2], run[3]};
  four[1] = {run[4], run[5], run[6], run[7]};
}

// What the rows of a run bring, for every row of x the same.
struct RowTerms {
  float scale[kRun], bias[kRun];
};

__device__ __forceinline__ float load_as_float(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return ptx::to_float(static_cast<const BFloat16*>(values)[i]);
    case DType::kFloat16: return ptx::to_float(static_cast<const Float16*>(values)[i]);
    default: return static_cast<const float*>(values)[i];
  }
}

__device__ __forceinline__ RowTerms row_terms(const Epilogue& e, int64_t row) {
  RowTerms terms;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const bool inside = row + i < e.n;
    terms.scale[i] = inside && e.row_scales != nullptr ? e.row_scales[row + i] : 1.0f;
    terms.bias[i] =
        inside && e.bias != nullptr ? load_as_float(e.bias, e.out_dtype, row + i) : 0.0f;
  }
  return terms;
}

// Rounds to T and writes what lies inside, in 16-byte stores where the row's alignment allows.
template <class T>
__device__ __forceinline__ void write_run(const Epilogue& e, int64_t token, int64_t row,
                                          const float (&y)[kRun]) {
  T* out = static_cast<T*>(e.out) + token * e.n + row;
  if (row + kRun <= e.n && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    if constexpr (sizeof(T) == 2) {
      ptx::store16(out, {ptx::pack<T>(y[0], y[1]), ptx::pack<T>(y[2], y[3]),
                         ptx::pack<T>(y[4], y[5]), ptx::pack<T>(y[6], y[7])});
    } else {
      store_run(out, y);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (row + i < e.n) out[i] = ptx::from_float<T>(y[i]);
  }
}

template <class S>  // float or int32_t
__device__ __forceinline__ void finish_run(const Epilogue& e, const RowTerms& terms, int64_t token,
                                           int64_t row, const S (&sum)[kRun]) {
  const float x_scale = e.x_scales != nullptr ? e.x_scales[token] : 1.0f;
  float y[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    y[i] = static_cast<float>(sum[i]) * x_scale * terms.scale[i] + terms.bias[i];
  }
  if (e.activation != Activation::kNone) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) y[i] = activate(y[i], e.activation);
  }
  switch (e.out_dtype) {
    case DType::kBFloat16: return write_run<BFloat16>(e, token, row, y);
    case DType::kFloat16: return write_run<Float16>(e, token, row, y);
    default: return write_run<float>(e, token, row, y);
  }
}

// ---- launching ----------------------------------------------------------------------------------

// Calls `launch_of` with a value of the type.
template <class F>
void with_type(DType dtype, const F& launch_of) {
  switch (dtype) {
    case DType::kBFloat16: return launch_of(BFloat16{});
    case DType::kFloat16: return launch_of(Float16{});
    case DType::kInt8: return launch_of(int8_t{});
    case DType::kE4M3: return launch_of(E4M3{});
    default: fail("sparse24: there is no tensor-core kernel for ", name(dtype));
  }
}

template <class T, class... Parameters>
void check_architecture(void (*kernel)(Parameters...)) {
  if constexpr (std::is_same_v<T, E4M3>) {
    const int architecture = compiled_architecture(kernel);
    GOSSAMER_CHECK(ptx::has_mma_sp<T>(architecture),
                   "sparse24: this GPU runs the kernel's code for sm_", architecture,
                   ", where mma.sp does not take float8_e4m3fn (sm_89 and sm_120 have it)");
  }
}

}  // namespace gossamer::sparse24
