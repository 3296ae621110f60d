"""magnitude_24 keeps the right two of every four, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from gossamer.formats import Sparse24
from gossamer.prune import magnitude_24
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, float("inf")]), max_size=11))
def test_keeps_what_a_stable_sort_keeps(row: list[float]) -> None:
    row.append(3.0)
    expected = [0.0] * len(row)
    for start in range(0, len(row), 4):
        group = range(start, min(start + 4, len(row)))
        for column in sorted(group, key=lambda c: -abs(row[c]))[:2]:  # stable: ties keep the lower
            expected[column] = row[column]
    assert magnitude_24(torch.tensor([row]))[0].tolist() == expected


def test_a_nan_is_the_largest_magnitude() -> None:
    weight = torch.tensor([1.0, torch.inf, torch.nan, 2.0, 5.0, torch.nan, torch.nan, torch.inf])
    pruned = magnitude_24(weight)
    assert pruned[1] == torch.inf
    assert pruned[5:7].isnan().all()
    assert pruned[[0, 3, 4, 7]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 3), (5, 5), (4, 64), (33, 130)])
def test_result_is_2_4_and_pruning_again_changes_nothing(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    pruned = magnitude_24(weight)
    assert (pruned.dtype, pruned.shape) == (dtype, weight.shape)
    assert torch.equal(Sparse24.from_dense(pruned).to_dense(), pruned)
    assert torch.equal(magnitude_24(pruned), pruned)


def test_input_is_untouched_and_gradients_reach_the_kept() -> None:
    weight = torch.randn(6, 10, requires_grad=True)
    before = weight.detach().clone()
    magnitude_24(weight).sum().backward()
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert torch.equal(weight.grad != 0, magnitude_24(before) != 0)


def test_strided_and_meta() -> None:
    weight = torch.randn(10, 6)
    assert torch.equal(magnitude_24(weight.t()), magnitude_24(weight.t().contiguous()))
    assert magnitude_24(weight.to("meta")).shape == (10, 6)


def test_refuses_what_has_no_magnitude() -> None:
    with pytest.raises(TypeError, match="int64"):
        magnitude_24(torch.ones(4, 4).long())
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        magnitude_24(torch.ones(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="list"):
        magnitude_24([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0-d"):
        magnitude_24(torch.tensor(1.0))
