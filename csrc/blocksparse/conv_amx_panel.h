#pragma once
// Fills the panel of the AMX kernel, a step at a time. Included by conv_amx.cpp.
#include "blocksparse/conv_tiles.h"
#include "common/simd_avx512.h"

namespace gossamer::blocksparse {
namespace {

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
    const Simd::I first = _mm512_castsi256_si512(load(x)),
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
  Simd::I pairs[kTile];
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
      const int64_t ahead = (2 * kMostTiles * kTile + slab_ % 2) * stride_;
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

}  // namespace
}  // namespace gossamer::blocksparse
