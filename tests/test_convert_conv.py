"""What convert() does to convolutions, and to whole models with a pattern of blocks."""

from __future__ import annotations

import copy
from typing import Any

import gossamer
import pytest
import torch
from convert_models import fix_speedup
from gossamer import _C, Block
from gossamer.conversion.timing import Calls, Given
from gossamer.nn import SparseConv1d, SparseConv2d, SparseLinear
from gossamer.prune import magnitude_24, magnitude_blocks
from torch import Tensor, nn

BLOCKS: dict[str, Any] = {"pattern": Block(8, 4), "prune": "magnitude", "density": 0.4}
PATTERNS = pytest.mark.parametrize(
    "arguments", [BLOCKS, {"pattern": "2:4", "prune": "magnitude"}], ids=["blocks", "2:4"]
)


class Net(nn.Module):
    """A small residual network with a stem, grouped and strided convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", groups=4, padding_mode="reflect")
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.point(torch.relu(self.grouped(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(2, 3, 16, 12)


def pruned_copy(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            weight = module.weight.detach()
            if arguments["pattern"] == "2:4":
                module.weight = nn.Parameter(magnitude_24(weight, dim=1))
            else:
                groups = getattr(module, "groups", 1)
                pruned = magnitude_blocks(weight, Block(8, 4), 0.4, groups)
                module.weight = nn.Parameter(pruned)
    return twin


@PATTERNS
@pytest.mark.parametrize("last", [False, True])
def test_matches_pruned_dense(
    net: Net, sample: Tensor, last: bool, arguments: dict[str, Any]
) -> None:
    if last:
        sample = sample.to(memory_format=torch.channels_last)
    expected = pruned_copy(net, arguments)(sample)
    report = gossamer.convert(net, sample_input=sample, force=True, **arguments)
    assert [layer.name for layer in report.swapped] == ["stem", "grouped", "point", "head"]
    assert isinstance(net.stem, SparseConv2d)
    assert isinstance(net.head, SparseLinear)
    torch.testing.assert_close(net(sample), expected, rtol=1e-5, atol=1e-5)
    assert report["stem"].shape == (16, 3, 3, 3)
    assert report["grouped"].shape == (16, 4, 3, 3)
    assert all(layer.rows == 2 and layer.error_max < 1e-5 for layer in report)
    assert "16x4x3x3 float32 pruned" in str(report)
    for layer in report if arguments is BLOCKS else ():
        assert layer.kernel.split("/")[1] in ("serial", "pixel_lanes", "output_lanes")


def test_names_the_kernel_of_24_convolutions(blocksparse_target: str) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64)).eval()
    report = gossamer.convert(model, pattern="2:4", prune="magnitude", force=True)
    names = [layer.kernel.split("/") for layer in report.swapped]
    if blocksparse_target == "serial":
        assert names == [["serial", "serial"]] * 2
    else:
        own = min(blocksparse_target, "avx512", key=_C.targets_built().index)
        assert names == [[own, "pairs"], ["torch", "dense"]]


@PATTERNS
def test_forced_without_a_sample_and_slower_layers(net: Net, arguments: dict[str, Any]) -> None:
    twin = copy.deepcopy(net)
    report = gossamer.convert(twin, **arguments)
    convs = [layer for layer in report if layer.name != "head"]
    assert not any(layer.swapped for layer in report)
    assert all("no figures for" in layer.reason for layer in convs)
    assert all(layer.pruned for layer in report)
    forced = gossamer.convert(net, force=True, **arguments)
    assert len(forced.swapped) == 4
    assert all("/" in layer.kernel for layer in forced.swapped if layer.name != "head")
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(net(x), twin(x), rtol=1e-5, atol=1e-5)


@PATTERNS
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_prunes_alike_whether_swapped_or_not(
    net: Net,
    sample: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    ratio: float,
) -> None:
    expected = pruned_copy(net, arguments)(sample)
    fix_speedup(monkeypatch, ratio)
    report = gossamer.convert(net, sample_input=sample, **arguments)
    assert {layer.swapped for layer in report} == {ratio > 1}
    assert all(layer.pruned for layer in report)
    torch.testing.assert_close(net(sample), expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_there_need_no_pruning(sample: Tensor) -> None:
    conv = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        conv.weight.copy_(magnitude_blocks(conv.weight, Block(4, 3), 0.25))
    model = nn.Sequential(conv).eval()
    expected = model(sample)
    report = gossamer.convert(model, pattern=Block(4, 3), sample_input=sample, force=True)
    assert report["0"].swapped
    assert not report["0"].pruned
    assert model[0].weight.density == 5 / 18  # 4.5 blocks, rounded
    torch.testing.assert_close(model(sample), expected)


def test_one_dimension_unbatched_and_a_model_that_is_a_layer() -> None:
    conv, x = nn.Conv1d(4, 8, 3).eval(), torch.randn(4, 20)
    report = gossamer.convert(conv, sample_input=x, force=True, **BLOCKS)
    assert isinstance(report.model, SparseConv1d)
    assert report[""].rows == 1
    torch.testing.assert_close(report.model(x), report.model.to_dense()(x))


class Doubled(nn.Conv2d):
    def _conv_forward(self, *operands: Tensor) -> Tensor:
        return 2 * super()._conv_forward(*operands)


class FrozenConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups, self.kernel_size = 4, 4, 1, (3, 3)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


OBSTACLES = {
    "overridden": (lambda: Doubled(4, 4, 3), "Doubled overrides _conv_forward", False),
    "foreign": (FrozenConv2d, r"FrozenConv2d is not a torch.nn.Conv1d", False),
    "hooked": (hooked, "forward hooks", True),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "not initialised", False),
    "double precision": (lambda: nn.Conv2d(4, 4, 3).double(), "float64", True),
    "meta": (lambda: nn.Conv2d(4, 4, 3, device="meta"), "meta", False),
    "sparse already": (lambda: SparseConv2d(4, 4, 3), "already a SparseConv2d", False),
    "normalised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        "parametri",
        False,
    ),
}


@PATTERNS
@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacle_keeps_layer_dense(case: str, arguments: dict[str, Any]) -> None:
    make, reason, pruned = OBSTACLES[case]
    layer = make()
    model = nn.Sequential(layer)
    report = gossamer.convert(model, force=True, **arguments)
    assert model[0] is layer
    assert reason in report["0"].reason
    assert report["0"].pruned == pruned


def test_transposed_convolutions_are_no_candidates() -> None:
    assert len(gossamer.convert(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), **BLOCKS)) == 0


def test_shared_and_tied_weights() -> None:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    shared = nn.Conv2d(4, 4, 3)
    model = nn.ModuleList([first, second, shared, shared])
    report = gossamer.convert(model, force=True, **BLOCKS)
    assert "tied: 0.weight = 1.weight" in report["0"].reason
    assert report["2"].aliases == ("3",)
    assert model[2] is model[3]
    assert isinstance(model[2], SparseConv2d)


MISTAKES = {
    "pattern": (ValueError, "pattern '1:4'", {"pattern": "1:4"}),
    "no density": (ValueError, "no density", {"pattern": Block(4, 4), "prune": "magnitude"}),
    "density alone": (ValueError, r"density 0\.5", {"pattern": Block(4, 4), "density": 0.5}),
    "density of 2:4": (ValueError, r"density 0\.5", {"prune": "magnitude", "density": 0.5}),
    "density": (ValueError, "density 2", {**BLOCKS, "density": 2}),
    "include": (ValueError, "no linear layer", {**BLOCKS, "include": "norm"}),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_change_nothing(net: Net, case: str) -> None:
    error, text, arguments = MISTAKES[case]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=text):
        gossamer.convert(net, force=True, **arguments)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert type(net.stem) is nn.Conv2d


def test_examples_of_calls_are_like_the_calls() -> None:
    calls = Calls(unit_dims=3)
    image = torch.randn(3, 4, 5, 6)
    for x in (image, image, image.to(memory_format=torch.channels_last), image[0], image[:0]):
        calls.record(x)
    calls.record(torch.randn(2, 4, 3, 3))
    shape = (4, 5, 6)
    assert calls.given == {
        Given(3, shape): 2,
        Given(3, shape, True): 1,
        Given(1, shape): 1,
        Given(2, (4, 3, 3)): 1,
    }
    again = calls.example(Given(7, shape, True))
    assert again.shape == (7, *shape)
    assert again.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again[3], image[0])
    for size in range(20):
        calls.record(torch.randn(1, 4, 1, 1 + size))
    assert len(calls.inputs) == 8
