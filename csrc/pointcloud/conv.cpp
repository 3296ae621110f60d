// Cuts a convolution into ranges of outputs, and hands them to the kernels of the target in force.
#include "common/target.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

void conv(const ConvArgs& args) { conv_serial(args); }
void weight_grad(const WeightGradArgs& args) { weight_grad_serial(args); }

}  // namespace gossamer::pointcloud
