"""What every open format asks of the entries of a file before it looks at their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def read_header(
    name: str, state: Mapping[str, Any], keys: tuple[str, ...], fields: str, version: int
) -> list[int]:
    """The numbers of ``state["format"]`` after its version.

    Parameters
    ----------
    name : str
        The format, for the error messages.
    state : mapping
        What was read.
    keys : tuple of str
        The entries that have to be there, "format" among them.
    fields : str
        What the header holds, as "version, N, K".
    version : int
        The one version that can be read.

    Raises
    ------
    TypeError, ValueError
        If an entry is missing or no plain tensor, or the header another one.
    """
    for key in keys:
        if key not in state:
            raise ValueError(f"{name}: {key!r} is missing")
        if not isinstance(state[key], Tensor):
            raise TypeError(f"{name}: {key!r} is {type(state[key]).__name__}, not a tensor")
        if state[key].layout != torch.strided:
            raise TypeError(f"{name}: {key!r} has layout {state[key].layout}")
    header, length = state["format"], fields.count(",") + 1
    # Older or newer versions may have more or fewer fields: the version is looked at first.
    is_header = header.dtype == torch.int64 and header.dim() == 1 and not header.is_meta
    numbers: list[int] = header.tolist() if is_header else []
    if numbers and numbers[0] != version:
        raise ValueError(
            f"{name}: format version {numbers[0]}, this release reads version {version}"
        )
    if len(numbers) != length:
        raise ValueError(
            f"{name}: 'format' is {header.dtype} of shape {list(header.shape)} on "
            f"{header.device}, expected int64 of shape [{length}]: {fields}"
        )
    return numbers[1:]
