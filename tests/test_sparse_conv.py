"""SparseConv's own: torch's arguments, both patterns, mistakes; and the 2:4 format of a weight."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conv_cases import CASES, CONVS, ConvCase
from gossamer import Block
from gossamer.formats import Sparse24, Sparse24Conv
from gossamer.nn import SparseConv, SparseConv1d, SparseConv2d, SparseConv3d
from gossamer.ops import sparse24_conv
from gossamer.prune import magnitude_24
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.mark.parametrize("pattern", ["2:4", Block(4, 4)], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_takes_torchs_arguments(
    axes: int, padding: int | str, mode: str, pattern: str | Block
) -> None:
    stride = 1 if padding == "same" else 2
    arguments: dict[str, Any] = {"padding": padding, "padding_mode": mode, "groups": 2}
    conv = DENSE[axes - 1](6, 8, 3, stride=stride, **arguments)
    layer = SparseConv.from_dense(conv, pattern, "magnitude", 0.5 if pattern != "2:4" else None)
    assert type(layer) is (SparseConv1d, SparseConv2d, SparseConv3d)[axes - 1]
    dense, x = layer.to_dense(), torch.randn(2, 6, *(6, 5, 4)[:axes])
    assert repr(dense) == repr(conv)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))
    fresh = type(layer)(6, 8, 3, stride, **arguments, pattern=pattern, density=layer_density(layer))
    assert repr(fresh).replace(", density", "") == repr(layer).replace(", density", "")


def layer_density(layer: SparseConv) -> float | None:
    return None if layer.pattern == "2:4" else layer.weight.density


def test_keeps_channels_last() -> None:
    layer = SparseConv2d(8, 8, 3, pattern=Block(4, 4), density=0.5)
    x = torch.randn(2, 8, 6, 7)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))
    assert layer.to_dense().weight.is_contiguous()


def test_repr_says_what_is_not_usual() -> None:
    assert repr(SparseConv2d(4, 8, 3, bias=False)) == (
        "SparseConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), bias=False, pattern=2:4, "
        "packed=False)"
    )
    made = SparseConv((4), 8, (3,), 2, 1, 2, 4, True, "reflect", Block(2, 1), density=1.0)
    assert repr(made) == (
        "SparseConv(4, 8, kernel_size=(3,), stride=(2,), padding=(1,), dilation=(2,), groups=4, "
        "padding_mode=reflect, bias=True, pattern=2x1, density=1, packed=False)"
    )


BLOCKS = {"pattern": Block(4, 4)}
MISTAKES = {
    "no channels": (ValueError, "in_channels 0", lambda: SparseConv2d(0, 4, 3)),
    "groups": (ValueError, "6 in 4 groups", lambda: SparseConv2d(4, 6, 3, groups=4)),
    "no groups": (ValueError, "0 groups", lambda: SparseConv2d(4, 6, 3, groups=0)),
    "kernel": (ValueError, "kernel_size 0", lambda: SparseConv2d(4, 4, 0)),
    "kernel of the base": (ValueError, "SparseConv1d", lambda: SparseConv(4, 4, 3)),
    "kernel of other axes": (ValueError, "kernel_size", lambda: SparseConv2d(4, 4, (3, 3, 3))),
    "kernel of four axes": (ValueError, "3 axes", lambda: SparseConv(4, 4, (1, 1, 1, 1))),
    "stride": (ValueError, "stride 0", lambda: SparseConv2d(4, 4, 3, stride=0)),
    "same": (ValueError, "'same'", lambda: SparseConv2d(4, 4, 3, stride=2, padding="same")),
    "padding": (ValueError, "'full'", lambda: SparseConv2d(4, 4, 3, padding="full")),
    "mode": (ValueError, "'mirror'", lambda: SparseConv2d(4, 4, 3, padding_mode="mirror")),
    "pattern": (ValueError, "'1:4'", lambda: SparseConv2d(4, 4, 3, pattern="1:4")),
    "dtype": (TypeError, "int8", lambda: SparseConv2d(4, 4, 3, dtype=torch.int8)),
    "no density": (ValueError, "no density", lambda: SparseConv2d(4, 4, 3, **BLOCKS)),
    "density": (ValueError, "density 0", lambda: SparseConv2d(4, 4, 3, **BLOCKS, density=0)),
    "density of 2:4": (ValueError, r"density 0\.5", lambda: SparseConv2d(4, 4, 3, density=0.5)),
    "density, nothing pruned": (
        ValueError,
        r"density 0\.5",
        lambda: SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), Block(4, 4), density=0.5),
    ),
    "pruned to no density": (
        ValueError,
        "no density",
        lambda: SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), Block(4, 4), "magnitude"),
    ),
    "prune": (
        ValueError,
        "'random'",
        lambda: SparseConv2d.from_dense(nn.Conv2d(4, 4, 3), prune="random"),
    ),
    "another rank": (
        TypeError,
        r"Conv1d, expected torch\.nn\.Conv2d",
        lambda: SparseConv2d.from_dense(nn.Conv1d(4, 4, 3)),
    ),
    "transposed": (
        TypeError,
        "ConvTranspose2d",
        lambda: SparseConv.from_dense(nn.ConvTranspose2d(4, 4, 3)),
    ),
    "linear": (TypeError, "Linear", lambda: SparseConv.from_dense(nn.Linear(4, 4))),
    "x": (ValueError, r"\[2, 5, 6, 6\]", lambda: SparseConv2d(4, 4, 3)(torch.ones(2, 5, 6, 6))),
    "small x": (ValueError, r"\[2, 6\]", lambda: SparseConv2d(4, 4, 3)(torch.ones(2, 4, 2, 6))),
    "dtype of x": (
        TypeError,
        "float64.*float32",
        lambda: SparseConv2d(4, 4, 3)(torch.ones(2, 4, 6, 6).double()),
    ),
    "device of x": (
        ValueError,
        "meta.*cpu",
        lambda: SparseConv2d(4, 4, 3)(torch.ones(2, 4, 6, 6, device="meta")),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, mistake = MISTAKES[case]
    with pytest.raises(error, match=text):
        mistake()


def weight_24(case: ConvCase) -> Tensor:
    return magnitude_24(torch.randn(case.shape), dim=1).to(case.dtype)


@pytest.mark.parametrize("case", CASES[::5], ids=map(str, range(0, len(CASES), 5)))
def test_24_matches_dense(case: ConvCase) -> None:
    dense, x = weight_24(case), case.x()
    weight = Sparse24Conv.from_dense(dense, case.groups)
    assert torch.equal(weight.validate().to_dense(), dense)
    bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
    y = sparse24_conv(x, weight, bias, **case.geometry)
    torch.testing.assert_close(y, case.dense(x, dense, bias))


def test_24_gradients_are_those_of_the_dense_layer() -> None:
    dense = magnitude_24(torch.randn(6, 5, 3, dtype=torch.float64), dim=1)
    weight = Sparse24Conv.from_dense(dense, 2)
    x = torch.randn(2, 10, 7, dtype=torch.float64, requires_grad=True)
    operands = (x, weight.values.requires_grad_())
    dx, dvalues = torch.autograd.grad(sparse24_conv(x, weight, activation="gelu").sum(), operands)
    y = nn.functional.gelu(CONVS[0](x, dense.requires_grad_(), groups=2)).sum()
    want_x, want_w = torch.autograd.grad(y, (x, dense))
    torch.testing.assert_close(dx, want_x)
    # At the positions that are stored, padding included.
    values = Sparse24Conv(dvalues, weight.indices, weight.shape, 2).to_dense()
    ones = Sparse24Conv(torch.ones_like(dvalues), weight.indices, weight.shape, 2).to_dense()
    torch.testing.assert_close(values, want_w * ones)


def test_24_bytes_of_a_known_weight() -> None:
    weight = torch.zeros(2, 5, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([0.0, 1, 0, 2, 3])
    weight[1, :, 0, 1] = torch.tensor([0.0, 0, 4, 0, 0])
    sparse = Sparse24Conv.from_dense(weight)
    assert sparse.matrix.shape == (2, 16)  # two taps of 5 channels, padded to 8
    assert sparse.values.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 4, 0, 0]]
    assert sparse.state()["format"].tolist() == [1, 1, 2, 2, 5, 1, 1, 2]
    columns = torch.zeros(2, 16)
    columns[0, :5] = weight[0, :, 0, 0]
    columns[1, 8:13] = weight[1, :, 0, 1]
    assert torch.equal(sparse.matrix.to_dense(), columns)
    assert repr(sparse) == (
        "Sparse24Conv(shape=[2, 5, 1, 2], groups=1, dtype=torch.float32, device=cpu)"
    )


def test_24_padding_has_to_be_zero() -> None:
    weight = Sparse24Conv.from_dense(torch.zeros(2, 3, 2))
    values = weight.values.clone()
    values[1, 3] = 1.0
    indices = weight.indices.clone()
    indices[1, 0] = indices[1, 0] & 15 | (0 | 3 << 2) << 4  # tap 1, channels 0 and 3
    with pytest.raises(ValueError, match="row 1, tap 1"):
        Sparse24Conv(values, indices, weight.shape).validate()
    with pytest.raises(ValueError, match="row 1, tap 1"):
        pickle.loads(pickle.dumps(Sparse24Conv(values, indices, weight.shape)))


def test_24_copies_moves_and_mistakes() -> None:
    dense = magnitude_24(torch.randn(6, 5, 3), dim=1)
    weight = Sparse24Conv.from_dense(dense, 2)
    for other in (
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        Sparse24Conv.from_state(weight.state()),
        weight.to(torch.float64).to(torch.float32),
    ):
        assert (other.shape, other.groups) == ((6, 5, 3), 2)
        assert torch.equal(other.to_dense(), dense)
    assert weight.to("meta").validate().to_dense().shape == (6, 5, 3)
    with pytest.raises(ValueError, match="linear layer's"):
        Sparse24Conv(weight.values, weight.indices, (6, 24))
    with pytest.raises(ValueError, match="values have shape"):
        Sparse24Conv(weight.values, weight.indices, (6, 5, 4))
    with pytest.raises(TypeError, match="list"):
        Sparse24Conv.from_dense([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Sparse24, expected"):
        sparse24_conv(torch.ones(1, 4, 3), Sparse24.from_dense(torch.zeros(4, 4)))  # type: ignore[arg-type]


def test_pruning_along_the_channels() -> None:
    weight = torch.randn(3, 6, 2, 2)
    pruned = magnitude_24(weight, dim=1)
    assert pruned.is_contiguous()
    for row in range(3):
        for tap in range(4):
            column = weight[row].flatten(1)[:, tap]
            assert torch.equal(pruned[row].flatten(1)[:, tap], magnitude_24(column))
    with pytest.raises(ValueError, match="dim 4"):
        magnitude_24(weight, dim=4)
