"""Experts on a GPU, what only a GPU can show; tests/test_grouped_linear.py has the rest."""

from __future__ import annotations

import pytest
import torch
from gossamer import grouped_linear
from gossamer.nn import GroupedLinear
from gossamer.ops import grouped_cuda
from grouped_cases import GroupedCase, GroupedOracle
from torch import Tensor

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# More blocks than a GPU runs at once, of each tile; experts without a token, one with most of them.
CASES = (
    GroupedCase((7, 0, 300, 1, 64, 65) * 6, 1032, 520),
    GroupedCase((900, 3, 0, 1200, 400), 640, 1000),
    GroupedCase((500, 10), 33, 17),
)


def operands(case: GroupedCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights, bias = (t.cuda() for t in case.operands(dtype))
    return x, weights, case.offsets.cuda(), bias


@pytest.fixture(params=["ours", "grouped_mm"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel by name, whatever would be chosen."""
    if request.param == "grouped_mm" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(grouped_cuda, "_kernel", lambda *of: request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_and_gradients(way: str, case: GroupedCase, dtype: torch.dtype) -> None:
    if way == "grouped_mm" and (dtype != torch.bfloat16 or case.n % 8 or case.k % 8):
        pytest.skip("grouped_mm takes bfloat16 in rows of 16 bytes")
    x, weights, offsets, bias = operands(case, dtype)
    for rest in ((None, None), (bias, "silu")):
        y = grouped_linear(x, weights, offsets, *rest)
        GroupedOracle(x, weights, offsets, *rest).check(y)
        assert torch.equal(grouped_linear(x, weights, offsets.int(), *rest), y)
    leaves = [t.detach().requires_grad_() for t in (x, weights, bias)]
    y = grouped_linear(leaves[0], leaves[1], offsets, leaves[2])
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    GroupedOracle(dy, weights.mT, offsets).check(dx)
    begin = 0
    for expert, count in enumerate(case.counts):
        tokens = slice(begin, begin + count)
        one = torch.tensor([case.n], device="cuda")
        GroupedOracle(dy[tokens].t(), x[tokens].t()[None], one).check(dw[expert])
        wide = {"rtol": 0.02, "atol": 0.02} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(db[expert], dy[tokens].double().sum(0).to(dtype), **wide)
        begin += count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_is_replayed_with_other_offsets(way: str, dtype: torch.dtype) -> None:
    if way == "grouped_mm" and dtype != torch.bfloat16:
        pytest.skip("grouped_mm takes bfloat16")
    case = GroupedCase((100, 0, 60, 200), 136, 264)
    x, weights, offsets, _ = operands(case, dtype)
    layer = GroupedLinear(4, 264, 136, bias=False, device="cuda", dtype=dtype)
    layer.weight.data.copy_(weights)
    x.requires_grad_()
    dy = torch.randn(len(x), 136, device="cuda").to(dtype)

    def step() -> tuple[Tensor, ...]:
        y = layer(x, offsets)
        return (y, *torch.autograd.grad(y, (x, layer.weight), dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    for counts in ((0, 360, 0, 0), (1, 2, 3, 354), (100, 0, 60, 200)):
        offsets.copy_(torch.tensor(counts).cumsum(0))
        for t in kept:
            t.detach().fill_(77.0)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(kept, step(), strict=True))
        GroupedOracle(x, weights, offsets).check(kept[0])


def test_nothing_waits_for_the_gpu() -> None:
    x, weights, offsets, bias = operands(GroupedCase((100, 0, 60), 136, 264), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weights, bias)]
    grouped_linear(x, weights, offsets, bias).backward(torch.ones(160, 136, device="cuda").to(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = grouped_linear(x, weights, offsets, bias, "gelu")
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wrong_offsets_stay_in_memory(way: str, dtype: torch.dtype) -> None:
    if way == "grouped_mm" and dtype != torch.bfloat16:
        pytest.skip("grouped_mm takes bfloat16")
    x, weights, _, _ = operands(GroupedCase((100, 0, 60), 136, 264), dtype)
    x.requires_grad_()
    weights.requires_grad_()
    for wrong in ((200, 5, 2**40), (-5, 3, 2), (50, 10, 300)):
        y = grouped_linear(x, weights, torch.tensor(wrong, device="cuda"))
        y.sum().backward()
    torch.cuda.synchronize()


def test_float64_and_streams() -> None:
    case = GroupedCase((30, 0, 60), 40, 50)
    for dtype in (torch.float64, torch.float32):
        x, weights, offsets, bias = operands(case, dtype)
        y = grouped_linear(x, weights, offsets, bias, "gelu")
        GroupedOracle(x, weights, offsets, bias, "gelu").check(y)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = grouped_linear(x, weights, offsets, bias, "gelu")
        stream.synchronize()
        assert torch.equal(again, y)
    with pytest.raises(ValueError, match="the last of the offsets is 90, x has 91"):
        grouped_linear(torch.ones(91, 50).cuda().double(), weights.double(), offsets)
