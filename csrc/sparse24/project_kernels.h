#pragma once
// Projections of a row over a vector vocabulary S and a storage type T: every four lanes are one
// group. Included by units of one instruction set.
#include "sparse24/project.h"

namespace gossamer::sparse24 {
namespace {

template <class S, class T>
struct Project {
  using F = typename S::F;
  using I = typename S::I;

  static I places() {
    alignas(64) static constexpr uint32_t kPlaces[16] = {0, 1, 2, 3, 0, 1, 2, 3,
                                                         0, 1, 2, 3, 0, 1, 2, 3};
    return S::load_words(kPlaces);
  }

  // In each lane that of its four at the place; only the two low bits count.
  static I at(I a, I place) { return S::as_int(S::pick(S::as_float(a), place)); }

  // In each lane the one so many places on, around the end.
  static I around(I a, uint32_t distance) { return at(a, S::add(places(), S::set1(distance))); }

  // 1 in the lanes whose neighbour at the distance comes before them in the order of what is kept:
  // it is larger, or as large and of a lower index.
  template <uint32_t kDistance>
  static I precedes(I magnitude) {
    alignas(64) static constexpr uint32_t kLower[3][16] = {
        {0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1},
        {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1},
        {0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1}};
    const I least = S::add(around(magnitude, kDistance), S::load_words(kLower[kDistance - 1]));
    return S::template shift_right<31>(S::sub(magnitude, least));
  }

  // A group's four magnitudes as integers, whose order is theirs even where denormals are flushed.
  static I magnitudes(F w) {
    return S::min(S::and_(S::as_int(w), S::set1(0x7fffffffu)), S::set1(0x7f800000u));
  }

  // Negative in the two lanes of each four that are kept.
  static F kept(I magnitude) {
    const I before =
        S::add(S::add(precedes<1>(magnitude), precedes<2>(magnitude)), precedes<3>(magnitude));
    return S::to_float(S::sub(before, S::set1(2u)));
  }

  static int64_t hard(const void* weight, int64_t k, float, void* out) {
    const T* w = static_cast<const T*>(weight);
    int64_t column = 0;
    for (; column + S::kLanes <= k; column += S::kLanes) {
      const F v = S::load(w + column);
      S::store(static_cast<T*>(out) + column, S::where_negative(kept(magnitudes(v)), v, S::zero()));
    }
    return column;
  }

  static F rounded(F a) {
    if constexpr (sizeof(T) == 4) return a;
    T stored[S::kLanes];
    S::store(stored, a);
    return S::load(stored);
  }

  // The second smallest of each four: of the smaller and of the larger ones of two pairs, the
  // larger of those and the smaller of these lie in the middle.
  static I second_smallest(I a) {
    const I next = around(a, 1);  // the even lanes hold the pairs (0, 1) and (2, 3)
    const I low = S::min(a, next), high = S::max(a, next);
    const I middle = S::min(S::max(low, around(low, 2)), S::min(high, around(high, 2)));
    return at(middle, S::and_(places(), S::set1(~1u)));
  }

  static int64_t soft(const void* weight, int64_t k, float scale, void* out) {
    const T* w = static_cast<const T*>(weight);
    const F factor = S::set1(scale);
    int64_t column = 0;
    for (; column + S::kLanes <= k; column += S::kLanes) {
      const F v = S::load(w + column);
      const I magnitude = magnitudes(v);
      const F above = rounded(S::sub(S::abs(v), S::as_float(second_smallest(magnitude))));
      // max() gives its second operand where one is no number.
      const F scaled = rounded(S::mul(S::max(S::zero(), above), factor));
      const I sign = S::and_(S::as_int(v), S::set1(0x80000000u));
      const F signed_ = S::as_float(S::or_(sign, S::as_int(S::abs(scaled))));
      S::store(static_cast<T*>(out) + column,
               S::where_negative(kept(magnitude), signed_, S::zero()));
    }
    return column;
  }
};

template <class S, class T>
constexpr ProjectUnit kProjectUnit{Project<S, T>::hard, Project<S, T>::soft};

template <class S>
const ProjectUnit* project_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kProjectUnit<S, float>;
    case DType::kBFloat16: return &kProjectUnit<S, BFloat16>;
    case DType::kFloat16: return &kProjectUnit<S, Float16>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::sparse24
