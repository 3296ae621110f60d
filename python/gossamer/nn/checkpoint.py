"""What a checkpoint has to be before a sparse layer takes any of it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats import VALUE_DTYPES, Sparse24

WEIGHT_KEYS = ("values", "indices", "format")


def check_sparse24(
    given: Mapping[str, Any], weight: Sparse24, bias: Tensor | None, assign: bool
) -> None:
    """Raise where loading ``given`` into a layer of ``weight`` and ``bias`` would break the layer.

    Parameters
    ----------
    given : mapping
        The checkpoint's entries for this layer. What it lacks stays as the layer has it.
    weight, bias
        What the layer holds now.
    assign : bool
        Whether the layer takes the tensors themselves over, or copies them into its own.

    Raises
    ------
    TypeError, ValueError
        If an entry has the wrong kind, dtype or shape, or the indices are not valid.
    """
    loaded = weight
    if any(key in given for key in WEIGHT_KEYS):
        loaded = Sparse24.from_state({**weight.state(), **given})
        if loaded.shape != weight.shape:
            raise ValueError(
                f"the checkpoint holds a {list(loaded.shape)} weight, the layer is "
                f"{list(weight.shape)}"
            )
        _check_content("values", loaded.values, weight.values, assign)
    if bias is None or "bias" not in given:
        return
    loaded_bias = given["bias"]
    if not isinstance(loaded_bias, Tensor) or loaded_bias.dtype not in VALUE_DTYPES:
        what = loaded_bias.dtype if isinstance(loaded_bias, Tensor) else type(loaded_bias).__name__
        raise TypeError(f"'bias' is {what}, expected a floating-point tensor")
    if loaded_bias.layout != torch.strided or loaded_bias.shape != bias.shape:
        raise ValueError(
            f"'bias' has shape {list(loaded_bias.shape)} and layout {loaded_bias.layout}, "
            f"expected {list(bias.shape)}, strided"
        )
    _check_content("bias", loaded_bias, bias, assign)
    if assign and loaded_bias.dtype != loaded.dtype:
        raise TypeError(f"'bias' is {loaded_bias.dtype}, the values are {loaded.dtype}")


def _check_content(key: str, given: Tensor, held: Tensor, assign: bool) -> None:
    if given.is_meta and not held.is_meta and not assign:
        raise ValueError(f"{key!r} is a meta tensor, there is nothing to copy")
