"""What every op means, in plain torch: any dtype, any device, no cleverness.

The tests hold the kernels against these functions, run in float64. Formats are described in
``gossamer.formats``; names follow the formula y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]).
"""

from .activation import activate
from .blocksparse import (
    block_cover,
    blocksparse_conv,
    blocksparse_gather,
    blocksparse_linear,
    blocksparse_mask,
    blocksparse_to_dense,
    from_blocks,
    to_blocks,
)
from .layers import (
    actsparse_linear,
    actsparse_outputs,
    csr_linear,
    grouped_linear,
    topk_decode,
    topk_encode,
)
from .pointcloud import (
    pointcloud_conv,
    pointcloud_conv_weight_grad,
    pointcloud_max_pool,
    pointcloud_max_pool_grad,
    pointcloud_sum_pool,
    take_winners,
)
from .sparse24 import (
    absmax_scales,
    pack_int4,
    quantize_rows,
    round_scaled,
    sparse24_columns,
    sparse24_from_dense,
    sparse24_from_panels,
    sparse24_gather,
    sparse24_linear,
    sparse24_linear_quantized,
    sparse24_slot_scales,
    sparse24_to_dense,
    sparse24_to_panels,
    unpack_int4,
)

__all__ = [
    "absmax_scales",
    "activate",
    "actsparse_linear",
    "actsparse_outputs",
    "block_cover",
    "blocksparse_conv",
    "blocksparse_gather",
    "blocksparse_linear",
    "blocksparse_mask",
    "blocksparse_to_dense",
    "csr_linear",
    "from_blocks",
    "grouped_linear",
    "pack_int4",
    "pointcloud_conv",
    "pointcloud_conv_weight_grad",
    "pointcloud_max_pool",
    "pointcloud_max_pool_grad",
    "pointcloud_sum_pool",
    "quantize_rows",
    "round_scaled",
    "sparse24_columns",
    "sparse24_from_dense",
    "sparse24_from_panels",
    "sparse24_gather",
    "sparse24_linear",
    "sparse24_linear_quantized",
    "sparse24_slot_scales",
    "sparse24_to_dense",
    "sparse24_to_panels",
    "take_winners",
    "to_blocks",
    "topk_decode",
    "topk_encode",
    "unpack_int4",
]
