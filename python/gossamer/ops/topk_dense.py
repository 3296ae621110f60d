"""Where a k-sparse code names so many rows that torch's dense product takes less time.

That multiplies every row of the dictionary, those that nobody has named by zero. It is taken only
where this changes nothing: with no infinity or NaN among what is multiplied, and no token that
names a row twice, whose sum of two values may be no number of their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C

DENSE_BYTES = 256 << 20  # of the products that exist at once


class Shares(NamedTuple):
    """k over the width from which on the dense product is faster: of each of the three sums."""

    decode: float
    values: float
    weight: float


_NEVER = Shares(math.inf, math.inf, math.inf)
# Measured on two cores of an Emerald Rapids, width 2048 to 16384, 256 to 2048 columns, 16 to 512
# tokens. There torch multiplies 16-bit types by AMX and by AVX-512's float16.
_FLOAT32 = Shares(0.4, 0.17, 0.3)
_SHARES = {
    ("avx2", torch.float32): _FLOAT32,
    ("avx512", torch.float32): _FLOAT32,
    ("avx512_bf16", torch.float32): _FLOAT32,
    ("amx_bf16", torch.float32): _FLOAT32,
    ("amx_bf16", torch.bfloat16): Shares(0.17, 0.1, 0.17),
    ("amx_bf16", torch.float16): Shares(0.3, 0.17, 0.3),
    # By arithmetic, on an H100: a product of 700 TFLOP/s (60 in float32) that is written and read
    # at 3.35 TB/s, against rows from L2 at 5.5 TB/s, and half as much again. A GPU would have to
    # be waited for to learn whether the other two may be dense.
    ("cuda", torch.float32): _NEVER._replace(values=0.1),
    ("cuda", torch.bfloat16): _NEVER._replace(values=0.02),
    ("cuda", torch.float16): _NEVER._replace(values=0.02),
}
_FEWEST_TOKENS = {"cuda": 512}  # below them a product takes as long as reading the dictionary does


def dense_wins(
    which: str, dtype: torch.dtype, codes: Sequence[int], width: int, target: str
) -> bool:
    """Whether, of codes [tokens, k], torch's dense product is faster for one of ``Shares``.

    On a target of the CPU, or "cuda".
    """
    tokens, k = codes
    # Which torch's products of float32 may be rounded to; ours are not.
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return False
    share: float = getattr(_SHARES.get((target, dtype), _NEVER), which)
    return tokens >= _FEWEST_TOKENS.get(target, 16) and k <= width and k >= share * max(width, 1)


def _finite(t: Tensor) -> bool:
    """Whether all are; sums of finite numbers that are too large for float32 may say no."""
    return math.isfinite(t.sum(dtype=torch.float32).item())


def _codes(op: str, values: Tensor, indices: Tensor, width: int) -> Tensor | None:
    """The codes as a matrix [tokens, width], or None where a token names a row twice."""
    codes = values.new_empty((indices.shape[0], width))
    once = _C.topk_scatter(
        op, codes, values.contiguous(), indices.contiguous(), torch.get_num_threads()
    )
    return codes if once else None


def some_tokens(tokens: int, token_bytes: int, most_bytes: int) -> Iterator[slice]:
    """As many at once as stay within ``most_bytes``, and at least one."""
    together = max(most_bytes // max(token_bytes, 1), 1)
    for first in range(0, tokens, together):
        yield slice(first, first + together)


def dense_decode(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """``topk_decode``, or None where the kernel has to be asked."""
    width, d = weight.shape
    y = values.new_empty((len(values), d))
    for some in some_tokens(len(values), width * values.itemsize, DENSE_BYTES):
        codes = _codes("topk_decode", values[some], indices[some], width)
        if codes is None:
            return None
        with torch.autocast("cpu", enabled=False):
            if bias is None:
                torch.mm(codes, weight, out=y[some])
            else:
                torch.addmm(bias, codes, weight, out=y[some])
    # Every entry of the weight has taken part in every row of y.
    return y if _finite(y) else None


def dense_values(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``topk_values``: the products with all rows, of which the named ones are kept."""
    values, dy = dy.new_empty(indices.shape), dy.contiguous()  # as in topk_encode
    for some in some_tokens(len(dy), weight.shape[0] * dy.itemsize, DENSE_BYTES):
        with torch.autocast("cpu", enabled=False):
            product = dy[some] @ weight.t()
        of_some = (values[some], product, indices[some].contiguous())
        _C.topk_gather("topk_values", *of_some, torch.get_num_threads())
    return values


def dense_weight(values: Tensor, indices: Tensor, dy: Tensor, width: int) -> Tensor | None:
    """``topk_weight``, or None where the kernel has to be asked."""
    # Of more tokens than that parts would have to be added up, in 16 bits.
    if len(values) * width * values.itemsize > DENSE_BYTES or not _finite(dy):
        return None
    codes = _codes("topk_weight", values, indices, width)
    if codes is None:
        return None
    with torch.autocast("cpu", enabled=False):
        return codes.t() @ dy


def dense_values_cuda(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """The same on a GPU, some tokens at a time; NaN where an index is outside."""
    values, width = dy.new_empty(indices.shape), weight.shape[0]
    for some in some_tokens(len(indices), width * dy.itemsize, DENSE_BYTES):
        inside = (indices[some] >= 0) & (indices[some] < width)
        with torch.autocast(dy.device.type, enabled=False):
            product = dy[some] @ weight.t()
        found = product.gather(1, torch.where(inside, indices[some], 0).long())
        values[some] = torch.where(inside, found, math.nan)
        del product  # before that of the next tokens exists
    return values
