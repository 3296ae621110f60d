// Convolution by AMX: y[q, n] = act(sum over live tiles of x[q + shift, 16 or 32 channels] *
// W[those channels, n] + b[n]), 16 pixels and 16 outputs a tile.
//
//   A    16 pixels of a slab of the panel, side by side    from L1 or L2
//   B    the weights of a live tile, two channels of an output in a 32-bit word
//   C += A B    float32; three tiles of pixels, a group, share a tile of weights
//
// A product takes 20 cycles with 32 channels as well as with 16. In that time the core does all the
// rest, a little of it after each tile of weights:
//
//   the sums before these leave their registers (there are two sets), and get their bias and
//   activation, two tiles of outputs, a line of y, at a time;
//   the pixels of the next group are packed, and those of the one after it fetched.
//
// A sum that is not finite may be of the kernel's own making: zeros between the blocks of a tile
// make 0 * inf = NaN. Then the vector kernels compute it all.
#include "blocksparse/conv_tiles.h"
#include "common/amx.h"
#include "common/simd_avx512.h"
#include "common/simd_finish.h"

namespace gossamer::blocksparse {
namespace {

using F = Simd::F;
using I = Simd::I;

constexpr int64_t kGroupPixels = kMostTiles * kTile;
constexpr int kTileFloats = kTile * kTile;

// Tile registers: two sets of three for sums, one of pixels, one of weights.
class ConvTiles {
 public:
  explicit ConvTiles(int depth) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = Tiles::kRowBytes;
      config.rows[tile] = Tiles::kRows;
    }
    config.row_bytes[6] = static_cast<uint16_t>(2 * depth);
    config.rows[7] = static_cast<uint8_t>(depth / 2);
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~ConvTiles() { _tile_release(); }
  ConvTiles(const ConvTiles&) = delete;
  ConvTiles& operator=(const ConvTiles&) = delete;
};

// gcc's intrinsics take the text of a register's number.
template <int Tile>
void zero_tile() {
  if constexpr (Tile == 0) _tile_zero(0);
  if constexpr (Tile == 1) _tile_zero(1);
  if constexpr (Tile == 2) _tile_zero(2);
  if constexpr (Tile == 3) _tile_zero(3);
  if constexpr (Tile == 4) _tile_zero(4);
  if constexpr (Tile == 5) _tile_zero(5);
}
template <int Tile>
void add_product() {
  if constexpr (Tile == 0) _tile_dpbf16ps(0, 6, 7);
  if constexpr (Tile == 1) _tile_dpbf16ps(1, 6, 7);
  if constexpr (Tile == 2) _tile_dpbf16ps(2, 6, 7);
  if constexpr (Tile == 3) _tile_dpbf16ps(3, 6, 7);
  if constexpr (Tile == 4) _tile_dpbf16ps(4, 6, 7);
  if constexpr (Tile == 5) _tile_dpbf16ps(5, 6, 7);
}
template <int Tile>
void store_tile(float* sums) {
  if constexpr (Tile == 0) _tile_stored(0, sums, Tiles::kRowBytes);
  if constexpr (Tile == 1) _tile_stored(1, sums, Tiles::kRowBytes);
  if constexpr (Tile == 2) _tile_stored(2, sums, Tiles::kRowBytes);
  if constexpr (Tile == 3) _tile_stored(3, sums, Tiles::kRowBytes);
  if constexpr (Tile == 4) _tile_stored(4, sums, Tiles::kRowBytes);
  if constexpr (Tile == 5) _tile_stored(5, sums, Tiles::kRowBytes);
}

// The pixels of a group that are outputs, and where y has them.
struct Pixels {
  static constexpr int kAtOnce = 4;
  int64_t count = 0;
  // Written in whole registers; past the end the last one is repeated.
  alignas(64) int32_t at[kGroupPixels + kTile];  // in the group's sums
  alignas(64) int64_t y[kGroupPixels + kTile];

  void find(const TileTask& task, int64_t begin, int64_t end) {
    const SlabPanel& panel = *task.panel;
    const int64_t line = begin / panel.pitch;
    int64_t column = begin - line * panel.pitch, row = line / panel.images;
    int64_t image = line - row * panel.images;
    count = 0;
    int32_t last_at = 0;
    int64_t last_y = 0;
    for (int64_t q = begin; q < end;) {
      const int64_t in_strip = task.strip.width - column, in_group = end - q;
      const int64_t length = in_strip < in_group ? in_strip : in_group;
      if (length > 0) {
        const int64_t first =
            image * task.image_stride + row * task.row_stride + column * task.pixel_stride;
        last_at = static_cast<int32_t>(kTile * (q - begin + length - 1));
        last_y = first + (length - 1) * task.pixel_stride;
        add(static_cast<int32_t>(kTile * (q - begin)), length, first, task.pixel_stride);
      }
      q += panel.pitch - column;
      column = 0;
      if (++image == panel.images) image = 0, ++row;
    }
    // Not read back: that would wait for the registers on their way to memory.
    for (int i = 0; i < kAtOnce; ++i) at[count + i] = last_at, y[count + i] = last_y;
  }

 private:
  void add(int32_t first, int64_t length, int64_t first_y, int64_t stride) {
    static_assert(kTile == 16);
    const I ones = Simd::shift_left<4>(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const I low = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const I strides = _mm512_mullo_epi64(low, _mm512_set1_epi64(stride));
    for (int64_t i = 0; i < length; i += kTile) {
      const I from = Simd::set1(static_cast<uint32_t>(first + kTile * i));
      _mm512_storeu_si512(at + count + i, Simd::add(from, ones));
      for (int half = 0; half < kTile; half += 8) {
        const I begin = _mm512_set1_epi64(first_y + (i + half) * stride);
        _mm512_storeu_si512(y + count + i + half, _mm512_add_epi64(begin, strides));
      }
    }
    count += length;
  }
};

// Sums on their way out, of one or two tiles of outputs.
struct Outgoing {
  static constexpr int kOutputs = 2 * kTile;
  alignas(64) float sums[2][kMostTiles * kTileFloats];
  alignas(64) float bias[kOutputs];
  Epilogue e;
  const Pixels* pixels = nullptr;
  int tiles = 1, parts = 1;
  bool channels_last;
  int64_t channel_stride, outputs;
  int64_t done = 0, count = 0;
  F trusted = Simd::zero();  // NaN in a lane where a sum was, or some were very large

  int64_t left() const { return count - done; }
  // Whole lots of kAtOnce: with few branches, since one that is guessed wrong stops the products.
  void some(int64_t lots) {
    if (done >= count) return;
    if (!channels_last) return some_squares(done + lots * Pixels::kAtOnce);
    switch (e.activation) {
      case Activation::kNone: return write<Activation::kNone>(lots);
      case Activation::kReLU: return write<Activation::kReLU>(lots);
      case Activation::kGELU: return write<Activation::kGELU>(lots);
      case Activation::kSiLU: return write<Activation::kSiLU>(lots);
    }
  }
  void rest() { some((left() + Pixels::kAtOnce - 1) / Pixels::kAtOnce); }

 private:
  template <Activation A>
  void write(int64_t lots) {
    const int64_t most = (left() + Pixels::kAtOnce - 1) / Pixels::kAtOnce;
    if (lots > most) lots = most;
    if (parts > 1) return write_pixels<A, kMostTiles, false>(lots);
    if (outputs < kOutputs) return write_pixels<A, 1, false>(lots);
    write_pixels<A, 1, true>(lots);
  }

  template <int Parts>
  static F load_sum(const float* sums) {
    F sum = Simd::load(sums);
    for (int part = 1; part < Parts; ++part) {
      sum = Simd::add(sum, Simd::load(sums + part * kTileFloats));
    }
    return sum;
  }

  template <Activation A, int Parts, bool Whole>
  void write_pixels(int64_t lots) {
    const __mmask32 there = _cvtu32_mask32(outputs >= kOutputs ? ~0u : (1u << outputs) - 1);
    const F bias0 = Simd::load(bias), bias1 = Simd::load(bias + kTile);
    const float *const sums0 = sums[0], *const sums1 = sums[tiles - 1];
    auto* const out = static_cast<uint16_t*>(e.out);
    const int32_t* at = pixels->at + done;
    const int64_t* y = pixels->y + done;
    done += lots * Pixels::kAtOnce;
    F check = trusted;
    for (; lots > 0; --lots, at += Pixels::kAtOnce, y += Pixels::kAtOnce) {
#pragma GCC unroll 4
      for (int i = 0; i < Pixels::kAtOnce; ++i) {
        const F sum0 = Simd::add(load_sum<Parts>(sums0 + at[i]), bias0);
        const F sum1 = Simd::add(load_sum<Parts>(sums1 + at[i]), bias1);
        check = Simd::fma(sum0, sum1, check);
        // Subnormals become zero.
        const I both = (I)_mm512_cvtne2ps_pbh(Finish<Simd, BFloat16>::activate(sum1, A),
                                              Finish<Simd, BFloat16>::activate(sum0, A));
        if constexpr (Whole) {
          _mm512_storeu_si512(out + y[i], both);
        } else {
          _mm512_mask_storeu_epi16(out + y[i], there, both);
        }
      }
    }
    trusted = check;
  }

  void some_squares(int64_t due) {
    while (done < count && done < due) write_square();
  }

  // 32 pixels by 16 outputs at a time are transposed.
  void write_square() {
    constexpr int kSquare = 32;
    const int64_t size = count - done < kSquare ? count - done : kSquare;
    for (int tile = 0; tile < tiles; ++tile) {
      I words[kTile];
      const F added = Simd::load(bias + tile * kTile);
      for (int i = 0; i < kTile; ++i) {
        __m256i pair[2];
        for (int which = 0; which < 2; ++which) {
          const int64_t pixel = 2 * i + which < size ? done + 2 * i + which : done;
          const float* from = sums[tile] + pixels->at[pixel];
          const F sum = parts == 1 ? load_sum<1>(from) : load_sum<kMostTiles>(from);
          trusted = Simd::add(sum, trusted);
          const F y = Finish<Simd, BFloat16>::activate(Simd::add(sum, added), e.activation);
          pair[which] = (__m256i)_mm512_cvtneps_pbh(y);
        }
        words[i] = Simd::or_(_mm512_cvtepu16_epi32(pair[0]),
                             Simd::shift_left<16>(_mm512_cvtepu16_epi32(pair[1])));
      }
      alignas(64) uint16_t square[kTile][kSquare];
      Simd::transpose(words, square, sizeof square[0]);
      auto* out = static_cast<uint16_t*>(e.out) + tile * kTile * channel_stride;
      const int64_t left = outputs - tile * kTile, rows = left < kTile ? left : kTile;
      for (int64_t begin = 0, end; begin < size; begin = end) {  // what follows each other in y
        const int64_t first = pixels->y[done + begin];
        for (end = begin + 1; end < size && pixels->y[done + end] == first + end - begin;) ++end;
        const auto there = static_cast<__mmask32>((uint64_t{1} << (end - begin)) - 1);
        for (int64_t o = 0; o < rows; ++o) {
          const I y = _mm512_maskz_loadu_epi16(there, square[o] + begin);
          _mm512_mask_storeu_epi16(out + first + o * channel_stride, there, y);
        }
      }
    }
    done += size;
  }
};

// A slab of 16 pixels from x whose channels lie side by side.
template <class Copy>
void copy_pixels(const uint16_t* x, int64_t stride, int64_t ahead, const Copy& copy) {
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 4, x += 4 * stride) {
    asm volatile(""
                 : "+r"(x));  // else gcc makes sixteen pointers first, more than it has registers
    copy(i, x);
    copy(i + 1, x + stride);
    copy(i + 2, x + 2 * stride);
    copy(i + 3, x + 3 * stride);
    // Half of them: two slabs of 16 channels share a line.
    __builtin_prefetch(x + ahead, 0, 2);
    __builtin_prefetch(x + ahead + 2 * stride, 0, 2);
  }
}
// Of 16 channels, two pixels a line.
void copy_pairs(const uint16_t* x, int64_t stride, int64_t ahead, uint16_t* to) {
  const auto load = [](const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  };
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 4, x += 4 * stride, to += 2 * kMostDepth) {
    asm volatile("" : "+r"(x));
    const I first = _mm512_castsi256_si512(load(x)),
            third = _mm512_castsi256_si512(load(x + 2 * stride));
    _mm512_storeu_si512(to, _mm512_inserti64x4(first, load(x + stride), 1));
    _mm512_storeu_si512(to + kMostDepth, _mm512_inserti64x4(third, load(x + 3 * stride), 1));
    __builtin_prefetch(x + ahead, 0, 2);
    __builtin_prefetch(x + ahead + 2 * stride, 0, 2);
  }
}
void copy_pixels(const uint16_t* x, int64_t stride, int64_t depth, int64_t channels, int64_t ahead,
                 uint16_t* to) {
  if (depth == kMostDepth / 2 && channels == depth) return copy_pairs(x, stride, ahead, to);
  const uint32_t there = channels >= kMostDepth ? ~0u : (1u << channels) - 1;
  if (depth == kMostDepth) {
    return copy_pixels(x, stride, ahead, [=](int i, const uint16_t* from) {
      _mm512_storeu_si512(to + i * kMostDepth, _mm512_maskz_loadu_epi16(there, from));
    });
  }
  copy_pixels(x, stride, ahead, [=](int i, const uint16_t* from) {
    const __m256i pixel = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(there), from);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * (kMostDepth / 2)), pixel);
  });
}
void zero_pixels(int64_t count, int64_t depth, uint16_t* to) {
  for (int64_t i = 0; i < count * depth; i += kMostDepth / 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_setzero_si256());
  }
}
// Those from `first` up to `last`, where others may lie outside of x.
void copy_some(const uint16_t* x, int64_t stride, int64_t first, int64_t last, int64_t depth,
               int64_t channels, uint16_t* to) {
  for (int64_t i = first; i < last; ++i) {
    uint16_t pixel[kMostDepth] = {};
    __builtin_memcpy(pixel, x + i * stride, 2 * channels);
    __builtin_memcpy(to + i * depth, pixel, 2 * depth);
  }
}

// The same from x whose pixels lie side by side: 32 channels at a time are transposed.
void pack_channels(const uint16_t* x, int64_t channel_stride, int64_t stride, uint32_t pixels,
                   int64_t depth, int64_t channels, uint16_t* to) {
  if (pixels == 0) return zero_pixels(kTile, depth, to);
  const auto row = [&](int64_t channel) {
    if (channel >= channels) return _mm512_setzero_si512();
    const uint16_t* from = x + channel * channel_stride;
    const auto there = static_cast<__mmask16>(pixels);
    if (stride == 1) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
    uint32_t words[kTile] = {};
    for (int i = 0; i < kTile; ++i) {
      if (pixels >> i & 1) words[i] = from[i * stride];
    }
    return Simd::load_words(words);
  };
  I pairs[kTile];
  for (int pair = 0; pair < kTile; ++pair) {
    pairs[pair] = Simd::or_(row(2 * pair), Simd::shift_left<16>(row(2 * pair + 1)));
  }
  alignas(64) uint16_t square[kTile][kMostDepth];
  Simd::transpose(pairs, square, sizeof square[0]);
  for (int i = 0; i < kTile; ++i) __builtin_memcpy(to + i * depth, square[i], 2 * depth);
}

// Fills the panel, of all planes, a slab of 16 pixels at a time. What of these lies past the end of
// a row is overwritten by the next one.
class Packer {
 public:
  explicit Packer(const TileTask& task)
      : task_(task),
        s_(*task.shape),
        panel_(*task.panel),
        planes_(s_.kernel[0] * panel_.planes_h * panel_.planes_w),
        slabs_(panel_.groups * panel_.slabs),
        stride_(s_.stride[2] * s_.in_channels) {
    const int64_t line = panel_.packed / panel_.pitch;
    column_ = panel_.packed - line * panel_.pitch;
    row_ = line / panel_.images, image_ = line - row_ * panel_.images;
  }

  // From what is there on, at least up to `end`.
  void start(int64_t end) {
    end_ = end;
    if (panel_.packed < end_) begin_pixels();
  }
  int64_t steps() const {  // nearly
    const int64_t pixels = end_ - panel_.packed;
    return pixels <= 0 ? 0 : (pixels / kTile + pixels / panel_.pitch + 1) * planes_ * slabs_;
  }
  void some(int64_t steps) {
    for (; steps > 0 && panel_.packed < end_; --steps) step();
  }
  void rest() {
    while (panel_.packed < end_) step();
  }

 private:
  void begin_pixels() {
    count_ = panel_.pitch - column_ < kTile ? panel_.pitch - column_ : kTile;
    plane_ = 0;
    begin_plane();
  }

  void begin_plane() {
    int64_t kd = 0, kh = 0, kw = 0;
    if (planes_ > 1) {
      kw = plane_ % panel_.planes_w, kh = plane_ / panel_.planes_w;
      kd = kh / panel_.planes_h, kh %= panel_.planes_h;
    }
    const int64_t d = task_.strip.depth * s_.stride[0] + kd * s_.dilation[0] - s_.padding[0];
    const int64_t h = (task_.strip.row + row_) * s_.stride[1] +
                      (panel_.own_rows ? kh * s_.dilation[1] : kh) - s_.padding[1];
    const int64_t w = (task_.strip.column + column_) * s_.stride[2] +
                      (panel_.own_columns ? kw * s_.dilation[2] : kw) - s_.padding[2];
    // In x lie those from first_ up to last_, the others are 0.
    first_ = 0, last_ = count_;
    if (w < 0) first_ = (-w + s_.stride[2] - 1) / s_.stride[2];
    if (w + (last_ - 1) * s_.stride[2] >= s_.in[2]) {
      last_ = s_.in[2] > w ? (s_.in[2] - w + s_.stride[2] - 1) / s_.stride[2] : 0;
    }
    if (d < 0 || d >= s_.in[0] || h < 0 || h >= s_.in[1] || first_ >= last_) first_ = last_ = 0;
    const int64_t pixel =
        (((task_.strip.image + image_) * s_.in[0] + d) * s_.in[1] + h) * s_.in[2] + w;
    // Whether x has something, whatever it is, in the place of all of them.
    straight_ = first_ < last_ && pixel >= 0 &&
                pixel + (kTile - 1) * s_.stride[2] < s_.batch * s_.in_pixels();
    x_ = static_cast<const uint16_t*>(task_.x) +
         panel_.first_group * s_.group_in() * s_.in_channel_stride();
    if (s_.channels_last) {
      x_ += pixel * s_.in_channels;
    } else {
      x_ += pixel + (task_.strip.image + image_) * s_.in_pixels() * (s_.in_channels - 1);
    }
    to_ = panel_.memory + plane_ * panel_.plane_stride() + panel_.packed * panel_.depth;
    left_ = s_.group_in();
    slab_ = 0;
  }

  void step() {
    const int64_t depth = panel_.depth, channels = left_ < depth ? left_ : depth;
    if (!s_.channels_last) {
      const uint32_t pixels = (1u << last_) - (1u << first_);
      pack_channels(x_, s_.in_pixels(), s_.stride[2], pixels, depth, channels, to_);
    } else if (straight_) {
      const int64_t ahead = (2 * kGroupPixels + slab_ % 2) * stride_;
      copy_pixels(x_, stride_, depth, channels, ahead, to_);
      if (last_ - first_ < count_) zero_edges();
    } else {
      zero_edges();
      copy_some(x_, stride_, first_, last_, depth, channels, to_);
    }
    x_ += channels * s_.in_channel_stride();
    to_ += panel_.slab_stride;
    left_ -= channels;
    if (left_ == 0) left_ = s_.group_in();
    if (++slab_ == slabs_) end_plane();
  }
  void zero_edges() {
    zero_pixels(first_, panel_.depth, to_);
    zero_pixels(count_ - last_, panel_.depth, to_ + last_ * panel_.depth);
  }
  void end_plane() {
    if (++plane_ < planes_) return begin_plane();
    panel_.packed += count_;
    column_ += count_;
    if (column_ == panel_.pitch) {
      column_ = 0;
      if (++image_ == panel_.images) image_ = 0, ++row_;
    }
    if (panel_.packed < end_) begin_pixels();
  }

  const TileTask& task_;
  const ConvShape& s_;
  SlabPanel& panel_;
  int64_t planes_, slabs_, stride_;
  int64_t end_ = 0, row_, image_, column_, count_ = 0, plane_ = 0, slab_ = 0, left_ = 0;
  int64_t first_ = 0, last_ = 0;
  bool straight_ = false;
  const uint16_t* x_ = nullptr;
  uint16_t* to_ = nullptr;
};

// The lines of y that the next group writes: it comes back to a pixel for each two tiles of
// outputs, which no hardware foresees.
class Fetch {
 public:
  void expect(const TileTask& task, const Pixels& pixels) {
    at_ = end_ = nullptr;
    const int64_t outputs = task.row_tiles[task.count - 1].first +
                            task.row_tiles[task.count - 1].outputs - task.row_tiles[0].first;
    const int64_t last = pixels.count - 1;
    if (last < 0 || pixels.y[last] - pixels.y[0] != last * task.pixel_stride) return;
    if (2 * outputs < task.pixel_stride) return;
    at_ = reinterpret_cast<const char*>(static_cast<const uint16_t*>(task.epilogue.out) +
                                        pixels.y[0] + task.row_tiles[0].first);
    end_ = at_ + 2 * (last * task.pixel_stride + outputs);
  }
  // For each tile of weights: none where these give time enough.
  int64_t lines(int64_t products) const {
    const int64_t all = (end_ - at_) / Tiles::kRowBytes;
    return all < 8 * products ? 0 : (all + products - 1) / products;
  }
  void some(int64_t lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += Tiles::kRowBytes) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
};

// What is done a little at a time beside the products.
struct Meanwhile {
  Outgoing* before;
  Packer& packer;
  Fetch fetch;
  int64_t lots, steps, lines;  // for each tile of weights
  float* sums = nullptr;       // where those of the other set of registers go
  int stored = 0;              // how many they are

  void go_on(int64_t tiles) {
    before->some(tiles * lots);
    packer.some(tiles * steps);
    fetch.some(tiles * lines);
  }
};

// The products of a tile of outputs, into one of the sets of registers. `Parts` sums of each tile
// of pixels: with a single one, the products would wait for each other (52 cycles).
template <int Set, int Count, int Parts>
struct Products {
  static_assert(Count * Parts <= kMostTiles);
  static constexpr int kFirst = Set * kMostTiles, kOther = (1 - Set) * kMostTiles;

  template <int Tile>
  static void add(const uint16_t* x, int64_t pixel_stride, Meanwhile* storing) {
    if constexpr (Tile < Count * Parts) {
      _tile_loadd(6, x + Tile % Count * kTile * pixel_stride, 2 * pixel_stride);
      add_product<kFirst + Tile>();
    }
    if (storing != nullptr && Tile < storing->stored) {
      store_tile<kOther + Tile>(storing->sums + Tile * kTileFloats);
    }
  }
  // `Part` of Parts; with them the sums of the other set leave their registers.
  template <int Part>
  static void add_part(const RowTile& row, int64_t i, const uint16_t* x, const SlabPanel& panel,
                       Meanwhile* storing) {
    _tile_loadd(7, row.weights + i * kTile * panel.depth, Tiles::kRowBytes);
    x += row.x[i];
    if constexpr (Parts > 1) return add<Part>(x, panel.pixel_stride, storing);
    add<0>(x, panel.pixel_stride, storing);
    add<1>(x, panel.pixel_stride, storing);
    add<2>(x, panel.pixel_stride, storing);
  }

  // `x` is where the panel has the first pixel.
  static void run(const RowTile& row, const uint16_t* x, const SlabPanel& panel, float* sums,
                  Meanwhile& meanwhile) {
    Tiles::fence();
    zero_tile<kFirst>();
    zero_tile<kFirst + 1>();
    zero_tile<kFirst + 2>();
    int64_t i = 0;
    if (row.count >= Parts) {
      add_parts(row, i, x, panel, &meanwhile);
      i = Parts;
    } else {
      store_others(meanwhile);
    }
    for (; i + Parts <= row.count; i += Parts) {
      Tiles::fence();
      meanwhile.go_on(Parts);
      Tiles::fence();
      add_parts(row, i, x, panel, nullptr);
    }
    for (; i < row.count; ++i) add_part<0>(row, i, x, panel, nullptr);
    Tiles::fence();
    meanwhile.go_on(Parts);
    meanwhile.sums = sums;
    meanwhile.stored = Count * Parts;
  }

  static void store_others(Meanwhile& meanwhile) {
    Tiles::fence();
    if (meanwhile.stored > 0) store_tile<kOther>(meanwhile.sums);
    if (meanwhile.stored > 1) store_tile<kOther + 1>(meanwhile.sums + kTileFloats);
    if (meanwhile.stored > 2) store_tile<kOther + 2>(meanwhile.sums + 2 * kTileFloats);
    Tiles::fence();
  }

 private:
  static void add_parts(const RowTile& row, int64_t i, const uint16_t* x, const SlabPanel& panel,
                        Meanwhile* storing) {
    add_part<0>(row, i, x, panel, storing);
    if constexpr (Parts > 1) add_part<1>(row, i + 1, x, panel, storing);
    if constexpr (Parts > 2) add_part<2>(row, i + 2, x, panel, storing);
  }
};

using Run = void (*)(const RowTile&, const uint16_t*, const SlabPanel&, float*, Meanwhile&);
constexpr Run kRun[2][kMostTiles] = {
    {Products<0, 1, 3>::run, Products<0, 2, 1>::run, Products<0, 3, 1>::run},
    {Products<1, 1, 3>::run, Products<1, 2, 1>::run, Products<1, 3, 1>::run}};

// Of one or two tiles of outputs, which follow each other.
void expect(const TileTask& task, const RowTile* row_tile, int tiles, int64_t pixel_tiles,
            const Pixels& pixels, Outgoing& to) {
  const int64_t first = row_tile->first;
  to.e = task.epilogue;
  to.e.n = row_tile[tiles - 1].first + row_tile[tiles - 1].outputs - first;
  to.e.out = static_cast<uint16_t*>(to.e.out) + first * task.channel_stride;
  if (to.e.bias != nullptr) to.e.bias = static_cast<const uint16_t*>(to.e.bias) + first;
  Finish<Simd, BFloat16>::load_bias(to.e, 0, to.bias);
  to.channels_last = task.shape->channels_last;
  to.channel_stride = task.channel_stride;
  to.outputs = to.e.n;
  to.tiles = tiles;
  to.parts = pixel_tiles == 1 ? kMostTiles : 1;
  to.pixels = &pixels;
  to.done = 0;
  to.count = pixels.count;
}

}  // namespace

void interleave_amx(uint16_t* squares, int64_t count) {
  for (; count > 0; --count, squares += kTile * kMostDepth) {
    I rows[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      rows[i] = Simd::load_words(reinterpret_cast<const uint32_t*>(squares + i * kMostDepth));
    }
    Simd::transpose(rows, squares, Tiles::kRowBytes);
  }
}

bool multiply_tiles_amx(const TileTask& task) {
  SlabPanel& panel = *task.panel;
  const ConvTiles tiles(panel.depth);
  Outgoing sums[2];
  Pixels pixels[3];
  Packer packer(task);
  Outgoing *before = &sums[0], *now = &sums[1];
  Meanwhile meanwhile{before, packer, {}, 0, 0, 0};
  int64_t all_products = 1;
  for (int64_t i = 0; i < task.count; ++i) all_products += task.row_tiles[i].count;
  // Columns past the strip's after its last output need no sums.
  const int64_t line = panel.images * panel.pitch, overhang = panel.pitch - task.strip.width;
  const int64_t all = task.strip.rows * line - overhang;
  const int64_t reach = (panel.rows - task.strip.rows) * line + overhang;
  const int64_t all_tiles = (all + kTile - 1) / kTile;
  const int64_t groups = (all_tiles + kMostTiles - 1) / kMostTiles;
  const auto end_of = [&](int64_t group) {
    const int64_t tile = (group + 1) * all_tiles / groups;
    return tile * kTile < all ? tile * kTile : all;
  };
  pixels[0].find(task, 0, end_of(0));
  packer.start(end_of(0) + reach);
  packer.rest();
  int set = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * all_tiles / groups, last = (group + 1) * all_tiles / groups;
    const int64_t begin = first * kTile, next = group + 1 < groups ? end_of(group + 1) + reach : 0;
    packer.start(next);
    meanwhile.steps = (packer.steps() + all_products - 1) / all_products;
    const Pixels& outputs = pixels[group % 3];
    if (group + 1 < groups) {
      Pixels& then = pixels[(group + 1) % 3];
      then.find(task, last * kTile, end_of(group + 1));
      meanwhile.fetch.expect(task, then);
      meanwhile.lines = meanwhile.fetch.lines(all_products);
    }
    for (int64_t i = 0; i < task.count;) {
      const RowTile* row_tile = task.row_tiles + i;
      const bool two = i + 1 < task.count && row_tile[1].first == row_tile[0].first + kTile;
      const int row_tiles = two ? 2 : 1;
      const int64_t products = row_tile[0].count + (two ? row_tile[1].count : 0) + 1;
      meanwhile.before = before;
      const int64_t at_once = products * Pixels::kAtOnce;
      meanwhile.lots = (before->left() + at_once - 1) / at_once;
      for (int t = 0; t < row_tiles; ++t, set = 1 - set) {
        kRun[set][last - first - 1](row_tile[t], panel.data + begin * panel.pixel_stride, panel,
                                    now->sums[t], meanwhile);
      }
      before->rest();
      expect(task, row_tile, row_tiles, last - first, outputs, *now);
      Outgoing* const written = before;
      before = now, now = written;
      i += row_tiles;
    }
    packer.rest();
  }
  set == 0 ? Products<0, 1, 1>::store_others(meanwhile)
           : Products<1, 1, 1>::store_others(meanwhile);
  before->rest();
  const F trusted = Simd::add(sums[0].trusted, sums[1].trusted);
  return _mm512_cmp_ps_mask(trusted, trusted, _CMP_UNORD_Q) == 0;
}

}  // namespace gossamer::blocksparse
