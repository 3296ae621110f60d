"""Layers over voxels: drawn ones equal torch's dense layers, in values and gradients."""

from __future__ import annotations

import pytest
from voxel_layer_cases import KINDS, check, draw


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_layers_are_dense_layers(target: str, kind: str, dims: int) -> None:
    for number in range({1: 1, 2: 3, 3: 5, 4: 1}[dims]):  # others for each target
        case = draw(kind, dims, f"{target} {number}")
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{case}") from error
