#pragma once
// The tensor-core instructions of a warp, by definition. Lane l = 4g + t of a warp holds, with E
// elements of T in a register and S columns stored of each row of A:
//
//   A [16][S]  register i, element e: row g + 8 (i mod 2), column E t + 4E (i / 2) + e
//   B [K][8]   register i, element e: row E t + 4E i + e, column g
//   D [16][8]  register i:            row g + 8 (i / 2), column 2t + i mod 2
//
// Dense: S = K. Sparse: S = K / 2, and the metadata say which two of every four columns of A each
// stored pair stands for. Products are summed in order of k; the hardware's order and inner
// precision are its own, so tests compare with a tolerance, or with whole numbers, where all is
// exact.
#include "twins/numbers.h"
#include "twins/warp.h"

namespace gossamer::emulation {

struct TF32 {
  uint32_t bits;
};

template <class T>
auto decode(const T& x) {
  if constexpr (std::is_same_v<T, int8_t>) {
    return static_cast<int32_t>(x);
  } else if constexpr (std::is_same_v<T, TF32>) {
    return std::bit_cast<float>(x.bits & ~0x1fffu);  // the unit reads 19 of the bits
  } else {
    return ptx::to_float(x);
  }
}

template <class T>
constexpr int kPerRegister = 4 / sizeof(T);

template <class T>
auto element(const uint32_t& word, int e) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&word) + e * sizeof(T), sizeof(T));
  return decode(x);
}

// Column of A, within its group of four, of each stored element of 16 rows.
template <int Stored>
using Columns = uint8_t[16][Stored];

// The metadata of 16 rows from the registers of a warp's lanes; two bits a stored element, the
// first of a pair in the lower two.
//
//   16-bit types  lanes 4g + 2F and 4g + 2F + 1 (F the selector) hold columns 0-15 and 16-31, row g
//                 in the low half of the register and row g + 8 in the high half
//   8-bit types   lane 4g + t holds 32 columns of a row: row g + 8 (t mod 2), columns from 32 (t /
//   2)
template <int Bytes, int Stored>
void decode_metadata(const uint32_t (&lanes)[kWarpSize], int selector, Columns<Stored>& columns,
                     const char* name, const Site& site) {
  for (int row = 0; row < 16; ++row) {
    for (int group = 0; group < Stored / 2; ++group) {
      const int quad = 4 * (row % 8);
      const int lane =
          Bytes == 2 ? quad + 2 * selector + group / 4 : quad + row / 8 + 2 * (group / 8);
      const int shift = Bytes == 2 ? 16 * (row / 8) + 4 * (group % 4) : 4 * (group % 8);
      const uint32_t pair = lanes[lane] >> shift & 15, first = pair & 3, second = pair >> 2;
      if (first >= second) {
        fault(site, name, ": metadata of lane ", lane, ", bits ", shift, " to ", shift + 3,
              " are 0x", std::hex, pair, std::dec, ": the two columns must be in increasing order");
      }
      columns[row][2 * group] = static_cast<uint8_t>(first);
      columns[row][2 * group + 1] = static_cast<uint8_t>(second);
    }
  }
}

struct Fragments {  // one lane's; `a` and `b` hold as many registers as the instruction takes
  const uint32_t *a, *b;
  uint32_t metadata;
};

// D += A B for one warp. `columns` is null for a dense A.
template <class T, int K, int Stored>
void multiply(const Fragments* const (&in)[kWarpSize],
              ptx::Accumulator<T> (*const (&d)[kWarpSize])[4], const Columns<Stored>* columns) {
  using Value = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  constexpr int E = kPerRegister<T>;
  Value a[16][Stored], b[K][8], sum[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < Stored / (2 * E); ++i) {
      for (int e = 0; e < E; ++e) {
        a[g + 8 * (i % 2)][E * t + 4 * E * (i / 2) + e] = element<T>(in[lane]->a[i], e);
      }
    }
    for (int i = 0; i < K / (4 * E); ++i) {
      for (int e = 0; e < E; ++e) b[E * t + 4 * E * i + e][g] = element<T>(in[lane]->b[i], e);
    }
    for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][2 * t + i % 2] = (*d[lane])[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int s = 0; s < Stored; ++s) {
      const int k = columns == nullptr ? s : s / 2 * 4 + (*columns)[row][s];
      for (int n = 0; n < 8; ++n) sum[row][n] += a[row][s] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) (*d[lane])[i] = sum[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <class T, int K, int RegistersA, int RegistersB>
void mma(const char* name, ptx::Accumulator<T> (&d)[4], const uint32_t (&a)[RegistersA],
         const uint32_t (&b)[RegistersB], const Site& site) {
  static_assert(RegistersA * kPerRegister<T> * 2 == K && RegistersB * kPerRegister<T> * 4 == K);
  whole_warp(
      name, Fragments{a, b, 0}, d,
      [](const auto& in, const auto& out) { multiply<T, K, K>(in, out, nullptr); }, site);
}

template <class T, int K, int Selector>
void mma_sp(const char* name, ptx::Accumulator<T> (&d)[4], const uint32_t (&a)[4],
            const uint32_t (&b)[4], uint32_t metadata, const Site& site) {
  static_assert(Selector >= 0 && Selector < (sizeof(T) == 2 ? 2 : 1));
  constexpr int kStored = K / 2;
  whole_warp(
      name, Fragments{a, b, metadata}, d,
      [&](const auto& in, const auto& out) {
        uint32_t words[kWarpSize];
        for (int lane = 0; lane < kWarpSize; ++lane) words[lane] = in[lane]->metadata;
        Columns<kStored> columns;
        decode_metadata<sizeof(T), kStored>(words, Selector, columns, name, site);
        multiply<T, K, kStored>(in, out, &columns);
      },
      site);
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

template <class T>  // Float16 or BFloat16
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
  static_assert(sizeof(T) == 2);
  emulation::mma<T, 16>("mma_m16n8k16", d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  emulation::mma<emulation::TF32, 8>("mma_m16n8k8_tf32", d, a, b, site);
}
template <class T>  // int8_t or E4M3
void mma_m16n8k32(Accumulator<T> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
  static_assert(sizeof(T) == 1);
  emulation::mma<T, 32>("mma_m16n8k32", d, a, b, site);
}
template <class T>
constexpr bool has_mma_sp(int /*architecture*/) {
  return true;
}
template <class T>
constexpr bool kHasMmaSp = true;

template <class T, int Selector>  // Float16 or BFloat16; Selector 0 or 1
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, Site site = Site::current()) {
  static_assert(sizeof(T) == 2);
  emulation::mma_sp<T, 32, Selector>("mma_sp_m16n8k32", d, a, b, metadata, site);
}
template <class T>  // int8_t or E4M3
void mma_sp_m16n8k64(Accumulator<T> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, Site site = Site::current()) {
  static_assert(sizeof(T) == 1);
  emulation::mma_sp<T, 64, 0>("mma_sp_m16n8k64", d, a, b, metadata, site);
}

}  // namespace gossamer::ptx
