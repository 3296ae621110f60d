"""state_dict in and out of SparseLinearQuantized: validated first, and all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import VALUE_TYPES, bits, same_state
from gossamer.formats import Sparse24Quantized
from gossamer.nn import SparseLinear, SparseLinearQuantized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

N, K = 6, 140
State = dict[str, Any]


def sparse_layer(dtype: torch.dtype = torch.float32, **kwargs: Any) -> SparseLinear:
    return SparseLinear(K, N, dtype=dtype, **kwargs).eval()


@pytest.fixture(params=VALUE_TYPES)
def layer(request: pytest.FixtureRequest) -> SparseLinearQuantized:
    return SparseLinearQuantized.from_sparse(sparse_layer(), request.param)


def test_files_carry_the_open_format(layer: SparseLinearQuantized, tmp_path: Path) -> None:
    state = layer.state_dict()
    assert list(state) == ["values", "indices", "scales", "format", "bias"]
    weight = Sparse24Quantized.from_state(state)
    assert (weight.value_type, weight.group) == (layer.value_type, layer.group)
    torch.save(state, tmp_path / "layer.pt")
    save_file(state, tmp_path / "layer.safetensors")
    for loaded in (
        torch.load(tmp_path / "layer.pt", weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        for assign in (False, True):
            other = SparseLinearQuantized(K, N, value_type=layer.value_type)
            assert not other.load_state_dict(loaded, assign=assign).missing_keys
            assert same_state(other, layer)


def test_a_bias_is_cast_by_a_load_and_taken_over_by_an_assignment() -> None:
    state = SparseLinearQuantized.from_sparse(sparse_layer(torch.bfloat16)).state_dict()
    layer = SparseLinearQuantized(K, N)
    layer.load_state_dict(state)
    assert layer.dtype == torch.float32
    assert torch.equal(layer.bias, state["bias"].float())
    layer.load_state_dict(state, assign=True)
    assert layer.dtype == torch.bfloat16
    assert layer(torch.randn(2, K).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="float64"):
        layer.load_state_dict({**state, "bias": state["bias"].double()}, assign=True)
    assert layer.dtype == torch.bfloat16


def snapshot(layer: nn.Module) -> list[tuple[str, int, Tensor]]:
    return [(name, t.data_ptr(), bits(t).clone()) for name, t in layer.named_buffers()]


def assert_untouched(layer: nn.Module, before: list[tuple[str, int, Tensor]]) -> None:
    after = snapshot(layer)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def changed(value_type: str = "int4", **changes: Any) -> State:
    torch.manual_seed(1)
    layer = SparseLinearQuantized.from_sparse(sparse_layer(), value_type)
    return {k: t for k, t in {**layer.state_dict(), **changes}.items() if t is not None}


def corrupted(key: str, at: tuple[int, int], to: float) -> State:
    state = changed()
    state[key][at] = to
    return state


HOSTILE: dict[str, tuple[str, State]] = {
    "corrupt indices": ("row 4, group 0", corrupted("indices", (4, 0), 0)),
    "a value out of range": ("value -8.0 at row 2, position 6", corrupted("values", (2, 3), 0x18)),
    "a scale of 0": ("scale 0.0 at row 5, position 1", corrupted("scales", (5, 1), 0)),
    "a scale that is not finite": ("scale nan at row 0", corrupted("scales", (0, 0), torch.nan)),
    "scales of another dtype": ("float16", changed(scales=torch.ones(N, 2).half())),
    "scales of another shape": (r"\[6, 3\]", changed(scales=torch.ones(N, 3))),
    "scales that are no tensor": ("list", changed(scales=[1.0])),
    "values of another type": (
        "int8, the format says int4",
        changed(values=torch.zeros(N, 70).char()),
    ),
    "values of another shape": (r"\[6, 36\]", changed(values=torch.zeros(N, 36).byte())),
    "another value type": (r"\[6, 140\] int8 \(group 140\) weight, the layer is", changed("int8")),
    "newer format": ("version 7", changed(format=torch.tensor([7, N, K, 128, 3]))),
    "unquantised layer": (r"float32|version, N, K, group", SparseLinear(K, N).state_dict()),
    "another group": ("groups of 64", changed(format=torch.tensor([1, N, K, 64, 3]))),
    "hostile group": ("group is 0", changed(format=torch.tensor([1, N, K, 0, 3]))),
    "another layer's weight": (
        r"\[6, 9\] int4 \(group 9\) weight, the layer is \[6, 140\] int4 \(group 128\)",
        SparseLinearQuantized(9, N, value_type="int4").state_dict(),
    ),
    "bias of another shape": (r"\[5\]", changed(bias=torch.zeros(5))),
    "bias of whole numbers": ("int64", changed(bias=torch.zeros(N).long())),
    "values without content": ("meta", changed(values=torch.zeros(N, 35, device="meta").byte())),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_checkpoint_changes_nothing(case: str, assign: bool, strict: bool) -> None:
    text, state = HOSTILE[case]
    layer = SparseLinearQuantized.from_sparse(sparse_layer(), "int4")
    before = snapshot(layer)
    if not (strict and case == "unquantised layer"):  # whose keys are wrong already
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(state, strict=strict, assign=assign)
        assert_untouched(layer, before)
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=f"(?s)While loading.*({text})"):
        model.load_state_dict({f"0.{key}": t for key, t in state.items()}, strict, assign)
    assert_untouched(layer, before)


@pytest.mark.parametrize("change", [{"scales": None}, {"format": None}, {"weight": torch.ones(1)}])
def test_wrong_keys_in_a_strict_load_change_nothing(change: State) -> None:
    layer = SparseLinearQuantized.from_sparse(sparse_layer(), "int4")
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=next(iter(change))):
        layer.load_state_dict(changed(**change))
    assert_untouched(layer, before)
