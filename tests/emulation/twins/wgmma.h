#pragma once
// The tensor cores of a warpgroup: wgmma and wgmma.sp, by definition, a warp at a time.
#include "twins/mma.h"
#include "twins/tma.h"

namespace gossamer::emulation {

// The matrix that a descriptor describes, with rows along K: see ptx::matrix_descriptor.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, const char* name, const Site& site)
      : start_(field(descriptor, 0)),
        leading_(field(descriptor, 16)),
        stride_(field(descriptor, 32)),
        swizzle_(kSwizzles[descriptor >> 62]),
        name_(name),
        site_(site) {
    if ((descriptor >> 49 & 7) != 0) {
      fault(site, name, ": a descriptor with a base offset, which is not supported");
    }
  }

  // 16 bytes of a row, from byte 16 * chunk on.
  const unsigned char* chunk(int row, int chunk) const {
    const auto r = static_cast<size_t>(row), c = static_cast<size_t>(chunk);
    if (swizzle_ == Swizzle::kNone) {
      const size_t at = start_ + r / 8 * stride_ + r % 8 * 16 + c * leading_;
      return block->shared.async_read(at, 16, name_, site_);
    }
    const size_t span = size_t{16} << static_cast<int>(swizzle_);
    if (start_ % span + 16 * (c + 1) > span) {
      fault(site_, name_, ": a row reaches past the ", span, " bytes of its swizzle");
    }
    const size_t at = start_ + r / 8 * stride_ + r % 8 * span + 16 * c;
    return block->shared.async_read(swizzled(at, swizzle_), 16, name_, site_);
  }

 private:
  static constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64,
                                          Swizzle::k32};
  static size_t field(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3fff) << 4; }
  size_t start_, leading_, stride_;
  Swizzle swizzle_;
  const char* name_;
  Site site_;
};

template <class T>
void decode_chunk(const unsigned char* bytes, auto* to, int pitch) {
  for (size_t i = 0; i < 16 / sizeof(T); ++i) {
    T x;
    std::memcpy(&x, bytes + i * sizeof(T), sizeof(T));
    to[i * static_cast<size_t>(pitch)] = decode(x);
  }
}

// What one warp's lanes bring. A is in registers or described.
struct WgmmaOperands {
  const uint32_t* a_registers;  // null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  uint32_t metadata;
  bool accumulate;
};

// This warp's 16 rows of D += A B; Stored < K where A is sparse.
template <class T, int N, int K, int Stored, int Selector>
struct WarpProduct {
  using Value = ptx::Accumulator<T>;
  uint32_t a_registers[kWarpSize][4];
  uint32_t metadata[kWarpSize];
  WgmmaOperands operands;
  int first_row;

  void operator()(Product& product) const {
    constexpr int kPerChunk = 16 / sizeof(T), E = kPerRegister<T>;
    const char* name = Stored < K ? "wgmma_sp" : "wgmma";
    Value a[16][Stored];
    std::vector<std::array<Value, N>> b(K);  // too large for a fiber's stack
    Columns<Stored> columns;
    if (Stored < K) {
      decode_metadata<sizeof(T), Stored>(metadata, Selector, columns, name, product.site);
    }
    if (operands.a_registers == nullptr) {
      const SharedMatrix matrix(operands.a_descriptor, name, product.site);
      for (int row = 0; row < 16; ++row) {
        for (int c = 0; c < Stored / kPerChunk; ++c) {
          decode_chunk<T>(matrix.chunk(first_row + row, c), &a[row][c * kPerChunk], 1);
        }
      }
    } else {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 4 * E; ++i) {
          const int column = E * (lane % 4) + 4 * E * (i / E / 2) + i % E;
          a[lane / 4 + 8 * (i / E % 2)][column] = element<T>(a_registers[lane][i / E], i % E);
        }
      }
    }
    const SharedMatrix matrix(operands.b_descriptor, name, product.site);
    for (int n = 0; n < N; ++n) {
      for (int c = 0; c < K / kPerChunk; ++c) {
        decode_chunk<T>(matrix.chunk(n, c), &b[c * kPerChunk][n], N);
      }
    }
    for (int row = 0; row < 16; ++row) {
      Value sum[N];
      const auto at = [&](int n) -> uint32_t& {  // column n of D, in its lane's registers
        const int lane = row % 8 * 4 + n % 8 / 2;
        return product.sum[lane * product.registers + n / 8 * 4 + row / 8 * 2 + n % 2];
      };
      for (int n = 0; n < N; ++n) sum[n] = std::bit_cast<Value>(at(n));
      for (int s = 0; s < Stored; ++s) {
        const int k = Stored < K ? s / 2 * 4 + columns[row][s] : s;
        for (int n = 0; n < N; ++n) sum[n] += a[row][s] * b[k][n];
      }
      for (int n = 0; n < N; ++n) at(n) = std::bit_cast<uint32_t>(sum[n]);
    }
  }
};

template <class T, int N, int K, int Stored, int Selector>
void wgmma(const char* name, ptx::Accumulator<T> (&d)[N / 2], const WgmmaOperands& mine,
           const Site& site) {
  constexpr int kSizes[] = {8, 16, 32, 64, 96, 128, 192, 256};
  static_assert(std::find(std::begin(kSizes), std::end(kSizes), N) != std::end(kSizes),
                "csrc/common/ptx_wgmma.cuh has no wgmma of this N");
  whole_warp(
      name, mine, d,
      [&](const auto& in, const auto& out) {
        if (!block->products().fenced()) {
          fault(site, name, ": no wgmma_fence since the kernel began or last waited");
        }
        const WgmmaOperands& first = *in[0];
        block->check_issue(site, first.a_registers ? 0 : first.a_descriptor, first.b_descriptor);
        WarpProduct<T, N, K, Stored, Selector> work;
        work.operands = first;
        work.first_row = running->warp % 4 * 16;
        auto product = std::make_shared<Product>();
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if (in[lane]->b_descriptor != first.b_descriptor ||
              in[lane]->accumulate != first.accumulate ||
              (!first.a_registers && in[lane]->a_descriptor != first.a_descriptor)) {
            fault(site, name, ": lane ", lane,
                  "'s descriptors or `accumulate` differ from lane 0's");
          }
          work.metadata[lane] = in[lane]->metadata;
          if (first.a_registers) std::copy_n(in[lane]->a_registers, 4, work.a_registers[lane]);
          product->to[lane] = reinterpret_cast<uint32_t*>(*out[lane]);
        }
        product->registers = N / 2;
        product->sum.resize(kWarpSize * N / 2);
        product->site = site;
        product->compute = work;
        block->products().issue(product, first.accumulate);
      },
      site);
}

inline WgmmaOperands operands(uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) {
  return {nullptr, a, b, metadata, accumulate};
}
inline WgmmaOperands operands(const uint32_t (&a)[4], uint64_t b, uint32_t metadata,
                              bool accumulate) {
  return {a, 0, b, metadata, accumulate};
}

// An instruction of the whole warp that only acts on its products.
template <class F>
void on_products(const char* name, const F& act, const Site& site) {
  int none = 0;
  whole_warp(name, none, none, [&](const auto&, const auto&) { act(block->products()); }, site);
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

inline void wgmma_fence(Site site = Site::current()) {
  emulation::on_products("wgmma_fence", [](auto& products) { products.fence(); }, site);
}
inline void wgmma_commit(Site site = Site::current()) {
  emulation::on_products("wgmma_commit", [](auto& products) { products.commit(); }, site);
}
template <int Pending>
void wgmma_wait(Site site = Site::current()) {
  emulation::on_products("wgmma_wait", [](auto& products) { products.wait(Pending); }, site);
}

inline uint64_t matrix_descriptor(const void* shared, Swizzle swizzle, int leading, int stride,
                                  Site site = Site::current()) {
  constexpr uint64_t kModes[] = {0, 3, 2, 1};  // by Swizzle: none, 32, 64 and 128 bytes
  const auto field = [](size_t bytes) { return uint64_t{(bytes & 0x3ffffu) >> 4}; };
  const size_t at = emulation::block->shared.check(shared, 16, 16, "matrix_descriptor", site);
  return field(at) | field(static_cast<size_t>(leading)) << 16 |
         field(static_cast<size_t>(stride)) << 32 | kModes[static_cast<int>(swizzle)] << 62;
}

template <class T, int N, class A>
void wgmma(Accumulator<T> (&d)[N / 2], const A& a, uint64_t b, bool accumulate,
           Site site = Site::current()) {
  constexpr int kK = 32 / sizeof(T);
  emulation::wgmma<T, N, kK, kK, 0>("wgmma", d, emulation::operands(a, b, 0, accumulate), site);
}
template <class T, int N, int Selector, class A>
void wgmma_sp(Accumulator<T> (&d)[N / 2], const A& a, uint64_t b, uint32_t metadata,
              bool accumulate, Site site = Site::current()) {
  static_assert(Selector >= 0 && Selector < (sizeof(T) == 2 ? 2 : 1));
  constexpr int kK = 64 / sizeof(T);
  emulation::wgmma<T, N, kK, kK / 2, Selector>(
      "wgmma_sp", d, emulation::operands(a, b, metadata, accumulate), site);
}

}  // namespace gossamer::ptx
