"""state_dict in and out of SparseLinear: portable, validated first, and all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gossamer import Block, Unstructured
from gossamer.nn import (
    SparseConv2d,
    SparseLinear,
    SparseLinearQuantized,
    SparseTrainingLinear,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

N, K = 6, 10
State = dict[str, Any]


@pytest.fixture(params=["trainable", "packed"])
def layer(request: pytest.FixtureRequest) -> SparseLinear:
    layer = SparseLinear(K, N).eval()
    return layer.pack() if request.param == "packed" else layer


def snapshot(layer: nn.Module) -> list[tuple[str, int, Tensor]]:
    """Every tensor of the layer: which memory it is, and what is in it."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [(name, t.data_ptr(), t.detach().clone()) for name, t in tensors]


def assert_untouched(layer: nn.Module, before: list[tuple[str, int, Tensor]]) -> None:
    after = snapshot(layer)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def test_state_is_portable_in_both_states(layer: SparseLinear) -> None:
    state = layer.state_dict()
    assert list(state) == ["values", "indices", "format", "bias"]
    assert {key: t.dtype for key, t in state.items()} == {
        "values": torch.float32,
        "bias": torch.float32,
        "indices": torch.uint8,
        "format": torch.int64,
    }
    assert state["format"].tolist() == [1, N, K]
    assert list(SparseLinear(K, N, bias=False).state_dict()) == ["values", "indices", "format"]
    assert not any(t.requires_grad for t in state.values())


def test_files_between_the_two_states(layer: SparseLinear, tmp_path: Path) -> None:
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    x = torch.randn(3, K)
    for state in (
        torch.load(tmp_path / "layer.pt", weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        for other in (SparseLinear(K, N).eval(), SparseLinear(K, N).eval().pack()):
            packed = other.packed
            assert not other.load_state_dict(state).missing_keys
            assert other.packed == packed
            torch.testing.assert_close(other(x), layer(x))


def test_a_trainable_state_dict_is_a_view_that_optimizers_share() -> None:
    layer = SparseLinear(K, N)
    assert layer.state_dict()["values"].data_ptr() == layer.values.data_ptr()
    assert layer.state_dict(keep_vars=True)["values"] is layer.values
    values = layer.values
    layer.load_state_dict(SparseLinear(K, N).state_dict())
    assert layer.values is values


def test_loading_casts_to_the_layer_and_assigning_takes_over() -> None:
    state = SparseLinear(K, N, dtype=torch.bfloat16).state_dict()
    layer = SparseLinear(K, N)
    layer.load_state_dict(state)
    assert layer.values.dtype == torch.float32
    assert torch.equal(layer.values.bfloat16(), state["values"])
    layer.values.requires_grad_(False)
    layer.load_state_dict(state, assign=True)
    assert layer.values.data_ptr() == state["values"].data_ptr()
    assert layer.indices is state["indices"]
    assert not layer.values.requires_grad


def test_assigning_fills_a_meta_layer() -> None:
    state = SparseLinear(K, N).state_dict()
    layer = SparseLinear(K, N, device="meta")
    layer.load_state_dict(state, assign=True)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    with pytest.warns(UserWarning, match="no-op"):
        SparseLinear(K, N, device="meta").load_state_dict(SparseLinear(K, N).state_dict())


def changed(**changes: Any) -> State:
    state: State = {**SparseLinear(K, N).state_dict(), **changes}
    return {key: t for key, t in state.items() if t is not None}


def corrupted(row: int, byte: int, value: int) -> State:
    state = changed()
    state["indices"][row, byte] = value
    return state


HOSTILE: dict[str, tuple[str, State]] = {
    "corrupt indices": ("row 4, group 0", corrupted(4, 0, 0)),
    "an index past the last column with a value": (
        "row 0, group 2",
        changed(values=torch.ones(N, 6), indices=torch.tensor([0x44, 0x0E]).byte().repeat(N, 1)),
    ),
    "a nibble without a group": ("row 5, group 2", corrupted(5, 1, 0x44)),
    "indices of another dtype": ("int64", changed(indices=torch.zeros(N, 2).long())),
    "indices of another shape": (r"\[2, 6\]", changed(indices=torch.zeros(2, N).byte())),
    "values of whole numbers": ("int8", changed(values=torch.zeros(N, 6).char())),
    "values of another shape": (r"\[6, 8\]", changed(values=torch.zeros(N, 8))),
    "values that are no tensor": ("list", changed(values=[1.0])),
    "values in another layout": ("sparse_coo", changed(values=torch.zeros(N, 6).to_sparse())),
    "newer format": ("version 7", changed(format=torch.tensor([7, N, K]))),
    "format of floats": ("float32", changed(format=torch.tensor([1.0, N, K]))),
    "another layer's weight": (
        r"\[6, 9\] weight, the layer is \[6, 10\]",
        SparseLinear(9, N).state_dict(),
    ),
    "bias of another shape": (r"\[5\]", changed(bias=torch.zeros(5))),
    "bias of whole numbers": ("int64", changed(bias=torch.zeros(N).long())),
    "bias that is no tensor": ("None|NoneType|str", changed(bias="zeros")),
    "values without content": ("meta", changed(values=torch.zeros(N, 6, device="meta"))),
    "nothing with content": ("meta", SparseLinear(K, N, device="meta").state_dict()),
}


# A checkpoint of meta tensors may be assigned, as torch's layers allow.
HOSTILE_LOADS = [(case, False) for case in HOSTILE]
HOSTILE_LOADS += [(case, True) for case in HOSTILE if case != "nothing with content"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("case", "assign"), HOSTILE_LOADS)
def test_a_bad_checkpoint_changes_nothing(
    layer: SparseLinear, case: str, assign: bool, strict: bool
) -> None:
    text, state = HOSTILE[case]
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state, strict=strict, assign=assign)
    assert_untouched(layer, before)
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=f"(?s)While loading.*{text}"):
        model.load_state_dict({f"0.{key}": t for key, t in state.items()}, strict, assign)
    assert_untouched(layer, before)


def test_mixed_dtypes_cannot_be_assigned(layer: SparseLinear) -> None:
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"bfloat16.*float32"):
        layer.load_state_dict(changed(bias=torch.zeros(N).bfloat16()), assign=True)
    assert_untouched(layer, before)


KEYS: dict[str, tuple[str, State]] = {
    "missing values": ("values", changed(values=None)),
    "missing format": ("format", changed(format=None)),
    "missing bias": ("bias", changed(bias=None)),
    "extra key": ("scale", changed(scale=torch.ones(1))),
    "dense checkpoint": ("weight", nn.Linear(K, N).state_dict()),
    "nothing": ("indices", {}),
}


@pytest.mark.parametrize("case", KEYS)
def test_wrong_keys_in_a_strict_load_change_nothing(layer: SparseLinear, case: str) -> None:
    text, state = KEYS[case]
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state)
    assert_untouched(layer, before)


def test_a_lenient_load_takes_what_there_is(layer: SparseLinear) -> None:
    source = SparseLinear(K, N)
    state = source.state_dict()
    result = layer.load_state_dict({"bias": state["bias"], "scale": torch.ones(1)}, strict=False)
    assert sorted(result.missing_keys) == ["format", "indices", "values"]
    assert result.unexpected_keys == ["scale"]
    assert torch.equal(layer.bias, source.bias)
    # Values alone go under the layer's own pattern, as weight averaging stores them.
    pattern = layer.state_dict()["indices"]
    values = layer.state_dict()["values"] * 2
    layer.load_state_dict({"values": values}, strict=False)
    assert torch.equal(layer.state_dict()["indices"], pattern)
    assert torch.equal(layer.state_dict()["values"], values)


def test_models_report_keys_as_torch_does() -> None:
    model = nn.Sequential(SparseLinear(K, N), nn.Linear(N, 2))
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"0.values".*"1.weight"'):
        model.load_state_dict({})
    state = model.state_dict()
    state["0.weight"] = torch.ones(N, K)
    with pytest.raises(RuntimeError, match=r'Unexpected.*"0.weight"'):
        model.load_state_dict(state)


def test_optimizer_state_survives_a_resume(tmp_path: Path) -> None:
    def step(layer: SparseLinear, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    layer = SparseLinear(K, N)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(4, K)
    step(layer, optimizer, x)
    torch.save((layer.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    resumed = SparseLinear(K, N)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=0.1)
    state, optimizer_state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(state)
    resumed_optimizer.load_state_dict(optimizer_state)
    step(layer, optimizer, x)
    step(resumed, resumed_optimizer, x)
    assert torch.equal(resumed.values, layer.values)


BUFFERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2:4": (lambda: SparseLinear(K, N), (2, K)),
    "blocks": (lambda: SparseLinear(K, N, pattern=Block(2, 2), density=0.5), (2, K)),
    "places": (lambda: SparseLinear(K, N, pattern=Unstructured(0.5)), (2, K)),
    "conv": (lambda: SparseConv2d(4, 4, 3), (1, 4, 5, 5)),
    "training": (lambda: SparseTrainingLinear(K, N), (2, K)),
    "quantised": (lambda: SparseLinearQuantized(K, N), (2, K)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_given_as_parameters_stay_buffers(kind: str) -> None:
    make, shape = BUFFERS[kind]
    source, layer, x = make(), make(), torch.randn(shape)
    names = [dict(getattr(layer, f"named_{what}")()).keys() for what in ("parameters", "buffers")]
    state = {
        key: nn.Parameter(t.clone(), requires_grad=False) for key, t in source.state_dict().items()
    }
    for holder, prefix in ((layer, ""), (nn.Sequential(layer), "0.")):
        holder.load_state_dict({prefix + key: t for key, t in state.items()}, assign=True)
        for what, before in zip(("parameters", "buffers"), names, strict=True):
            assert dict(getattr(layer, f"named_{what}")()).keys() == before
        assert torch.equal(layer(x), source(x))


def test_tensors_of_inference_mode_are_not_assigned_to_be_trained(layer: SparseLinear) -> None:
    source = SparseLinear(K, N)
    with torch.inference_mode():
        state = {key: t.clone() for key, t in source.state_dict().items()}
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="'values' is a tensor of inference mode"):
        layer.load_state_dict(state, assign=True)
    assert_untouched(layer, before)
    given = {**source.state_dict(), "bias": state["bias"]}
    with pytest.raises(RuntimeError, match="'bias' is a tensor of inference mode"):
        layer.load_state_dict(given, assign=True)
    assert_untouched(layer, before)
    x = torch.randn(2, K)
    dense = source.to_dense().double()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), dense(x.double()).float())
    frozen = SparseLinear(K, N).requires_grad_(False)
    frozen.load_state_dict(state, assign=True)
    torch.testing.assert_close(frozen(x), dense(x.double()).float())
