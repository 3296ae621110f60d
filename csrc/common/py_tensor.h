#pragma once
// pybind11 caster torch.Tensor -> TensorView. Included by api.cpp files only.
//
// Newer torch hands out a C table (`torch.Tensor.__dlpack_c_exchange_api__`, DLPack 1.3) that fills
// a DLTensor in a tenth of a microsecond; older torch is asked through its Python attributes. The
// view of a CUDA tensor also carries the stream that torch would use on its device now.
// The structs below are the part of DLPack's ABI that this needs.
#include <pybind11/pybind11.h>

#include "common/check.h"
#include "common/tensor_view.h"

namespace gossamer::dlpack {

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// Both are set once at module import, under the import lock, and only read afterwards.
struct Torch {
  PyTypeObject* tensor_type = nullptr;
  const ExchangeApi* api = nullptr;
};
inline Torch& torch() {
  static Torch instance;
  return instance;
}

inline void initialise() {
  const pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
  torch().tensor_type = reinterpret_cast<PyTypeObject*>(pybind11::object(type).release().ptr());
  if (!pybind11::hasattr(type, "__dlpack_c_exchange_api__")) return;
  const pybind11::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();
  if (api != nullptr && api->major == 1) torch().api = api;
}

inline DType dtype_from_code(uint8_t code, uint8_t bits) {
  constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kE4M3 = 10;
  if (code == kFloat && bits == 64) return DType::kFloat64;
  if (code == kFloat && bits == 32) return DType::kFloat32;
  if (code == kFloat && bits == 16) return DType::kFloat16;
  if (code == kBFloat && bits == 16) return DType::kBFloat16;
  if (code == kE4M3 && bits == 8) return DType::kE4M3;
  if (code == kInt && bits == 8) return DType::kInt8;
  if (code == kUInt && bits == 8) return DType::kUInt8;
  if (code == kInt && bits == 16) return DType::kInt16;
  if (code == kInt && bits == 32) return DType::kInt32;
  if (code == kInt && bits == 64) return DType::kInt64;
  throw pybind11::type_error("gossamer: unsupported dtype (DLPack code " + std::to_string(code) +
                             ", " + std::to_string(bits) + " bits)");
}

inline DType dtype_from_name(const std::string& text) {
  const std::string bare = text.substr(text.rfind('.') + 1);
  for (DType t : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kE4M3,
                  DType::kInt8, DType::kUInt8, DType::kInt16, DType::kInt32, DType::kInt64}) {
    if (bare == name(t)) return t;
  }
  throw pybind11::type_error("gossamer: unsupported dtype " + text);
}

inline void check_ndim(int64_t ndim) {
  GOSSAMER_CHECK(ndim <= kMaxDims, "gossamer: ", ndim, " dimensions, at most ", kMaxDims);
}

inline void view_through_table(PyObject* object, TensorView& out) {
  constexpr int32_t kCPU = 1, kCUDA = 2, kCUDAHost = 3;
  Tensor t;
  if (torch().api->view_from_object(object, &t) != 0) throw pybind11::error_already_set();
  check_ndim(t.ndim);
  if (t.device_type != kCPU && t.device_type != kCUDA && t.device_type != kCUDAHost) {
    throw pybind11::type_error("gossamer: tensors of DLPack device type " +
                               std::to_string(t.device_type) + " are not supported");
  }
  out.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  out.dtype = dtype_from_code(t.code, t.bits);
  out.device = t.device_type == kCUDA ? Device::kCUDA : Device::kCPU;
  out.device_index = out.device == Device::kCPU ? 0 : t.device_id;
  out.ndim = t.ndim;
  for (int d = 0; d < t.ndim; ++d) {
    out.shape[d] = t.shape[d];
    out.strides[d] = t.strides[d];
  }
  if (out.device == Device::kCUDA &&
      torch().api->current_stream(t.device_type, t.device_id, &out.stream) != 0) {
    throw pybind11::error_already_set();
  }
}

inline void* current_stream(int device_index) {
  const auto torch_c = pybind11::module_::import("torch._C");
  return reinterpret_cast<void*>(
      torch_c.attr("_cuda_getCurrentRawStream")(device_index).cast<uintptr_t>());
}

inline void view_through_attributes(PyObject* object, TensorView& out) {
  const auto tensor = pybind11::reinterpret_borrow<pybind11::object>(object);
  const auto shape = pybind11::tuple(tensor.attr("shape"));
  const auto strides = pybind11::tuple(tensor.attr("stride")());
  const auto device = tensor.attr("device").attr("type").cast<std::string>();
  check_ndim(static_cast<int64_t>(shape.size()));
  if (device != "cpu" && device != "cuda") {
    throw pybind11::type_error("gossamer: tensors on device " + device + " are not supported");
  }
  out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  out.dtype = dtype_from_name(pybind11::str(tensor.attr("dtype")).cast<std::string>());
  out.device = device == "cuda" ? Device::kCUDA : Device::kCPU;
  const auto index = tensor.attr("device").attr("index");
  out.device_index = index.is_none() ? 0 : index.cast<int>();
  out.ndim = static_cast<int>(shape.size());
  for (int d = 0; d < out.ndim; ++d) {
    out.shape[d] = shape[d].cast<int64_t>();
    out.strides[d] = strides[d].cast<int64_t>();
  }
  if (out.device == Device::kCUDA) out.stream = current_stream(out.device_index);
}

}  // namespace gossamer::dlpack

namespace pybind11::detail {

template <>
struct type_caster<gossamer::TensorView> {
  PYBIND11_TYPE_CASTER(gossamer::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    namespace dlpack = gossamer::dlpack;
    if (!PyObject_TypeCheck(source.ptr(), dlpack::torch().tensor_type)) return false;
    if (dlpack::torch().api != nullptr) {
      dlpack::view_through_table(source.ptr(), value);
    } else {
      dlpack::view_through_attributes(source.ptr(), value);
    }
    if (value.data == nullptr && value.numel() != 0) {
      throw value_error("gossamer: a tensor without memory (fake or meta) reached a kernel");
    }
    return true;
  }
};

}  // namespace pybind11::detail
