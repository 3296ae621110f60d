// Hands a convolution to the kernels of the target in force.
#include "blocksparse/blocksparse.h"

namespace gossamer::blocksparse {

void conv(const ConvArgs& args) {
  if (args.shape.batch * args.shape.out_pixels() == 0) return;
  conv_serial(args);
}

}  // namespace gossamer::blocksparse
