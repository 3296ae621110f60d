// Portable 2:4 weights into the layouts that the kernels of a GPU read, and back.
//
// A warp moves a whole record, by 16 bytes a lane on both sides. What lies between is always the
// transposition of 4 x 4 words among the four lanes of a quad (lanes 4g to 4g + 3, t within):
//
//                  fragments (cuda.h)                     panels (sparse24.h, float32)
//   lane t loads   16 bytes of row g, chunk 4j + t        chunk c of row 4q + t, four values
//   and then has   word t of the chunks 4j .. 4j + 3      value 4c + t of rows 4q .. 4q + 3
//
// 32 bytes of a row are a step of mma.sp, for 16-bit and 8-bit values alike. Of these, register i
// of lane 4g + t holds word t + 4 (i / 2) of row g + 8 (i mod 2), so the transposed words of rows g
// and g + 8 are the registers of two steps:
//
//   row g      [ a0 of 2j | a2 of 2j | a0 of 2j + 1 | a2 of 2j + 1 ]      chunks 4j .. 4j + 3
//   row g + 8  [ a1       | a3       | a1           | a3           ]
//
// 4-bit values need bytes where the others need words: of 16 bytes of a row, which are the pairs of
// two steps of mma.sp, lane 4g + t holds byte t of every word. So a transposition of 4 x 4 bytes
// within each lane comes before that of words, and chunk c is in lane t these bytes, each with both
// elements of a register:
//
//   row g      [ a0 of 2c | a2 of 2c | a0 of 2c + 1 | a2 of 2c + 1 ]
//   row g + 8  [ a1       | a3       | a1           | a3           ]
#include "common/run.cuh"
#include "common/warp.cuh"
#include "sparse24/nibbles.cuh"
#include "sparse24/pack_cuda.h"

namespace gossamer::sparse24::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Enough blocks to fill any GPU several times; beyond, a warp takes more records.
constexpr int64_t kMaxBlocks = 2048;

// A portable weight, or the place for one, with values of type T and I either const or not.
template <class T, class I>
struct Portable {
  T* values;
  I* indices;
  int64_t n, row_values, index_bytes;
};

struct Tiles {
  int64_t count, records;  // a tile: 16 rows; records of one tile
};

// Two 4-bit values, the pair of a group, as the portable format stores them.
struct Int4Pair {
  uint8_t bits;
};

// Elements of type T that a group of four columns stores in its row.
template <class T>
constexpr int kPerGroup = std::is_same_v<std::remove_const_t<T>, Int4Pair> ? 1 : 2;

// ---- words between lanes ------------------------------------------------------------------------

// Word j of lane t becomes word t of lane j, in every quad. Its own inverse.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t given = upper ? words[j] : words[j | bit];
      const uint32_t taken = __shfl_xor_sync(kAllLanes, given, static_cast<int>(bit));
      (upper ? words[j] : words[j | bit]) = taken;
    }
  }
}

// Byte j of word i becomes byte i of word j, within a lane. Its own inverse.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140);  // bytes 0, 0, 1, 1
  const uint32_t high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

// The pairs in the four bytes as two's complement, to first elements in the lower nibbles, second
// ones in the upper, plus 8; and back.
__device__ __forceinline__ uint32_t separate_nibbles(uint32_t pairs) {
  const auto even = [](uint32_t word) {  // nibbles 0, 2, 4, 6 in the lower half
    word &= 0x0f0f0f0fu;
    word = (word | word >> 4) & 0x00ff00ffu;
    return (word | word >> 8) & 0xffffu;
  };
  return (even(pairs) | even(pairs >> 4) << 16) ^ 0x88888888u;
}
__device__ __forceinline__ uint32_t pair_nibbles(uint32_t separate) {
  const auto spread = [](uint32_t half) {
    half = (half | half << 8) & 0x00ff00ffu;
    return (half | half << 4) & 0x0f0f0f0fu;
  };
  separate ^= 0x88888888u;
  return spread(separate & 0xffffu) | spread(separate >> 16) << 4;
}

// Metadata of 16-bit values from that of 8-bit ones, and back. There lane t has 32 columns of row
// g (t even) or g + 8 (t odd); here it has the first (t even) or last 16 columns of both rows.
__device__ __forceinline__ uint32_t exchange_halves(uint32_t word) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, word, 1);
  return threadIdx.x % 2 == 0 ? __byte_perm(word, other, 0x5410) : __byte_perm(other, word, 0x7632);
}

// ---- runs of a row as words ---------------------------------------------------------------------

__device__ __forceinline__ uint4 as_uint4(const uint32_t (&words)[4]) {
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// 16 or 4 bytes, of which the first `valid` elements exist. `kWhole`: all, and they are aligned.
template <bool kWhole, class T, int Words>
__device__ __forceinline__ void load_words(uint32_t (&words)[Words], const T* from, int64_t valid) {
  static_assert(Words == 4 || Words == 1);
  if constexpr (!kWhole) {
    const auto run = load_run<T, 4 * Words / static_cast<int>(sizeof(T))>(from, valid);
    memcpy(words, run.at, sizeof(words));
  } else if constexpr (Words == 4) {
    const uint4 v = ptx::load_nc16(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
  }
}
template <bool kWhole, class T, int Words>
__device__ __forceinline__ void store_words(T* to, const uint32_t (&words)[Words], int64_t valid) {
  static_assert(Words == 4 || Words == 1);
  if constexpr (!kWhole) {
    Run<T, 4 * Words / static_cast<int>(sizeof(T))> run;
    memcpy(run.at, words, sizeof(words));
    store_run(to, run, valid);
  } else if constexpr (Words == 4) {
    ptx::store16(to, as_uint4(words));
  } else {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  }
}

// The part of a portable weight that a record covers: how much of it exists, and whether all its
// accesses may be wide.
template <class T, class I>
struct Window {
  T* values;  // of the record's first row
  I* indices;
  int64_t rows, row_values, index_bytes;
  int64_t values_left, bytes_left;  // of a row, from the record on
  bool whole;

  __device__ __forceinline__ Window(const Portable<T, I>& w, int64_t tile, int64_t record,
                                    int values_of_record)
      : rows(w.n - 16 * tile), row_values(w.row_values), index_bytes(w.index_bytes) {
    const int64_t first_value = values_of_record * record;
    const int64_t first_byte = first_value / (2 * kPerGroup<T>);
    values = w.values + 16 * tile * row_values + first_value;
    indices = w.indices + 16 * tile * index_bytes + first_byte;
    values_left = row_values - first_value;
    bytes_left = index_bytes - first_byte;
    whole = rows >= 16 && values_left >= values_of_record &&
            (reinterpret_cast<uintptr_t>(values) | row_values * sizeof(T)) % 16 == 0 &&
            (reinterpret_cast<uintptr_t>(indices) | index_bytes) % 4 == 0;
  }

  __device__ __forceinline__ T* values_at(int row, int value) const {
    return values + row * row_values + value;
  }
  __device__ __forceinline__ I* indices_at(int row, int byte) const {
    return indices + row * index_bytes + byte;
  }
  // What exists from there on, at least zero or negative.
  __device__ __forceinline__ int64_t values_valid(int row, int value) const {
    return row < rows ? values_left - value : 0;
  }
  __device__ __forceinline__ int64_t bytes_valid(int row, int byte) const {
    return row < rows ? bytes_left - byte : 0;
  }
  // The bits of the word of indices from `byte` on that belong to a group.
  __device__ __forceinline__ uint32_t group_bits(int byte) const {
    const int64_t groups = values_left / kPerGroup<T> - 2 * byte;
    return groups >= 8 ? 0xffffffffu : groups > 0 ? 0xffffffffu >> (4 * (8 - groups)) : 0u;
  }
};

// ---- fragments ----------------------------------------------------------------------------------

template <class T>
struct Fragments {
  static constexpr bool kFourBit = kPerGroup<T> == 1;
  static constexpr bool kMixesHalves = sizeof(T) == 2 || kFourBit;  // 16-bit metadata
  static constexpr int kColumns = kFragmentColumns;
  static constexpr int kValues = kColumns / 4 * kPerGroup<T>;  // of a row
  static constexpr int kSteps = kValues * sizeof(T) / 32;  // of mma.sp; 4-bit: four of them each
  static constexpr int kChunk = 16 / sizeof(T);            // values in 16 bytes
  static constexpr int kPieces = 32 * (kSteps + 1);        // of 16 bytes: lanes x (steps, metadata)

  template <bool kWhole, class I>
  static __device__ __forceinline__ void pack(const Window<const T, I>& window, uint4* record) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t words[2][kSteps / 2][4];  // rows g and g + 8
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half, value = (4 * j + t) * kChunk;
        load_words<kWhole>(words[half][j], window.values_at(row, value),
                           window.values_valid(row, value));
      }
    }
    uint32_t metadata[4];  // word j: eight index bytes of each row, four for a lane
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = g + 8 * (t % 2), byte = 8 * j + 4 * (t / 2);
      uint32_t word[1];
      load_words<kWhole>(word, window.indices_at(row, byte), window.bytes_valid(row, byte));
      metadata[j] = kWhole ? word[0] : word[0] & window.group_bits(byte);
    }
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kFourBit) transpose_bytes(words[half][j]);
        transpose_quad(words[half][j]);
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        ptx::store16_stream(record + 32 * (2 * j + odd) + lane,
                            from_rows(words[0][j] + 2 * odd, words[1][j] + 2 * odd));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      metadata[j] = legal_nibbles(metadata[j]);  // what does not exist is 0 and becomes 0, 1
      if constexpr (kMixesHalves) metadata[j] = exchange_halves(metadata[j]);
    }
    ptx::store16_stream(record + 32 * kSteps + lane, as_uint4(metadata));
  }

  template <bool kWhole, class I>
  static __device__ __forceinline__ void unpack(const uint4* record, const Window<T, I>& window) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 steps[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) steps[s] = ptx::load_nc16(record + 32 * s + lane);
    const uint4 packed = ptx::load_nc16(record + 32 * kSteps + lane);
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
      uint32_t words[2][4];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        to_rows(steps[2 * j + odd], words[0] + 2 * odd, words[1] + 2 * odd);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        transpose_quad(words[half]);
        if constexpr (kFourBit) transpose_bytes(words[half]);
        const int row = g + 8 * half, value = (4 * j + t) * kChunk;
        store_words<kWhole>(window.values_at(row, value), words[half],
                            window.values_valid(row, value));
      }
    }
    const uint32_t metadata[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = g + 8 * (t % 2), byte = 8 * j + 4 * (t / 2);
      uint32_t word[1] = {kMixesHalves ? exchange_halves(metadata[j]) : metadata[j]};
      // Four bits without a group are 0 in the portable format.
      if constexpr (!kWhole) word[0] &= window.group_bits(byte);
      store_words<kWhole>(window.indices_at(row, byte), word, window.bytes_valid(row, byte));
    }
  }

 private:
  // 16 bytes of fragments from two words of row g and two of row g + 8; and back.
  static __device__ __forceinline__ uint4 from_rows(const uint32_t* low, const uint32_t* high) {
    if constexpr (kFourBit) {
      return make_uint4(separate_nibbles(__byte_perm(low[0], high[0], 0x5140)),
                        separate_nibbles(__byte_perm(low[0], high[0], 0x7362)),
                        separate_nibbles(__byte_perm(low[1], high[1], 0x5140)),
                        separate_nibbles(__byte_perm(low[1], high[1], 0x7362)));
    } else {
      return make_uint4(low[0], high[0], low[1], high[1]);
    }
  }
  static __device__ __forceinline__ void to_rows(uint4 v, uint32_t* low, uint32_t* high) {
    if constexpr (kFourBit) {
      const uint32_t pairs[4] = {pair_nibbles(v.x), pair_nibbles(v.y), pair_nibbles(v.z),
                                 pair_nibbles(v.w)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        low[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420);
        high[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531);
      }
    } else {
      low[0] = v.x, high[0] = v.y, low[1] = v.z, high[1] = v.w;
    }
  }
};

// ---- panels of float32 --------------------------------------------------------------------------

// 16 rows x 16 values: a warp moves eight rows at a time, and the index words after them.
struct Panels {
  static constexpr int kColumns = kRecordK;
  static constexpr int kValues = kColumns / 2;
  static constexpr int kWordRows = 1 + kValues;
  static constexpr int kPieces = kWordRows * kBlockN / 4;

  template <bool kWhole, class I>
  static __device__ __forceinline__ void pack(const Window<const uint32_t, I>& window,
                                              uint4* record) {
    const int lane = threadIdx.x % 32, t = lane % 4, chunk = lane / 4 % 4;
    uint32_t words[2][4], index[1] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + lane / 16 * 4 + t, value = 4 * chunk;
      load_words<kWhole>(words[half], window.values_at(row, value),
                         window.values_valid(row, value));
    }
    if (lane < 16) {
      load_words<kWhole>(index, window.indices_at(lane, 0), window.bytes_valid(lane, 0));
      reinterpret_cast<uint32_t*>(record)[lane] = index[0];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      transpose_quad(words[half]);
      ptx::store16_stream(record + piece(half), as_uint4(words[half]));
    }
  }

  template <bool kWhole, class I>
  static __device__ __forceinline__ void unpack(const uint4* record,
                                                const Window<uint32_t, I>& window) {
    const int lane = threadIdx.x % 32, t = lane % 4, chunk = lane / 4 % 4;
    uint4 pieces[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) pieces[half] = ptx::load_nc16(record + piece(half));
    if (lane < 16) {
      const uint32_t index[1] = {reinterpret_cast<const uint32_t*>(record)[lane]};
      store_words<kWhole>(window.indices_at(lane, 0), index, window.bytes_valid(lane, 0));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {pieces[half].x, pieces[half].y, pieces[half].z, pieces[half].w};
      transpose_quad(words);
      const int row = 8 * half + lane / 16 * 4 + t, value = 4 * chunk;
      store_words<kWhole>(window.values_at(row, value), words, window.values_valid(row, value));
    }
  }

 private:
  // Where value 4 chunk + t of the quad's four rows lies, in 16 bytes.
  static __device__ __forceinline__ int piece(int half) {
    const int lane = threadIdx.x % 32, t = lane % 4, chunk = lane / 4 % 4;
    return (1 + 4 * chunk + t) * (kBlockN / 4) + 2 * half + lane / 16;
  }
};

// ---- kernels ------------------------------------------------------------------------------------

// Calls body(tile, record, index of the record) for the records that are this warp's.
template <class Body>
__device__ __forceinline__ void for_each_record(const Tiles& tiles, const Body& body) {
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (int64_t i = first; i < tiles.count * tiles.records; i += int64_t{gridDim.x} * kWarps) {
    body(i / tiles.records, i % tiles.records, i);
  }
}

template <class Layout, class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Portable<const T, const uint8_t> weight, const Tiles tiles, uint4* panels) {
  for_each_record(tiles, [&](int64_t tile, int64_t record, int64_t i) {
    const Window<const T, const uint8_t> window(weight, tile, record, Layout::kValues);
    uint4* to = panels + i * Layout::kPieces;
    // One branch for the warp, so that all its loads are in flight together.
    if (window.whole) {
      Layout::template pack<true>(window, to);
    } else {
      Layout::template pack<false>(window, to);
    }
  });
}

template <class Layout, class T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint4* panels, const Tiles tiles, const Portable<T, uint8_t> weight) {
  for_each_record(tiles, [&](int64_t tile, int64_t record, int64_t i) {
    const Window<T, uint8_t> window(weight, tile, record, Layout::kValues);
    const uint4* from = panels + i * Layout::kPieces;
    if (window.whole) {
      Layout::template unpack<true>(from, window);
    } else {
      Layout::template unpack<false>(from, window);
    }
  });
}

template <class Layout>
Tiles tiles_of(const Weight& w) {
  return {w.blocks(), (w.k + Layout::kColumns - 1) / Layout::kColumns};
}
unsigned grid_of(const Tiles& tiles) {
  const int64_t blocks = (tiles.count * tiles.records + kWarps - 1) / kWarps;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Calls body(layout, zero) with the layout for the dtype and a zero of what it moves values as.
template <class Body>
void visit_layout(DType dtype, const Body& body) {
  if (dtype == DType::kUInt8) return body(Fragments<Int4Pair>{}, Int4Pair{});
  switch (size_of(dtype)) {
    case 1: return body(Fragments<uint8_t>{}, uint8_t{});
    case 2: return body(Fragments<uint16_t>{}, uint16_t{});
    case 4: return body(Panels{}, uint32_t{});
    default: return;  // refused at the border
  }
}

}  // namespace

void to_panels(const Weight& w, uint32_t* panels, cudaStream_t stream) {
  visit_layout(w.dtype, [&](auto layout, auto zero) {
    using Layout = decltype(layout);
    using T = decltype(zero);
    const Tiles tiles = tiles_of<Layout>(w);
    const Portable<const T, const uint8_t> weight{static_cast<const T*>(w.values), w.indices, w.n,
                                                  kPerGroup<T> * w.groups(), w.index_bytes()};
    launch(pack_kernel<Layout, T>, grid_of(tiles), kThreads, 0, stream, weight, tiles,
           reinterpret_cast<uint4*>(panels));
  });
}

void from_panels(const Weight& w, void* values, uint8_t* indices, cudaStream_t stream) {
  visit_layout(w.dtype, [&](auto layout, auto zero) {
    using Layout = decltype(layout);
    using T = decltype(zero);
    const Tiles tiles = tiles_of<Layout>(w);
    const Portable<T, uint8_t> weight{static_cast<T*>(values), indices, w.n,
                                      kPerGroup<T> * w.groups(), w.index_bytes()};
    launch(unpack_kernel<Layout, T>, grid_of(tiles), kThreads, 0, stream,
           reinterpret_cast<const uint4*>(w.panels), tiles, weight);
  });
}

}  // namespace gossamer::sparse24::cuda
