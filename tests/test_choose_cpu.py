"""Which CPU kernel a product gets: a pure function of the shape, the target and the cores."""

from __future__ import annotations

from typing import Any

import pytest
from gossamer import _C

LIMITS = {  # rows up to which few_rows is chosen: Zen, Intel
    ("avx2", "float32"): (32, 14),
    ("avx512", "float32"): (56, 28),
    ("avx512_bf16", "float32"): (56, 28),
    ("avx512_bf16", "bfloat16"): (56, 56),  # Intel: one shuffle beside one dot product a cycle
}


def choose(m: int, dtype: str, intel: bool | None) -> dict[str, Any]:
    chosen: dict[str, Any] = _C.sparse24_choose(m, 384, 768, dtype, 2, intel)
    return chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_rows_up_to_a_limit(cpu_target: str, dtype: str) -> None:
    if (cpu_target, dtype) not in LIMITS:
        pytest.skip("no vector kernel, or the limits of another dtype")
    for intel, limit in zip((False, True), LIMITS[cpu_target, dtype], strict=True):
        few, many = choose(limit, dtype, intel), choose(limit + 1, dtype, intel)
        assert (few["kernel"], many["kernel"]) == ("few_rows", "many_rows")
        assert str(limit) in few["why"]
        assert str(limit) in many["why"]


def test_this_machine_is_one_of_the_two() -> None:
    here = [choose(m, "float32", None)["kernel"] for m in range(1, 65)]
    assert here in [
        [choose(m, "float32", s)["kernel"] for m in range(1, 65)] for s in (True, False)
    ]


def test_a_small_product_keeps_to_one_thread() -> None:
    assert _C.sparse24_choose(1, 64, 64, "float32", 8)["threads"] == 1
