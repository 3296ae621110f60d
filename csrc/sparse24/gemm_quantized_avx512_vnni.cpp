// int8 by VPDPBUSD: four products of bytes a lane, one unsigned and one signed, are added to its
// int32 sum. x is moved up by 128 to be unsigned, and 128 times the sum of the weights comes off in
// the end; int32 wraps round, so this is exact where the sum itself fits.
#include "common/simd_avx512.h"
#include "sparse24/gemm_quantized_kernels.h"

namespace gossamer::sparse24 {
namespace {

struct DotVNNI {
  using S = Simd;
  using I = Simd::I;
  using Sum = I;
  using X = int8_t;
  struct Shared {
    I moved = S::set1(0u);  // what moving x up added to every row's sum
  };
  static constexpr int kSteps = kRecordK / kWordColumns;
  static constexpr int kStepBytes = kWordColumns;
  static constexpr int kRecordLines = 1 + kSteps;
  static constexpr bool kScaled = false;

  static void store(const int8_t (&columns)[kRecordK], int64_t stride, char* to) {
    for (int step = 0; step < kSteps; ++step, to += stride) {
      uint64_t eight;
      __builtin_memcpy(&eight, columns + kWordColumns * step, sizeof eight);
      eight ^= 0x8080808080808080u;
      __builtin_memcpy(to, &eight, sizeof eight);
    }
  }

  struct Weights {
    I four, control;  // of two groups

    Weights(const uint32_t* words, int step, I indices, const float*, Shared& shared)
        : four(S::load_words(words + (1 + step) * kBlockN)) {
      shared.moved = _mm512_dpbusd_epi32(shared.moved, S::set1(0x80808080u), four);
      const I byte = step == 0   ? indices
                     : step == 1 ? S::shift_right<8>(indices)
                     : step == 2 ? S::shift_right<16>(indices)
                                 : S::shift_right<24>(indices);
      // Its four fields of two bits, each at the bottom of a byte.
      const I nibbles = spread<12>(S::and_(byte, S::set1(0xffu)), 0x000f000fu);
      const I fields = spread<6>(nibbles, 0x03030303u);
      control = S::or_(fields, S::set1(0x04040000u));
    }
    template <int Shift>
    static I spread(I a, uint32_t mask) {
      return S::and_(S::or_(a, S::shift_left<Shift>(a)), S::set1(mask));
    }
  };
  template <int Chains>
  static void add(const Weights& w, int step, const char* x, I (&sum)[Chains]) {
    int64_t eight;
    __builtin_memcpy(&eight, x, sizeof eight);
    const I columns = S::shuffle_bytes(_mm512_set1_epi64(eight), w.control);
    I& a = sum[step % Chains];
    a = _mm512_dpbusd_epi32(a, columns, w.four);
  }
  template <int Chains>
  static S::F total(const I (&sum)[Chains], const Shared& shared) {
    I all = sum[0];
    for (int chain = 1; chain < Chains; ++chain) all = S::add(all, sum[chain]);
    return S::to_float(S::sub(all, shared.moved));
  }
};

}  // namespace

const QuantizedUnit* quantized_unit_avx512_vnni(DType dtype) {
  return dtype == DType::kInt8 ? &kQuantizedUnit<Simd, DotVNNI> : quantized_unit_avx512(dtype);
}

}  // namespace gossamer::sparse24
