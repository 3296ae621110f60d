"""The ops: of each its schema, native implementation, fake, gradient and public function."""

from .actsparse import actsparse_linear
from .actsparse_outputs import actsparse_outputs
from .blocksparse import blocksparse_conv, blocksparse_linear
from .csr import csr_linear
from .grouped import grouped_linear
from .pointcloud import pointcloud_conv
from .quantize_rows import quantize_rows
from .relu2 import relu2_24_linear
from .sparse24 import sparse24_linear
from .sparse24_conv import sparse24_conv
from .sparse24_quantized import sparse24_linear_quantized
from .spikes import pack_spikes, spike_linear, unpack_spikes
from .topk import topk_decode
from .topk_encoder import topk_encode

__all__ = [
    "actsparse_linear",
    "actsparse_outputs",
    "blocksparse_conv",
    "blocksparse_linear",
    "csr_linear",
    "grouped_linear",
    "pack_spikes",
    "pointcloud_conv",
    "quantize_rows",
    "relu2_24_linear",
    "sparse24_conv",
    "sparse24_linear",
    "sparse24_linear_quantized",
    "spike_linear",
    "topk_decode",
    "topk_encode",
    "unpack_spikes",
]
