"""From the public functions of k-sparse codes down to the kernels of a GPU, with these emulated."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import Gpu
from gossamer.ops import topk, topk_gradient
from test_topk import CASES, check_all

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CUDA = (topk._decode_cuda, topk_gradient._values_cuda, topk_gradient._weight_cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(gpu: Gpu, dtype: torch.dtype) -> None:
    for case in CASES:
        check_all(case, dtype, CUDA)
