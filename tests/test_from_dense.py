"""What ``from_dense`` says of a layer that it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gossamer import nn as gnn
from torch import nn


class Own(gnn.DeltaLinear):
    """A subclass, which errors name as itself."""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (gnn.ActSparseLinear, "torch.nn.Linear"),
        (gnn.DeltaLinear, "torch.nn.Linear"),
        (Own, "torch.nn.Linear"),
        (gnn.SparseLinear, "torch.nn.Linear"),
        (gnn.SparseTrainingLinear, "torch.nn.Linear"),
        (gnn.DeltaConv2d, "torch.nn.Conv2d"),
        (gnn.PositionMaskedConv2d, "torch.nn.Conv2d"),
        (gnn.SparseConv2d, "torch.nn.Conv2d"),
        (gnn.SparseConv, "torch.nn.Conv1d or torch.nn.Conv2d or torch.nn.Conv3d"),
    ],
)
def test_other_layers_are_named(kind: Any, expected: str) -> None:
    with pytest.raises(TypeError) as found:
        kind.from_dense(nn.Bilinear(3, 3, 3))
    text = f"{kind.__name__}.from_dense: the layer is Bilinear, expected {expected}"
    assert str(found.value) == text


@pytest.mark.parametrize("kind", [gnn.DeltaConv2d, gnn.PositionMaskedConv2d])
def test_convolutions_take_over_all_arguments(kind: Any) -> None:
    dense = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
    with torch.no_grad():
        x = torch.randn(2, 3, 9, 11)
        torch.testing.assert_close(kind.from_dense(dense)(x), dense(x))
