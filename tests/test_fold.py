"""fold_batchnorm: the same answers with fewer layers, and only where nothing else sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import gossamer
import pytest
import torch
from gossamer import Block
from gossamer.nn import SparseConv2d
from torch import Tensor, nn


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: float = 1.0, skip: Tensor | None = None) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return scale * y + (x if skip is None else skip)


PAIRS = {
    "linear": (lambda: [nn.Linear(5, 7), nn.BatchNorm1d(7)], (3, 5)),
    "linear without bias": (lambda: [nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)], (3, 5)),
    "1-d": (lambda: [nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, 4, 8)),
    "2-d": (lambda: [nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)], (2, 4, 8, 7)),
    "3-d": (lambda: [nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6)], (2, 2, 4, 3, 3)),
    "not affine": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], (2, 4, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_answers_stay(case: str, dtype: torch.dtype) -> None:
    make, shape = PAIRS[case]
    model = randomise(nn.Sequential(*make(), nn.ReLU())).to(dtype)
    x = torch.randn(shape).to(dtype)
    expected, weight = model(x), model[0].weight
    report = gossamer.fold_batchnorm(model)
    assert report.folded == (("0", "1"),)
    assert (len(report), report.left) == (1, {})
    assert isinstance(model[1], nn.Identity)
    assert model[0].weight is weight
    assert model[0].bias.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert len(gossamer.fold_batchnorm(model)) == 0


def test_whole_model_and_its_report() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm2d(4), Residual(), nn.Conv2d(4, 4, 1)))
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    report = gossamer.fold_batchnorm(model)
    assert report.folded == (("1.conv1", "1.norm1"), ("1.conv2", "1.norm2"))
    assert "was found" in report.left["0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    text = str(report)
    for word in ("1.norm1 folded into 1.conv1", "0 stays: no linear", "2 of 3 BatchNorm"):
        assert word in text


def test_parts_of_what_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual()
            self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.shared = self.tail

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = self.block(x)
            return self.shared(self.tail(x))

    model = randomise(Branching())
    x = torch.rand(1, 4, 5, 5)
    expected = model(x), model(-x)
    report = gossamer.fold_batchnorm(model)
    # Inside each of the parts everything is known: they are called as a whole, however often.
    assert len(report) == 3
    torch.testing.assert_close((model(x), model(-x)), expected, rtol=1e-5, atol=1e-5)


class UsedTwice(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.norm1(self.conv1(x)))
        return self.norm2(y) + y


class CalledTwice(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x)) + self.norm1(self.conv1(2 * x))


class ReadDirectly(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return y * self.conv2.weight.sum()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].bias = model[0].bias
    return model


def parametrised() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def held_twice_and_untraceable() -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.conv = self.part[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + self.conv(x) if x.sum() > 0 else x

    return Odd()


LEFT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "used twice": (UsedTwice, "norm2", "conv2 is used 2 times"),
    "called twice": (CalledTwice, "norm1", "called 2 times"),
    "read directly": (ReadDirectly, "norm2", "conv2 are read directly"),
    "hooked": (hooked, "1", "has forward hooks"),
    "tied": (tied, "1", "bias is tied: 0.bias = 2.bias"),
    "parametrised": (parametrised, "1", "parametrised"),
    "held twice": (held_twice_and_untraceable, "part.1", "held in several places"),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        "1",
        "no running statistics",
    ),
    "another rank": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm2d(4)),
        "1",
        "BatchNorm2d after a Conv1d",
    ),
    "other channels": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)),
        "1",
        "3 channels",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
        "1",
        "was found",
    ),
    "sparse": (
        lambda: nn.Sequential(SparseConv2d(4, 4, 1), nn.BatchNorm2d(4)),
        "1",
        "already a SparseConv2d",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_stays_where_it_would_change_an_answer(case: str) -> None:
    make, norm, reason = LEFT[case]
    model = randomise(make())
    before = copy.deepcopy(model.state_dict())
    module = model.get_submodule(norm)
    report = gossamer.fold_batchnorm(model)
    assert reason in report.left[norm]
    assert model.get_submodule(norm) is module
    if len(report) == 0:
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_training_mode_is_refused() -> None:
    model = randomise(Residual())
    model.norm2.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1 of 2 .*'norm2'.*eval\(\)"):
        gossamer.fold_batchnorm(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TypeError, match="Tensor"):
        gossamer.fold_batchnorm(torch.ones(3))  # type: ignore[arg-type]


def test_then_convert() -> None:
    model = randomise(Residual())
    x = torch.randn(2, 4, 6, 6)
    gossamer.fold_batchnorm(model)
    arguments = {"pattern": Block(4, 4), "prune": "magnitude", "density": 0.5}
    gossamer.convert(model, force=True, **arguments)
    assert isinstance(model.conv1, SparseConv2d)
    twin = copy.deepcopy(model)
    twin.conv1, twin.conv2 = model.conv1.to_dense(), model.conv2.to_dense()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
