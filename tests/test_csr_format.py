"""The open format of unstructured weights, changes of its pattern, and layers that hold it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from csr_cases import CsrCase
from gossamer import Unstructured, convert
from gossamer.formats import SparseCsr, random_places, update_pattern
from gossamer.nn import SparseConv2d, SparseLinear
from gossamer.prune import magnitude_unstructured
from torch import Tensor, nn

CASE = CsrCase(1, 12, 20, 0.3)


def weight(dtype: torch.dtype = torch.float32) -> SparseCsr:
    return CASE.operands(dtype)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_from_dense_and_back(dtype: torch.dtype) -> None:
    dense = weight(dtype).to_dense()
    dense[0, :3] = -0.0
    made = SparseCsr.from_dense(dense.t().contiguous().t()).validate()
    assert torch.equal(made.to_dense(), dense)
    assert made.values.shape[0] == dense.count_nonzero()
    assert made.density == made.values.shape[0] / 240
    assert (made.col_indices.dtype, made.crow_indices.dtype) == (torch.int16, torch.int32)
    assert f"density={made.density:.3g}" in repr(made)
    made = SparseCsr.from_dense(dense, mask=dense <= dense.max())
    assert made.density == 1.0
    assert torch.equal(made.to_dense(), dense)


def test_to_dense_is_differentiable() -> None:
    held = weight(torch.float64)
    values = held.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: replace(held, values=v).to_dense(), (values,))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_torch_sparse_tensors() -> None:
    held = weight()
    theirs = held.to_torch()
    assert torch.equal(theirs.to_dense(), held.to_dense())
    for given in (theirs, held.to_dense().to_sparse_csr()):
        assert torch.equal(SparseCsr.from_torch(given).to_dense(), held.to_dense())
    with pytest.raises(TypeError, match="strided"):
        SparseCsr.from_torch(held.to_dense())
    with pytest.raises(ValueError, match="shape"):
        SparseCsr.from_torch(torch.ones(2, 3, 4).to_sparse_csr())
    far = torch.sparse_csr_tensor(
        [0, 2**32 + 1, 2], [0, 1], [1.0, 2.0], (2, 3), check_invariants=False
    )
    with pytest.raises(ValueError, match=r"crow_indices\[1\] is 4294967297, expected 0 to 2"):
        SparseCsr.from_torch(far)


def test_wide_weights_number_columns_by_32_bits() -> None:
    for columns, dtype in ((2**15, torch.int16), (2**15 + 1, torch.int32)):
        dense = torch.zeros(2, columns)
        dense[1, -1] = 3
        made = SparseCsr.from_dense(dense).validate()
        assert made.col_indices.dtype == dtype
        assert torch.equal(made.to_dense(), dense)
    with pytest.raises(TypeError, match=r"of 32769 columns expected .* torch.int32"):
        replace(made, col_indices=made.col_indices.short())


def test_state_and_copies(tmp_path: Path) -> None:
    held = weight(torch.bfloat16)
    torch.save(held.state(), tmp_path / "w")
    for same in (
        SparseCsr.from_state(torch.load(tmp_path / "w", weights_only=True)),
        copy.deepcopy(held),
        pickle.loads(pickle.dumps(held)),
        held.to(torch.float32).to(torch.bfloat16),
    ):
        assert torch.equal(same.to_dense(), held.to_dense())
    assert held.nbytes == sum(t.nbytes for t in held.state().values()) - 24


def state(**change: Tensor) -> dict[str, Tensor]:
    return {**weight().state(), **change}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format": torch.tensor([2, 12, 20])}, ValueError, "version 2"),
        ({"format": torch.tensor([1, 12, 19])}, ValueError, "outside of the weight's 19 columns"),
        ({"format": torch.tensor([1, 11, 20])}, ValueError, r"crow_indices \[13\].*\[12\]"),
        ({"format": torch.tensor([1, 0, 20])}, ValueError, r"shape \[0, 20\]"),
        ({"format": torch.tensor([1, 12, 2**40])}, ValueError, "1 to 2"),
        ({"values": torch.zeros(3)}, ValueError, r"values have shape \[3\]"),
        ({"values": torch.zeros(3, dtype=torch.int8)}, TypeError, "int8"),
        ({"crow_indices": torch.zeros(13, dtype=torch.int64)}, TypeError, "int64"),
        ({"crow_indices": torch.zeros(13, dtype=torch.int32)}, ValueError, "is 0, there are"),
        ({"crow_indices": 2**30 * torch.ones(13, dtype=torch.int32)}, ValueError, "expected 0"),
    ],
)
def test_a_bad_state_is_refused(change: dict[str, Tensor], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        SparseCsr.from_state(state(**change))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: SparseCsr.from_dense(torch.ones(2, 3, 4)), ValueError, r"\[2, 3, 4\]"),
        (lambda: SparseCsr.from_dense(torch.ones(2, 3).int()), TypeError, "int32"),
        (lambda: SparseCsr.from_dense(torch.ones(2, 0)), ValueError, "with content"),
        (
            lambda: SparseCsr.from_dense(torch.eye(3), torch.eye(3).flip(0) > 0),
            ValueError,
            r"2 of 3 non-zeros lie outside of the mask, the first at \[0, 0\]",
        ),
        (lambda: SparseCsr.from_dense(torch.eye(3), torch.eye(3)), TypeError, "bool"),
        (lambda: SparseCsr.from_dense(torch.eye(3), torch.eye(4) > 0), ValueError, r"\[4, 4\]"),
        (lambda: Unstructured(0), ValueError, "density 0"),
        (lambda: Unstructured(1.5), ValueError, "density 1.5"),
        (lambda: SparseLinear(4, 4, pattern=Unstructured()), ValueError, "without a density"),
        (lambda: SparseLinear(4, 4, pattern=Unstructured(0.5), density=0.5), ValueError, "beside"),
        (lambda: SparseConv2d(4, 4, 3, pattern=Unstructured(0.5)), ValueError, "linear layers"),
        (lambda: magnitude_unstructured(torch.ones(3), 0), ValueError, "density 0"),
        (lambda: magnitude_unstructured(torch.ones(3).int(), 0.5), TypeError, "int32"),
    ],
)
def test_mistakes(call: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_pruning_keeps_the_largest() -> None:
    tied = torch.tensor([[1.0, -2, 2, 2], [float("nan"), 0, 3, -2]])
    pruned = magnitude_unstructured(tied, 0.5)
    kept = torch.tensor([[False, True, True, False], [True, False, True, False]])
    assert torch.equal(pruned.nan_to_num(nan=9), torch.where(kept, tied, 0).nan_to_num(nan=9))
    zeros = SparseLinear.from_dense(zero_layer(), Unstructured(0.5), prune="magnitude")
    assert zeros.values.shape == (8,)
    empty = SparseLinear.from_dense(zero_layer(), Unstructured())
    assert empty.values.shape == (0,)
    assert torch.equal(empty(torch.randn(2, 4)), empty.bias.expand(2, 4))
    empty.reset_parameters()


def zero_layer() -> nn.Linear:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    return layer


def test_fresh_layers_are_drawn_without_a_dense_weight() -> None:
    torch.manual_seed(3)
    layer = SparseLinear(400, 300, pattern=Unstructured(0.05))
    assert layer.values.shape == (6000,)
    layer.weight.validate()
    assert 0.95 < float(layer.values.detach().abs().max()) * 20**0.5 <= 1  # 20 inputs a row
    assert 3 < float(layer.weight.rows().bincount(minlength=300).double().std()) < 6
    huge = SparseLinear(100_000, 100_000, pattern=Unstructured(1e-6))  # dense: 40 GB
    assert huge(torch.ones(1, 100_000)).shape == (1, 100_000)
    assert "pattern=unstructured, density=0.05" in repr(layer)


def test_a_checkpoint_of_another_number_of_places() -> None:
    layer, other = (SparseLinear(20, 10, pattern=Unstructured(d)) for d in (0.2, 0.3))
    with pytest.raises(RuntimeError, match=r"holds 60 live places, the layer 40"):
        layer.load_state_dict(other.state_dict())
    layer.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), other(x))
    with pytest.raises(RuntimeError, match=r"holds a \[9, 20\] weight, the layer is \[10, 20\]"):
        layer.load_state_dict(SparseLinear(20, 9, pattern=Unstructured(0.3)).state_dict())


@pytest.mark.parametrize("seed", range(4))
def test_update_is_what_a_dense_mask_would_give(seed: int) -> None:
    torch.manual_seed(seed)
    held = CsrCase(1, 9, 13, (0.0, 0.3, 0.9, 0.5)[seed]).operands(torch.float32)[1]
    count = held.values.shape[0]
    drop = torch.rand(count) < 0.4
    kept_keys = held.keys()[~drop]
    grow = random_places(held.shape, kept_keys, min(7, 117 - len(kept_keys)))
    grow = grow[:, torch.randperm(grow.shape[1])]
    values = torch.randn(grow.shape[1])
    given = drop if seed % 2 else drop.nonzero()[:, 0]
    made, source = update_pattern(held, given, grow, values)
    dense = replace(held, values=held.values.masked_fill(drop, 0)).to_dense()
    dense[grow[0], grow[1]] = values
    assert torch.equal(made.validate().to_dense(), dense)
    stays = source >= 0
    assert torch.equal(made.values[stays], held.values[source[stays]])
    assert int((~stays).sum()) == grow.shape[1]
    same, source = update_pattern(made, torch.zeros(0, dtype=torch.int64), grow[:, :0])
    assert torch.equal(same.to_dense(), dense)
    assert torch.equal(source, torch.arange(len(source)))


def test_random_places_are_all_equally_likely() -> None:
    live = torch.tensor([0, 3, 4, 11])
    counts = torch.zeros(12)
    for _ in range(600):
        row, column = random_places((3, 4), live, 2)
        counts[row * 4 + column] += 1
    assert not counts[live].any()
    free = torch.ones(12, dtype=torch.bool)
    free[live] = False
    assert 100 < float(counts[free].min()) <= float(counts[free].max()) < 200  # 150 +- 11
    for count in (0, 300, 8_000, 24_000, 39_996):
        some = random_places((200, 200), live, count)
        keys = some[0] * 200 + some[1]
        assert keys.shape == keys.unique().shape == (count,)
        assert not torch.isin(live, keys).any()
    assert random_places((3, 4), live, 8).shape == (2, 8)
    with pytest.raises(ValueError, match="9 of 8"):
        random_places((3, 4), live, 9)


NONE = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("drop", "grow", "text"),
    [
        (NONE, torch.tensor([[12], [0]]), r"\[12, 0\], the weight is \[12, 20\]"),
        (NONE, torch.tensor([[1, 1], [0, 0]]), "lives, or twice"),
        (torch.tensor([5, 5]), torch.zeros(2, 0, dtype=torch.int64), "twice"),
        (torch.tensor([500]), torch.zeros(2, 0, dtype=torch.int64), "500 of"),
        (torch.tensor([0.5]), torch.zeros(2, 0, dtype=torch.int64), "drop is torch.float32"),
        (NONE, torch.zeros(3, 0, dtype=torch.int64), r"grow is torch.int64 of shape \[3, 0\]"),
    ],
)
def test_update_mistakes(drop: Tensor, grow: Tensor, text: str) -> None:
    held = SparseCsr.from_dense(torch.eye(12, 20))
    with pytest.raises((TypeError, ValueError), match=text):
        update_pattern(held, drop, grow)
    taken = torch.tensor([[2], [2]])
    with pytest.raises(ValueError, match=r"\[2, 2\], which lives"):
        update_pattern(held, NONE, taken)


def test_convert() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Linear(48, 8))
    kept = magnitude_unstructured(model[0].weight.detach(), 0.25)
    report = convert(model, Unstructured(0.25), "magnitude", force=True)
    assert [layer.swapped for layer in report.layers] == [True, False, True]
    assert "linear layers only" in report["2"].reason
    assert torch.equal(model[0].weight.to_dense(), kept)
    assert "gather" in report["0"].kernel or "tokens" in report["0"].kernel
    dense = nn.Sequential(nn.Linear(8, 8))
    report = convert(dense, Unstructured(0.25), force=True)
    assert "64 non-zeros, density 0.25 allows 16" in report["0"].reason
    report = convert(dense, Unstructured())
    assert "no figures for unstructured" in report["0"].reason
    with pytest.raises(ValueError, match="without a density"):
        convert(dense, Unstructured(), "magnitude")


def test_a_state_is_loaded_by_swapping_too() -> None:
    layer = SparseLinear(40, 30, pattern=Unstructured(0.3))
    state = SparseLinear(40, 30, pattern=Unstructured(0.3)).state_dict()
    layer(torch.randn(3, 40)).sum().backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
