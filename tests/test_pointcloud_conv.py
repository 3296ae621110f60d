"""Convolution over kernel maps: every kernel against plain torch, threads, mistakes, gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from gossamer import _C, reference
from gossamer.ops import pointcloud_conv, pointcloud_layout
from gossamer.ops.pointcloud_layout import OutputTable
from gossamer.pointcloud import KernelMap, plain
from pointcloud_cases import CASES, ConvOracle, PointcloudCase, WeightGradOracle, tensors_of
from torch import Tensor

ops = torch.ops.gossamer
TYPICAL = PointcloudCase((3, 3), 40, 35, 0.5, 20, 37)
ACTIVATIONS = (None, "relu", "gelu", "silu")


def own_dtypes(target: str) -> list[torch.dtype]:
    """Those for which a target has kernels of its own."""
    sizes = (64, 64)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    owners = {d: _C.pointcloud_conv_choose(name, *sizes)["target"] for d, name in names.items()}
    return [d for d in DTYPES if target in ("cuda", owners[d])]


def test_matches_plain_torch(target: str) -> None:
    for dtype, (i, case) in product(own_dtypes(target), enumerate(CASES)):
        feats, weight, bias = case.operands(dtype)
        map, given = case.map(shuffled=i % 3 > 0), bias if i % 2 else None
        activation = ACTIVATIONS[i % 4]
        y = pointcloud_conv(feats, weight, given, map, case.groups, activation)
        with naming(case, dtype):
            ConvOracle(feats, weight, given, map, case.groups, activation).check(y)


def test_gradients_match_plain_torch(target: str) -> None:
    for dtype, (i, case) in product(own_dtypes(target), enumerate(CASES)):
        feats, weight, bias = operands = [t.requires_grad_() for t in case.operands(dtype)]
        map = case.map(shuffled=i % 3 > 0)
        y = pointcloud_conv(feats, weight, bias, map, case.groups)
        dy = torch.randn(y.shape).to(dtype)
        dx, dw, db = torch.autograd.grad(y, operands, dy)
        back = weight.unflatten(2, (case.groups, -1)).transpose(1, 3).flatten(2)
        with naming(case, dtype):
            ConvOracle(dy, back, None, map.transposed(), case.groups).check(dx)
            WeightGradOracle(dy, feats, map, case.groups).check(dw)
        torch.testing.assert_close(db, dy.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_rounded_once(dtype: torch.dtype) -> None:
    for case in CASES[3:15:2]:  # what a GPU runs
        feats, weight, bias = case.operands(dtype)
        map = case.map()
        y = reference.pointcloud_conv(
            feats, weight, bias, *tensors_of(map), map.n_out, case.groups, "silu"
        )
        with naming(case, dtype):
            ConvOracle(feats, weight, bias, map, case.groups, "silu").check(y)
            dw = reference.pointcloud_conv_weight_grad(y, feats, *tensors_of(map), case.groups)
            WeightGradOracle(y, feats, map, case.groups).check(dw)


class naming:
    """Says at which of several cases an assertion failed."""

    def __init__(self, case: PointcloudCase, dtype: torch.dtype) -> None:
        self.case = f"{case}, {dtype}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, AssertionError):
            raise AssertionError(f"{self.case}: {error}") from error


def test_is_the_dense_convolution(target: str) -> None:
    grid = torch.randn(1, 20, 9, 8, 7) * (torch.rand(1, 1, 9, 8, 7) < 0.4)
    coords = grid[:, 0].nonzero().int()
    box, ones = plain.bounds(coords), (1, 1, 1)
    kernel = torch.randn(10, 20, 3, 3, 3)
    pairs = plain.match(coords, coords, box, (3, 3, 3), ones, ones, ones)
    map = KernelMap(pairs[1], pairs[0], pairs[2], None, None, len(coords), len(coords), (3, 3, 3))
    at = coords.long().unbind(1)
    rows = (at[0], slice(None), *at[1:])
    weight = kernel.flatten(2).permute(2, 1, 0)
    y = pointcloud_conv(grid[rows].contiguous(), weight, None, map)
    torch.testing.assert_close(y, F.conv3d(grid, kernel, padding=1)[rows], rtol=1e-4, atol=1e-4)


def test_same_bits_for_any_threads(target: str, threads: int) -> None:
    for dtype, case in product(own_dtypes(target), CASES[8:14]):
        feats, weight, bias = (t.requires_grad_() for t in case.operands(dtype))
        map, found = case.map(), []
        for team in (1, 3, 7):
            torch.set_num_threads(team)
            y = pointcloud_conv(feats, weight, bias, map, case.groups, "silu")
            found.append((y, *torch.autograd.grad(y.square().sum(), (feats, weight))))
            with torch.no_grad():
                found[-1] += (pointcloud_conv(feats, weight, bias, map, case.groups, "silu"),)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True)), str(case)


def test_what_is_no_number_reaches_its_pairs_alone(target: str) -> None:
    for dtype in own_dtypes(target):
        for bad in (float("nan"), float("inf")):
            check_what_is_no_number(dtype, bad)


def check_what_is_no_number(dtype: torch.dtype, bad: float) -> None:
    feats, weight, bias = TYPICAL.operands(dtype)
    map = TYPICAL.map()
    clean = pointcloud_conv(feats, weight, bias, map)
    spoiled = feats.clone()
    spoiled[6, -1] = bad
    y = pointcloud_conv(spoiled, weight, bias, map)
    hit = map.in_order[map.in_index.long()] == 6
    reached = torch.zeros(map.n_out, dtype=torch.bool)
    reached[map.out_order[map.out_index.long()[hit]].long()] = True
    assert reached.any()
    assert not reached.all()
    assert torch.equal(y[~reached], clean[~reached])
    assert not y[reached].isfinite().any()
    # Of a gradient: a voxel's channel reaches its row of every tap in which it has a pair.
    dy = torch.randn(map.n_out, TYPICAL.c_out).to(dtype)
    dw = ops.pointcloud_conv_weight_grad(dy, spoiled, *tensors_of(map), 1)
    WeightGradOracle(dy, spoiled, map).check(dw)


def test_float64_and_strides(target: str) -> None:
    feats, weight, bias = TYPICAL.operands(torch.float64)
    map = TYPICAL.map()
    y = pointcloud_conv(feats, weight, bias, map, 1, "gelu")
    ConvOracle(feats, weight, bias, map, 1, "gelu").check(y)
    for dtype in DTYPES:
        feats, weight, bias = TYPICAL.operands(dtype)
        y = pointcloud_conv(feats, weight, bias, map)
        wide = torch.full((TYPICAL.n_in, 45), float("nan"), dtype=dtype)
        wide[:, 3:23] = feats
        for x in (wide[:, 3:23], feats.t().contiguous().t()):
            got = pointcloud_conv(x, weight.mT.contiguous().mT, bias.repeat(2)[: len(bias)], map)
            assert torch.equal(got, y)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_first_and_second_derivatives(serial_target: str, activation: str | None) -> None:
    case = PointcloudCase((3,), 5, 4, 0.6, 4, 6, 2)
    map = case.map()
    operands = [t.requires_grad_() for t in case.operands(torch.float64)]

    def conv(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pointcloud_conv(feats, weight, bias, map, 2, activation)

    assert torch.autograd.gradcheck(conv, operands)
    assert torch.autograd.gradgradcheck(conv, operands, fast_mode=True)


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    feats, weight, bias = (t.requires_grad_(gradient) for t in TYPICAL.operands(torch.float32))
    map = TYPICAL.map()
    dy = torch.randn(map.n_out, TYPICAL.c_out, requires_grad=gradient)
    pairs = tensors_of(map)
    torch.library.opcheck(ops.pointcloud_conv, (feats, weight, bias, *pairs, 35, 1, "silu"))
    torch.library.opcheck(ops.pointcloud_conv, (feats, weight, None, *pairs, 35, 1, "none"))
    torch.library.opcheck(ops.pointcloud_conv_weight_grad, (dy, feats, *pairs, 1))


def test_compiled_training_matches_eager() -> None:
    torch._dynamo.reset()
    operands = [t.requires_grad_() for t in TYPICAL.operands(torch.float32)]

    def loss(feats: Tensor, weight: Tensor, bias: Tensor, map: KernelMap) -> Tensor:
        return pointcloud_conv(feats, weight, bias, map, 1, "silu").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    map = TYPICAL.map()
    got = torch.autograd.grad(compiled(*operands, map), operands)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*operands, map), operands))


@pytest.mark.parametrize("capturing", [False, True])
def test_other_streams_borrow_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    first, other, made = Mock(), Mock(), Mock()
    pairs = [Mock(is_cuda=name != "tap_offsets") for name in KernelMap.__annotations__][:3]
    table = OutputTable(*(Mock(is_cuda=True) for _ in OutputTable._fields))
    kept = pointcloud_layout._Kept([], table, made, first)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    for stream in (first, other):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        pointcloud_layout._lend(kept, made, first, pairs)
    first.wait_event.assert_not_called()
    assert other.wait_event.call_count == (0 if capturing else 1)
    for t in (*pairs, *table):
        assert t.record_stream.call_args_list == ([call(other)] if t.is_cuda else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    feats, weight, bias = (t.requires_grad_() for t in TYPICAL.operands(torch.float32))
    map = TYPICAL.map()
    with torch.autocast("cpu", dtype):
        y = pointcloud_conv(feats, weight, bias, map)
    assert y.dtype == dtype
    assert torch.equal(y, pointcloud_conv(*(t.to(dtype) for t in (feats, weight, bias)), map))
    y.float().sum().backward()
    assert feats.grad.dtype == torch.float32


def test_targets_say_what_runs(cpu_target: str) -> None:
    below = _C.targets_built()[: _C.targets_built().index(_C.target()) + 1]
    for dtype, groups in product(("float32", "bfloat16", "float16", "float64"), (1, 64)):
        chosen = _C.pointcloud_conv_choose(dtype, 64, 64, groups)
        assert chosen["target"] in below
        serial = _C.target() == "serial" or dtype == "float64"
        assert (chosen["kernel"] == "serial") == serial
        assert (chosen["kernel"] == "depthwise") == (not serial and groups == 64)
    if _C.target() == "amx_bf16":
        assert _C.pointcloud_conv_choose("bfloat16", 64, 64)["kernel"] == "tiles"
        assert _C.pointcloud_conv_choose("bfloat16", 4, 16)["kernel"] == "gather"
    with pytest.raises(TypeError, match="int8"):
        _C.pointcloud_conv_choose("int8", 8, 8)


FEATS, WEIGHT, BIAS = TYPICAL.operands(torch.float32)
MAP = TYPICAL.map()


def changed(name: str, at: int, value: int) -> dict[str, Any]:
    tensor = getattr(MAP, name).clone()
    tensor[at] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("operands", "of_map", "error", "text"),
    [
        ({"feats": FEATS[:, :19]}, {}, ValueError, "19 channels, the weight expects 20"),
        ({"feats": FEATS[:39]}, {}, ValueError, "39 rows, the map 40 inputs"),
        ({"feats": FEATS.double()}, {}, TypeError, "feats is torch.float64"),
        ({"feats": FEATS[0]}, {}, ValueError, r"shape \[20\]"),
        ({"weight": WEIGHT[0]}, {}, ValueError, r"weight \[20, 37\]"),
        ({"weight": WEIGHT[:8]}, {}, ValueError, r"tap_offsets has shape \[10\], expected \[9\]"),
        ({"weight": WEIGHT[:, :10], "groups": 2}, {}, ValueError, "2 groups do not divide 37"),
        ({"bias": BIAS[:5]}, {}, ValueError, r"\[5\], expected \[37\]"),
        ({"activation": "tanh"}, {}, ValueError, "tanh"),
        ({}, {"in_index": MAP.in_index.long()}, TypeError, "in_index is int64"),
        ({}, {"in_index": MAP.in_index[1:]}, ValueError, "in_index has shape"),
        ({}, changed("in_index", 0, -1), ValueError, r"in_index\[0\] is -1, there are 40"),
        ({}, changed("in_index", -1, 40), ValueError, "is 40, there are 40"),
        ({}, changed("out_index", 1, 0), ValueError, r"out_index\[1\] is 0, not above"),
        ({}, changed("tap_offsets", 1, 900), ValueError, r"tap_offsets\[2\] is .*below"),
        ({}, changed("tap_offsets", 0, 1), ValueError, r"tap_offsets\[0\] is 1"),
        ({}, changed("in_order", 3, 40), ValueError, r"in_order\[3\] is 40, there are 40"),
        ({}, changed("out_order", 2, -7), ValueError, r"out_order\[2\] is -7, there are 35"),
        (
            {},
            changed("out_order", 1, int(MAP.out_order[0])),
            ValueError,
            r"\[1\] is .*as one before",
        ),
    ],
)
def test_mistakes(operands: dict[str, Any], of_map: dict[str, Any], error: type, text: str) -> None:
    given = {"feats": FEATS, "weight": WEIGHT, "bias": None, "map": replace(MAP, **of_map)}
    with pytest.raises(error, match=text):
        pointcloud_conv(**(given | operands))
