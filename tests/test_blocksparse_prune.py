"""magnitude_blocks keeps the right blocks, whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from gossamer import Block, reference
from gossamer.formats import BlockSparse
from gossamer.prune import magnitude_blocks
from torch import Tensor

SHAPES = [((7, 10), 1), ((6, 5, 3), 2), ((8, 4, 3, 3), 1), ((4, 3, 2, 1, 2), 2)]


def kept(pruned: Tensor, block: Block, groups: int = 1) -> list[bool]:
    """Which blocks are not all 0, flat."""
    return reference.to_blocks(pruned, block, groups).ne(0).any(-1).any(-1).flatten().tolist()


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_blocks_of_largest_norm(
    shape: tuple[int, ...], groups: int, density: float, dtype: torch.dtype
) -> None:
    weight, block = torch.randn(shape).to(dtype), Block(3, 4)
    pruned = magnitude_blocks(weight, block, density, groups)
    assert (pruned.dtype, pruned.shape) == (dtype, weight.shape)
    blocks = reference.to_blocks(weight.double(), block, groups).flatten(0, 1)
    norms = [math.sqrt(sum(v * v for v in b.flatten().tolist())) for b in blocks]
    count = max(1, round(density * len(norms) + 1e-9))
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    assert kept(pruned, block, groups) == [i in order[:count] for i in range(len(norms))]
    stored = pruned != 0
    assert torch.equal(pruned[stored], weight[stored])
    sparse = BlockSparse.from_dense(pruned, block, groups=groups)
    assert sparse.values.shape[0] == count
    assert torch.equal(magnitude_blocks(pruned, block, density, groups), pruned)


def test_ties_keep_what_comes_first_and_a_nan_is_the_largest() -> None:
    block, weight = Block(2, 2), torch.ones(4, 8)
    assert kept(magnitude_blocks(weight, block, 0.5), block) == [True] * 4 + [False] * 4
    weight[3, 7], weight[0, 4] = torch.nan, torch.inf
    wanted = [False, False, True, False, False, False, False, True]
    assert kept(magnitude_blocks(weight, block, 0.25), block) == wanted


def test_norms_are_compared_beyond_the_range_of_squares() -> None:
    block = Block(1, 2)
    for scale in (1e200, 1e-200):
        weight = scale * torch.tensor([[3.0, 3.0, 4.0, 0.0, 4.1, 2.0, 0, 0]], dtype=torch.float64)
        assert kept(magnitude_blocks(weight, block, 0.5), block) == [True, False, True, False]


def test_global_scope_ranks_all_weights_together() -> None:
    block, small, large = Block(2, 2), 0.1 * torch.rand(4, 4), 1 + torch.rand(6, 2, 3)
    by_layer = magnitude_blocks([small, large], block, 0.5, groups=[1, 3])
    assert [sum(kept(by_layer[0], block)), sum(kept(by_layer[1], block, 3))] == [2, 5]
    together = magnitude_blocks([small, large], block, 0.5, groups=[1, 3], scope="global")
    assert [sum(kept(together[0], block)), sum(kept(together[1], block, 3))] == [0, 7]
    alone = magnitude_blocks(large, block, 0.5, groups=3, scope="global")
    assert torch.equal(alone, by_layer[1])
    assert (
        magnitude_blocks([], block, 0.5) == magnitude_blocks([], block, 0.5, scope="global") == []
    )


def test_input_is_untouched_and_gradients_reach_the_kept() -> None:
    weight = torch.randn(6, 10, requires_grad=True)
    before = weight.detach().clone()
    pruned = magnitude_blocks(weight, Block(2, 4), 0.5)
    pruned.sum().backward()
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad != 0, pruned != 0)


def test_strided_and_meta() -> None:
    weight = torch.randn(10, 6)
    block = Block(2, 4)
    expected = magnitude_blocks(weight.t().contiguous(), block, 0.5)
    assert torch.equal(magnitude_blocks(weight.t(), block, 0.5), expected)
    assert magnitude_blocks(weight.to("meta"), block, 0.5).shape == (10, 6)


MISTAKES = {
    "density 0": (ValueError, "density 0", {"density": 0}),
    "negative density": (ValueError, "density -0.5", {"density": -0.5}),
    "density above 1": (ValueError, r"density 1\.5", {"density": 1.5}),
    "density that is none": (ValueError, "density nan", {"density": math.nan}),
    "density of words": (TypeError, "'half'", {"density": "half"}),
    "scope": (ValueError, "'model'", {"scope": "model"}),
    "block": (TypeError, r"\(2, 4\)", {"block": (2, 4)}),
    "whole numbers": (TypeError, "int64", {"weight": torch.ones(4, 4).long()}),
    "no matrix": (ValueError, r"\[4\]", {"weight": torch.ones(4)}),
    "groups": (ValueError, "3 groups", {"weight": torch.ones(4, 4, 1), "groups": 3}),
    "groups of some": (ValueError, "2 groups for 1", {"groups": [1, 1]}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, change = MISTAKES[case]
    arguments = {"weight": torch.ones(4, 4), "block": Block(2, 4), "density": 0.5, **change}
    with pytest.raises(error, match=text):
        magnitude_blocks(**arguments)
