// The readable definition, for every dtype and any machine.
#include "common/conv_serial.h"

#include "common/activate_serial.h"
#include "sparse24/conv.h"

namespace gossamer::sparse24 {
namespace {

template <class T>
void conv_pixels(const ConvArgs& args, int64_t begin, int64_t end) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const Weight& w = args.weight;
  const ConvShape& s = args.shape;
  const auto* values = static_cast<const T*>(w.values);
  const auto *bias = static_cast<const T*>(args.bias),
             *residual = static_cast<const T*>(args.residual);
  const auto* all = static_cast<const T*>(args.out);
  const int64_t tap_groups = padded_channels(s) / 4;  // groups of four columns of a tap
  const auto one_pixel = [&](const T* const* taps_of_x, T* out) {
    for (int64_t n = 0; n < w.n; ++n) {
      const int64_t first_channel = n / s.group_out() * s.group_in();
      Real sum = 0;
      for (int64_t g = 0; g < w.groups(); ++g) {
        const T* x = taps_of_x[g / tap_groups];
        if (x == nullptr) continue;
        const int nibble = w.indices[n * w.index_bytes() + g / 2] >> (4 * (g % 2)) & 15;
        for (int slot = 0; slot < 2; ++slot) {
          const int64_t channel = g % tap_groups * 4 + (nibble >> (2 * slot) & 3);
          if (channel >= s.group_in()) continue;
          sum += to_float(values[(n * w.groups() + g) * 2 + slot]) *
                 to_float(x[(first_channel + channel) * s.in_channel_stride()]);
        }
      }
      if (bias != nullptr) sum += to_float(bias[n]);
      T& y = out[n * s.out_channel_stride()];
      if (args.residual != nullptr) sum += to_float(residual[&y - all]);
      round_to(activate(sum, args.activation), y);
    }
  };
  for_each_pixel<T>(s, args.x, args.out, begin, end, one_pixel);
}

}  // namespace

void conv_serial(const ConvArgs& args) {
  for_pixel_ranges(
      args.weight.dtype, args.shape, args.threads,
      [&]<class T>(T, int64_t begin, int64_t end) { conv_pixels<T>(args, begin, end); });
}

}  // namespace gossamer::sparse24
