"""What only a GPU can show: streams, graphs, devices. That results are right, the tests of each
operation show there with the target "cuda"."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import gossamer
import pytest
import torch
from cases import Oracle, dense_24, sparse_24
from gossamer import sparse24_linear
from gossamer.formats import Sparse24, Sparse24Panels
from gossamer.nn import SparseLinear
from gossamer.ops import cuda_workspace
from torch import Tensor, nn

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One shape a kernel: decode alone and with several blocks a tile, and prefill.
SHAPES = ((1, 300, 520), (8, 64, 8200), (40, 300, 2060), (300, 200, 516))


def packed(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Sparse24, Sparse24Panels]:
    weight = sparse_24(n, k, dtype).to("cuda")
    return weight, Sparse24Panels.from_sparse24(weight)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (130, 1030), (4096, 4097)], ids=str)
def test_layouts_are_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = dense_24(*shape, dtype)
    cpu, gpu = Sparse24.from_dense(dense), Sparse24.from_dense(dense.cuda())
    assert torch.equal(gpu.values.cpu(), cpu.values)
    assert torch.equal(gpu.indices.cpu(), cpu.indices)
    assert torch.equal(gpu.validate().to_dense().cpu(), dense.where(dense != 0, 0))
    if dtype != torch.float64:
        back = Sparse24Panels.from_sparse24(gpu).to_sparse24()
        assert torch.equal(back.values, gpu.values)
        assert torch.equal(back.indices, gpu.indices)


def test_bad_weights_are_reported_as_on_the_cpu() -> None:
    dense = dense_24(40, 64)
    dense[7, 8:12] = 1.0
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="not 2:4") as error:
            Sparse24.from_dense(dense.to(device))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    weight = sparse_24(20, 64)
    weight.indices[3, 2] = 0xFF
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=r"row 3, group 4 \(byte 255\)"):
            Sparse24(weight.values.to(device), weight.indices.to(device), (20, 64)).validate()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 33, 64, 65, 128, 257, 1000])
def test_any_number_of_rows(m: int, dtype: torch.dtype) -> None:
    weight, panels = packed(272, 1028, dtype)
    x, bias = randn(m, 1028, dtype=dtype), randn(272, dtype=dtype)
    oracle = Oracle(x, weight, bias, "gelu")
    for layout in (weight, panels):
        oracle.check(sparse24_linear(x, layout, bias, "gelu"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_are_bitwise_equal(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    _, panels = packed(n, k)
    x = randn(m, k)
    first = sparse24_linear(x, panels)
    for _ in range(20):
        assert torch.equal(sparse24_linear(x, panels), first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_thread_may_begin_with_it(shape: tuple[int, int, int]) -> None:
    # The driver, which describes tensors to Hopper's copies, knows no device in a thread until the
    # runtime has bound one.
    m, n, k = shape
    _, panels = packed(n, k)
    x = randn(m, k)
    expected = sparse24_linear(x, panels)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as fresh:
        result = fresh.submit(sparse24_linear, x, panels).result()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_do_not_share_a_workspace(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    _, panels = packed(n, k)
    inputs = [randn(m, k) for _ in range(4)]
    expected = [sparse24_linear(x, panels) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(10):
        for x, stream, mine in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                mine.append(sparse24_linear(x, panels))
    torch.cuda.synchronize()
    for mine, y in zip(results, expected, strict=True):
        assert all(torch.equal(result, y) for result in mine)
    for counters in cuda_workspace._counters.values():
        assert not counters.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graph_replays_beside_eager_calls(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    weight, panels = packed(n, k)
    x = randn(m, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_linear(x, panels)
        z = sparse24_linear(x, weight)
    side = torch.cuda.Stream()
    for _ in range(5):
        x.copy_(randn(m, k))
        expected = sparse24_linear(x, panels)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.replay()
        again = sparse24_linear(x, panels)
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert torch.equal(z, expected)
        assert torch.equal(again, expected)


def test_first_call_of_all_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are then allocated by another thread while this one captures."""
    m, n, k = 8, 64, 8200
    _, panels = packed(n, k)
    x = randn(m, k)
    expected = sparse24_linear(x, panels)
    monkeypatch.setattr(cuda_workspace, "_counters", {})
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_linear(x, panels)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.filterwarnings("ignore")
def test_graphs_of_torch_compile() -> None:
    """They reuse what is allocated while they warm up, unless it is returned."""
    sizes = ((8192, 64), (64, 8192), (8192, 64))  # of long rows several blocks share a tile
    layers = nn.Sequential(*(SparseLinear(k, n) for k, n in sizes))
    layers = layers.to("cuda", torch.bfloat16).eval()
    for layer in layers:
        layer.pack()
    compiled = torch.compile(layers, mode="reduce-overhead")
    with torch.no_grad():
        for rows in (1, 1, 1, 8, 8, 8, 1, 8, 1):
            x = randn(rows, 8192)
            assert torch.equal(compiled(x), layers(x)), rows


def test_threads_do_not_lower_each_others_shared_memory() -> None:
    """One kernel, with more and with less of it."""
    _, panels = packed(300, 4096)
    inputs = [randn(m, 4096) for m in (33, 64)]
    expected = [sparse24_linear(x, panels) for x in inputs]
    torch.cuda.synchronize()

    def run(which: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            same = [torch.equal(sparse24_linear(inputs[which], panels), expected[which])]
            for _ in range(300):
                y = sparse24_linear(inputs[which], panels)
            return all(same) and torch.equal(y, expected[which])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, (0, 1, 0, 1)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_layer_on_another_than_the_current_gpu() -> None:
    weight = sparse_24(300, 8200, torch.bfloat16).to("cuda:1")
    x = torch.randn(8, 8200, device="cuda:1").bfloat16()
    Oracle(x, weight).check(sparse24_linear(x, Sparse24Panels.from_sparse24(weight)))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("columns", [1, 5, 257, 1025])
def test_rows_that_do_not_begin_at_16_bytes(columns: int) -> None:
    weight, panels = packed(40, columns)
    wide = randn(9, columns + 3)
    for x in (wide[:, 1 : columns + 1], wide[:, :columns], wide.t()[:columns].t()):
        Oracle(x, weight).check(sparse24_linear(x, panels))


def test_gradient_is_that_of_the_dense_layer() -> None:
    dense = nn.Linear(260, 130, device="cuda")
    layer = SparseLinear.from_dense(dense, prune="magnitude")
    twin = layer.to_dense()
    x = randn(50, 260, dtype=torch.float32).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    dy = randn(50, 130, dtype=torch.float32)
    layer(x).backward(dy)
    twin(x_twin).backward(dy)
    assert x.grad is not None
    assert x_twin.grad is not None
    torch.testing.assert_close(x.grad, x_twin.grad)
    assert layer.values is not None
    assert layer.values.grad is not None
    kept = Sparse24(layer.values.grad, layer.weight.indices, layer.weight.shape)  # type: ignore[union-attr]
    mask = layer.weight.to_dense() != 0
    assert twin.weight.grad is not None
    torch.testing.assert_close(kept.to_dense() * mask, twin.weight.grad * mask)


def test_moves_between_cpu_and_gpu() -> None:
    layer = SparseLinear(300, 70, dtype=torch.bfloat16).eval()
    x = torch.randn(5, 300).bfloat16()
    expected = layer(x)
    portable = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for packed_first in (False, True):
        moved = copy.deepcopy(layer)
        if packed_first:
            moved.pack()
        moved.cuda()
        assert moved.packed == packed_first
        torch.testing.assert_close(moved(x.cuda()).cpu(), expected, atol=2e-2, rtol=2e-2)
        for key, tensor in moved.state_dict().items():
            assert torch.equal(tensor.cpu(), portable[key]), key
        moved.cpu()
        assert torch.equal(moved(x), layer.pack()(x) if packed_first else expected)
        layer.unpack()


def test_compile_and_autocast() -> None:
    layer = SparseLinear(256, 128, device="cuda").eval()
    x = randn(33, 256, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, compiled)


def test_mistakes_are_named() -> None:
    weight, panels = packed(40, 64)
    x = randn(3, 64)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_linear(x.cpu(), panels)
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        sparse24_linear(x, weight, torch.zeros(40, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float64"):
        sparse24_linear(x.double(), sparse_24(40, 64, torch.float64).to("cuda"))
    with pytest.raises(ValueError, match="65 features"):
        sparse24_linear(randn(3, 65), panels)
    assert torch.equal(sparse24_linear(x, panels), sparse24_linear(x, weight))


def test_empty_batch() -> None:
    _, panels = packed(40, 64)
    assert sparse24_linear(randn(0, 64), panels).shape == (0, 40)
    assert sparse24_linear(randn(2, 0, 64), panels).shape == (2, 0, 40)


def test_convert_measures_on_the_gpu() -> None:
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)).cuda().bfloat16()
    x = randn(16, 512)
    report = gossamer.convert(model, prune="magnitude", sample_input=x, force=True)
    assert all(layer.speedup is not None and layer.speedup > 0 for layer in report.layers)
    assert all("sm_" in (layer.kernel or "") for layer in report.layers)
    assert model(x).isfinite().all()
    print(report)


def test_info_names_the_kernels_of_the_gpu() -> None:
    page = str(gossamer.info())
    assert "sparse24_linear on cuda:" in page
    assert torch.cuda.get_device_name() in page
