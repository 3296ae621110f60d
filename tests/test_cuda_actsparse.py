"""Products that skip zero inputs, and spikes, on a GPU: what only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from actsparse_cases import ActiveCase, LinearOracle, OutputsOracle, draw_cases
from gossamer import actsparse_linear, actsparse_outputs, pack_spikes, spike_linear
from gossamer.nn import ActSparseLinear, SparseMLP

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = (None, "relu", "gelu", "silu")
# More blocks than run at once, one tile, columns and rows of any alignment.
LARGE = [
    ActiveCase(m, n, k, active)
    for m in (1, 2, 4, 7, 8, 16)
    for n, k, active in ((4096, 14336, "few"), (14336, 1024, "some"), (264, 20000, "all"))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(dtype: torch.dtype) -> None:
    for i, case in enumerate((*draw_cases(32), *LARGE)):
        x, weight, bias = (t.cuda() for t in case.operands(dtype))
        given, threshold = bias if i % 3 else None, (0.0, 0.1, 0.7)[i % 3]
        y = actsparse_linear(x, weight, given, threshold)
        oracle = LinearOracle(x.cpu(), weight.cpu(), bias.cpu() if i % 3 else None, threshold)
        try:
            oracle.check(y.cpu())
        except AssertionError as error:
            raise AssertionError(f"{case}, threshold {threshold}") from error
        assert torch.equal(actsparse_linear(x, weight, given, threshold), y), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype: torch.dtype) -> None:
    for i, m in enumerate((1, 3, 8, 16)):
        x, weight, bias = ActiveCase(m, 512, 600, "some").operands(dtype)
        oracle = LinearOracle(x, weight, bias, 0.3, ACTIVATIONS[i])
        y = actsparse_linear(x.cuda(), weight.cuda(), bias.cuda(), 0.3, ACTIVATIONS[i])
        oracle.check(y.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_inactive_input_adds_nothing(dtype: torch.dtype) -> None:
    for m in (1, 4, 8):
        x, weight, _ = (t.cuda() for t in ActiveCase(m, 4096, 500, "some").operands(dtype))
        clean = actsparse_linear(x, weight, threshold=0.5)
        weight[x[-1].abs() <= 0.5] = torch.nan
        y = actsparse_linear(x, weight, threshold=0.5)
        assert torch.equal(y[-1], clean[-1])
        x[-1, 7] = torch.nan
        assert actsparse_linear(x, weight, threshold=0.5)[-1].isnan().all()


@pytest.mark.parametrize("m", [1, 4, 16, 17])
def test_in_a_graph_and_on_other_streams(m: int) -> None:
    x, weight, bias = (t.cuda() for t in ActiveCase(m, 4096, 4096, "few").operands(torch.bfloat16))
    others = [torch.where(torch.rand_like(x) < 0.5, x.roll(i), 0) for i in range(3)]
    wanted = [actsparse_linear(other, weight, bias) for other in others]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(actsparse_linear(others[0], weight, bias), wanted[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = actsparse_linear(x, weight, bias)
    for other, right in zip(others, wanted, strict=True):  # other inputs are zero each time
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanted_outputs(dtype: torch.dtype) -> None:
    for i, (m, n, k) in enumerate(((1, 14336, 4096), (4, 3000, 1000), (8, 600, 512), (1, 33, 45))):
        x, weight, bias = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,)))
        wanted = torch.rand(m, n) < (0.1, 0.5)[i % 2]
        y = actsparse_outputs(x.cuda(), weight.cuda(), wanted.cuda(), bias.cuda(), 0.0, "silu")
        OutputsOracle(x, weight, wanted, bias, "silu").check(y.cpu())


def test_does_not_wait_for_the_gpu() -> None:
    x, weight, _ = (t.cuda() for t in ActiveCase(4, 512, 512, "few").operands(torch.float16))
    bits = pack_spikes(x != 0)
    actsparse_linear(x, weight)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actsparse_linear(x, weight, threshold=0.2)
        spike_linear(bits, weight)
        actsparse_outputs(x, weight, x > 0)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes(dtype: torch.dtype) -> None:
    for m, n, k in ((1, 4096, 4097), (5, 512, 300), (16, 264, 1001), (3, 33, 9), (40, 64, 64)):
        spikes, weight = torch.rand(m, k) < 0.2, torch.randn(k, n).to(dtype)
        bits = pack_spikes(spikes.cuda())
        assert torch.equal(bits.cpu(), pack_spikes(spikes))
        y = spike_linear(bits, weight.cuda()).cpu()
        LinearOracle(spikes.to(dtype), weight).check(y)


def test_gradients() -> None:
    """Torch's products, of what the kernel was given."""
    for m, threshold in ((3, 0.0), (3, 0.4), (20, 0.4)):
        x, weight, bias = ActiveCase(m, 64, 96, "some").operands(torch.float32)
        dy, found = torch.randn(m, 64), []
        for device in ("cpu", "cuda"):
            given = [t.to(device).requires_grad_() for t in (x, weight, bias)]
            y = actsparse_linear(*given, threshold)
            found.append([g.cpu() for g in torch.autograd.grad(y, given, dy.to(device))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_layers() -> None:
    with torch.no_grad():
        linear = torch.nn.Linear(512, 1024)
        x = torch.randn(2, 3, 512).relu()
        layer = ActSparseLinear.from_dense(linear, 0.3)
        want = layer(x)
        torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
        up, down = torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512)
        mlp = SparseMLP(up, down)
        want = mlp(x)
        torch.testing.assert_close(mlp.cuda()(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
