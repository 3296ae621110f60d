"""The open format and the panels: exact bytes, exact round trips, and nothing invalid accepted."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, dense_24, sparse_24
from gossamer import reference
from gossamer.formats import Sparse24, Sparse24Panels
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

# (N, K): every small K, whole and broken bytes of two groups, whole and broken records and blocks.
SHAPES = [(3, k) for k in range(1, 10)] + [
    (1, 1),
    (16, 32),
    (17, 33),
    (5, 64),
    (40, 100),
    (33, 257),
]
ALL_DTYPES = (*DTYPES, torch.float64)


def bits(t: Tensor) -> Tensor:
    """The bytes themselves: tells -0.0 from 0.0 and compares NaNs."""
    return t.contiguous().view(torch.uint8)


def test_bytes_of_a_known_weight() -> None:
    weight = torch.tensor(
        [
            [0, 5, 0, 7, 1, 0, 0, 2, 0, 3, 0.0],  # columns 1 3, 0 3, 1 and the lowest free one
            [0, 0, 0, 0, 0, 0, -0.0, 4, 8, 9, 0],  # an empty group keeps 0 1; -0.0 is no entry
        ]
    )
    sparse = Sparse24.from_dense(weight)
    assert sparse.shape == (2, 11)
    assert sparse.values.tolist() == [[5, 7, 1, 2, 0, 3], [0, 0, 0, 4, 8, 9]]
    pairs = [[(1, 3), (0, 3), (0, 1)], [(0, 1), (0, 3), (0, 1)]]
    nibbles = [[low | high << 2 for low, high in row] for row in pairs]
    assert sparse.indices.tolist() == [[a | b << 4, c] for a, b, c in nibbles]
    assert not torch.signbit(sparse.values).any()
    assert sparse.state()["format"].tolist() == [1, 2, 11]


def test_words_of_known_panels() -> None:
    sparse = Sparse24.from_dense(torch.tensor([[0.0, 5, 0, 7], [1, 0, 0, 2]]))
    panels = Sparse24Panels.from_sparse24(sparse).panels
    assert panels.shape == (1, 1, 17, 16)
    assert panels[0, 0, 0, :3].tolist() == [1 | 3 << 2, 0 | 3 << 2, 0]
    assert panels[0, 0, 1, :3].view(torch.float32).tolist() == [5, 1, 0]
    assert panels[0, 0, 2, :3].view(torch.float32).tolist() == [7, 2, 0]
    assert not panels[0, 0, 3:].any()
    half = Sparse24Panels.from_sparse24(sparse.to(torch.float16)).panels
    assert half.shape == (1, 1, 9, 16)
    assert half[0, 0, 1, 0].view(-1).view(torch.float16).tolist() == [5, 7]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_dense_round_trip(target: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = dense_24(*shape, dtype)
    weight[0, :2] = torch.tensor([torch.nan, -torch.inf])[: shape[1]].to(dtype)
    weight[0, 2:4] = 0
    sparse = Sparse24.from_dense(weight)
    values, indices = reference.sparse24_from_dense(weight)
    assert torch.equal(bits(sparse.values), bits(values))
    assert torch.equal(sparse.indices, indices)
    sparse.validate()
    # The one thing that changes: -0.0 comes back as 0.0.
    assert torch.equal(bits(sparse.to_dense()), bits(torch.where(weight == 0, 0, weight)))
    expected = reference.sparse24_to_dense(values, indices, shape[1])
    assert torch.equal(bits(sparse.to_dense()), bits(expected))
    dense = torch.randn(shape).to(dtype)
    gathered = torch.ops.gossamer.sparse24_gather(dense, indices)
    assert torch.equal(gathered, reference.sparse24_gather(dense, indices))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_denormals_survive_where_torch_flushes_them(cpu_target: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 19, dtype=dtype)
    weight[:, [0, 3, 9, 18]] = torch.finfo(dtype).smallest_normal / 4
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        back = Sparse24.from_dense(weight).to_dense()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_round_trip(target: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    sparse = sparse_24(*shape, dtype)
    packed = Sparse24Panels.from_sparse24(sparse)
    back = packed.to_sparse24()
    assert torch.equal(bits(back.values), bits(sparse.values))
    assert torch.equal(back.indices, sparse.indices)
    assert torch.equal(packed.to_dense(), sparse.to_dense())
    if target == "cuda" and dtype != torch.float32:
        return  # a layout of its own, which tests/emulation knows
    expected = reference.sparse24_to_panels(sparse.values, sparse.indices, shape[1])
    assert torch.equal(packed.panels, expected)
    values, _ = reference.sparse24_from_panels(packed.panels, *shape, dtype)
    assert torch.equal(bits(values), bits(sparse.values))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 70), st.sampled_from([0, 1, 3, 9]))
def test_any_pattern_survives(seed: int, rows: int, in_features: int, density: int) -> None:
    torch.manual_seed(seed)
    shape = (rows, in_features)
    kept = torch.rand(shape) < density / 10
    weight = torch.where(kept, torch.randn(shape), 0)
    groups = torch.nn.functional.pad(weight != 0, (0, -shape[1] % 4)).view(shape[0], -1, 4).sum(-1)
    misfits = (groups > 2).nonzero()
    if len(misfits) == 0:
        assert torch.equal(Sparse24.from_dense(weight).validate().to_dense(), weight)
        return
    row, group = misfits[0].tolist()
    position = f"{len(misfits)} of {groups.numel()} .*row {row}, columns {4 * group} "
    with pytest.raises(ValueError, match=position):
        Sparse24.from_dense(weight)


def is_valid(weight: Sparse24) -> bool:
    """What ``validate`` promises, read slot by slot."""
    groups = (weight.in_features + 3) // 4
    for values, row in zip(weight.values.tolist(), weight.indices.tolist(), strict=True):
        nibbles = [half for byte in row for half in (byte & 15, byte >> 4)]
        if any(nibbles[groups:]):
            return False
        for group, nibble in enumerate(nibbles[:groups]):
            pair = (nibble & 3, nibble >> 2)
            if pair[0] >= pair[1]:
                return False
            for slot, index in enumerate(pair):
                if 4 * group + index >= weight.in_features and values[2 * group + slot] != 0:
                    return False
    return True


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=2),
    st.sampled_from([0.0, -0.0, 1.0, torch.nan]),
)
def test_validate_accepts_exactly_the_valid(
    seed: int, rows: int, in_features: int, corruptions: list[tuple[int, int]], tail: float
) -> None:
    torch.manual_seed(seed)
    sparse = sparse_24(rows, in_features)
    for at, byte in corruptions:
        sparse.indices.view(-1)[at % sparse.indices.numel()] = byte
    sparse.values[0, -1] = tail
    if is_valid(sparse):
        sparse.validate()
    else:
        with pytest.raises(ValueError, match="invalid indices at row"):
            sparse.validate()


def test_validate_names_the_first_bad_position() -> None:
    sparse = sparse_24(9, 40)
    sparse.indices[7, 1] = 0
    sparse.indices[4, 3] = sparse.indices[4, 3] & 15
    with pytest.raises(ValueError, match="row 4, group 7"):
        sparse.validate()


def test_from_dense_takes_any_strides_and_no_gradient() -> None:
    weight = dense_24(12, 7)
    for view in (weight.t().contiguous().t(), weight.repeat(2, 1)[::2], weight.requires_grad_()):
        expected = Sparse24.from_dense(view.detach().contiguous())
        sparse = Sparse24.from_dense(view)
        assert torch.equal(sparse.values, expected.values)
        assert torch.equal(sparse.indices, expected.indices)
        assert not sparse.values.requires_grad


def test_is_frozen_and_compares_by_identity() -> None:
    sparse = sparse_24(4, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.shape = (8, 4)  # type: ignore[misc]
    assert sparse == sparse
    assert sparse != copy.copy(sparse)
    assert {sparse: 1}[sparse] == 1
    assert repr(sparse) == "Sparse24(shape=[4, 8], dtype=torch.float32, device=cpu)"


def test_properties() -> None:
    sparse = sparse_24(5, 10, torch.bfloat16)
    packed = Sparse24Panels.from_sparse24(sparse)
    for weight in (sparse, packed):
        assert (weight.out_features, weight.in_features) == weight.shape == (5, 10)
        assert weight.dtype == torch.bfloat16
        assert weight.device.type == "cpu"
    assert sparse.nbytes == 5 * 6 * 2 + 5 * 2
    assert packed.nbytes == 9 * 16 * 4


def test_moves_to_other_dtypes_and_devices() -> None:
    sparse = sparse_24(5, 10)
    half = sparse.to(torch.bfloat16)
    assert torch.equal(half.to_dense(), sparse.to_dense().bfloat16())
    meta = sparse.to("meta").validate()
    assert meta.device.type == "meta"
    assert Sparse24Panels.from_sparse24(meta).to_dense().shape == (5, 10)
    with pytest.raises(TypeError, match="int32"):
        sparse.to(torch.int32)


def test_survives_pickle_copy_and_files(tmp_path: Path) -> None:
    sparse = sparse_24(5, 10, torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    torch.save(sparse.state(), tmp_path / "weight.pt")
    save_file(sparse.state(), tmp_path / "weight.safetensors")
    copies = [
        pickle.loads(pickle.dumps(sparse)),
        copy.deepcopy(sparse),
        torch.load(buffer, weights_only=False),
        Sparse24.from_state(torch.load(tmp_path / "weight.pt", weights_only=True)),
        Sparse24.from_state(load_file(tmp_path / "weight.safetensors")),
    ]
    for other in copies:
        assert other.shape == sparse.shape
        assert torch.equal(other.values, sparse.values)
        assert torch.equal(other.indices, sparse.indices)


def test_pickle_is_validated() -> None:
    sparse = sparse_24(5, 10)
    sparse.indices[2, 0] = 0
    with pytest.raises(ValueError, match="row 2"):
        pickle.loads(pickle.dumps(sparse))


WRONG_DENSE = {
    "1-d": (ValueError, r"\[4\]", torch.ones(4)),
    "no rows": (ValueError, r"\[0, 4\]", torch.ones(0, 4)),
    "no columns": (ValueError, r"\[4, 0\]", torch.ones(4, 0)),
    "whole numbers": (TypeError, "int64", torch.ones(4, 4).long()),
    "not a tensor": (TypeError, "list", [[1.0]]),
}


@pytest.mark.parametrize("case", WRONG_DENSE)
def test_from_dense_refuses(case: str) -> None:
    error, text, weight = WRONG_DENSE[case]
    with pytest.raises(error, match=text):
        Sparse24.from_dense(weight)


WRONG_STATE: dict[str, tuple[type[Exception], str, Any]] = {
    "newer version": (ValueError, "version 2", {"format": torch.tensor([2, 6, 12])}),
    "other shape": (ValueError, r"\[6, 13\]", {"format": torch.tensor([1, 6, 13])}),
    "negative shape": (ValueError, r"-6", {"format": torch.tensor([1, -6, 12])}),
    "huge shape": (ValueError, "values have shape", {"format": torch.tensor([1, 2**62, 2**62])}),
    "format of another dtype": (ValueError, "float32", {"format": torch.ones(3)}),
    "format without content": (ValueError, "meta", {"format": torch.ones(3, device="meta").long()}),
    "format of another length": (ValueError, r"\[2\]", {"format": torch.tensor([1, 6])}),
    "no format": (ValueError, "'format' is missing", {"format": None}),
    "no indices": (ValueError, "'indices' is missing", {"indices": None}),
    "a list": (TypeError, "list", {"values": [1.0]}),
    "sparse layout": (TypeError, "sparse_coo", {"values": torch.ones(6, 6).to_sparse()}),
    "values of whole numbers": (TypeError, "int32", {"values": torch.ones(6, 6).int()}),
    "complex values": (TypeError, "complex64", {"values": torch.ones(6, 6) + 0j}),
    "wide indices": (TypeError, "int64", {"indices": torch.ones(6, 2).long()}),
    "values of another shape": (ValueError, r"\[6, 5\]", {"values": torch.ones(6, 5)}),
    "flat indices": (ValueError, r"\[12\]", {"indices": torch.ones(12, dtype=torch.uint8)}),
    "indices elsewhere": (ValueError, "meta", {"indices": torch.ones(6, 2, device="meta").byte()}),
    "all indices 0": (ValueError, "row 0, group 0", {"indices": torch.zeros(6, 2).byte()}),
    "all indices 255": (ValueError, "row 0, group 0", {"indices": torch.full((6, 2), 255).byte()}),
}


@pytest.mark.parametrize("case", WRONG_STATE)
def test_from_state_refuses(case: str) -> None:
    error, text, change = WRONG_STATE[case]
    state = {k: v for k, v in {**sparse_24(6, 12).state(), **change}.items() if v is not None}
    with pytest.raises(error, match=text):
        Sparse24.from_state(state)


def test_panels_refuse_what_does_not_fit() -> None:
    packed = Sparse24Panels.from_sparse24(sparse_24(6, 12))
    with pytest.raises(ValueError, match=r"\[17, 12\]"):
        Sparse24Panels(packed.panels, (17, 12), torch.float32)
    with pytest.raises(ValueError, match="float16"):
        Sparse24Panels(packed.panels, (6, 12), torch.float16)
    with pytest.raises(TypeError, match="float32"):
        Sparse24Panels(packed.panels.view(torch.float32), (6, 12), torch.float32)
    with pytest.raises(TypeError, match="float64"):
        Sparse24Panels.from_sparse24(sparse_24(6, 12, torch.float64))


def test_what_a_weight_lacks_is_named() -> None:
    weight = Sparse24.from_dense(torch.eye(4))
    with pytest.raises(AttributeError, match="'Sparse24' object has no attribute 'valuse'"):
        _ = weight.valuse  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no 'sum': it is the sparse weight of a layer"):
        _ = weight.sum  # type: ignore[attr-defined]
