"""k-sparse codes on a GPU, what only a GPU can show; tests/test_topk.py has the rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_graphs import captured
from gossamer import _C, topk_decode, topk_encode
from gossamer.nn import TopKAutoencoder
from test_topk import Case, check_all
from torch import Tensor

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(3000, 32, 16384, 768), Case(4, 256, 16384, 4096), Case(700, 63, 999, 333)],
    ids=str,
)
def test_more_blocks_than_a_gpu_runs_at_once(case: Case, dtype: torch.dtype) -> None:
    check_all(case, dtype)
    values, indices, weight, _ = case.operands(dtype)
    dy = torch.randn(case.tokens, case.d).to(dtype)
    for call in (
        lambda: topk_decode(values, indices, weight),
        lambda: torch.ops.gossamer.topk_values(dy, indices, weight),
        lambda: torch.ops.gossamer.topk_weight(values, indices, dy, case.width),
    ):
        assert torch.equal(call(), call())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16384, 50001, 131072])
def test_selection_is_a_stable_sort(width: int, dtype: torch.dtype) -> None:
    dense = torch.randn(300, width).to(dtype)
    dense[0], dense[1] = 0, torch.nan
    dense[2].clamp_(-0.5, 0.5)  # many are the largest
    wanted, order = dense.sort(dim=-1, descending=True, stable=True)
    for k in (1, 32, 256, 1024):
        values, indices = dense.new_empty(300, k), torch.empty(300, k, dtype=torch.int64)
        _C.topk_select_cuda(values, indices, dense, False)
        assert torch.equal(indices, order[:, :k])
        torch.testing.assert_close(values, wanted[:, :k], rtol=0, atol=0, equal_nan=True)


def test_an_index_outside_gives_nan_and_no_fault() -> None:
    values, indices, weight, _ = Case(65, 12, 90, 129).operands(torch.bfloat16)
    indices[3, 2], indices[5, 1] = -1, 2**40
    y = topk_decode(values, indices, weight)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3, 5]
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_in_a_graph(dtype: torch.dtype) -> None:
    values, indices, weight, _ = Case(500, 32, 8192, 256).operands(dtype)
    operands = (values.requires_grad_(), weight.requires_grad_())

    def gradients() -> Tensor:
        loss = topk_decode(values, indices, weight).float().square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, operands)])

    assert torch.equal(captured(gradients), gradients())
    model, x = TopKAutoencoder(256, 8192, 32).to(dtype), torch.randn(500, 256).to(dtype)

    def loss() -> Tensor:
        return (model(x) - x).float().square().sum()

    with torch.no_grad():
        torch.testing.assert_close(captured(loss), loss(), rtol=1e-3, atol=0)


def test_other_stream_and_autocast() -> None:
    x, weight = torch.randn(100, 64), torch.randn(4096, 64)
    values, indices = topk_encode(x, weight, k=16)
    y = topk_decode(values, indices, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = topk_decode(values, indices, weight)
    stream.synchronize()
    assert torch.equal(again, y)
    with torch.autocast("cuda", torch.bfloat16):
        assert topk_decode(values, indices, weight).dtype == torch.bfloat16
        assert topk_encode(x, weight, k=16)[0].dtype == torch.bfloat16


def test_float64_is_torchs() -> None:
    check_all(Case(65, 12, 90, 129), torch.float64)
    x, weight = torch.randn(5, 8).double(), torch.randn(30, 8).double()
    values, indices = topk_encode(x, weight, k=4, relu=False)
    wanted, order = (x @ weight.t()).sort(descending=True, stable=True)
    assert torch.equal(indices, order[:, :4])
    torch.testing.assert_close(values, wanted[:, :4])
