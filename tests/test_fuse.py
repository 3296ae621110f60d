"""fuse_activations: the same answers in fewer passes, and only where nothing else sees them."""

from __future__ import annotations

import copy
import pickle

import gossamer
import pytest
import torch
import torch.nn.functional as F
from gossamer import Block
from gossamer.nn import SparseConv2d, SparseLinear
from torch import Tensor, nn

BLOCK = Block(4, 4)


def conv(pattern: str | Block = BLOCK) -> SparseConv2d:
    density = 0.5 if isinstance(pattern, Block) else None
    return SparseConv2d(8, 8, 3, padding=1, pattern=pattern, density=density)


class Bottleneck(nn.Module):
    """One ReLU for all, as torchvision's; an Identity is what folding leaves of a BatchNorm."""

    note = "a class attribute"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.Identity()
        self.conv2 = conv("2:4")
        self.relu = nn.ReLU(inplace=True)
        self.stride = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.conv2(y)
        y += x
        z: Tensor = self.relu(y)
        return z


def same(model: nn.Module, x: Tensor, *names: tuple[str, str]) -> nn.Module:
    """What is fused, with unchanged answers and state."""
    expected, keys = model(x), list(model.state_dict())
    report = gossamer.fuse_activations(model)
    assert report.fused == names
    assert len(report) == len(names)
    torch.testing.assert_close(report.model(x), expected)
    assert list(report.model.state_dict()) == keys
    return report.model


@pytest.mark.parametrize("pattern", ["2:4", BLOCK], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_activation_behind_every_layer(pattern: str | Block, packed: bool) -> None:
    density = 0.5 if isinstance(pattern, Block) else None
    linear = SparseLinear(8, 8, pattern=pattern, density=density)
    model = nn.Sequential(
        conv(pattern), nn.ReLU(), conv(pattern), nn.SiLU(), conv(pattern), nn.GELU(),
        nn.Flatten(2), linear, nn.ReLU(),
    ).eval()  # fmt: skip
    if packed:
        for layer in (model[0], model[2], model[4], linear):
            layer.pack()
    x = torch.randn(2, 8, 2, 4)
    names = (("0", "relu"), ("2", "silu"), ("4", "gelu"), ("7", "relu"))
    fused = same(model, x, *names)
    assert "3 applies" not in str(fused)
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    assert "activation=gelu" in repr(fused)
    assert len(gossamer.fuse_activations(fused)) == 0


def test_activations_as_functions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(conv() for _ in range(7))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.convs[0](x), inplace=True)
            x = torch.relu(self.convs[1](x))
            x = self.convs[2](x).relu()
            x = F.silu(self.convs[3](x))
            x = F.gelu(self.convs[4](x))
            x = F.gelu(self.convs[5](x), approximate="tanh")
            return torch.tanh(self.convs[6](x))

    names = ("relu", "relu", "relu", "silu", "gelu")
    fused = ((f"convs.{i}", name) for i, name in enumerate(names))
    same(Net().eval(), torch.randn(1, 8, 4, 4), *fused)


def test_gradients_stay() -> None:
    model, x = nn.Sequential(conv(), nn.ReLU()).eval(), torch.randn(2, 8, 4, 4)
    values = model[0].values
    (expected,) = torch.autograd.grad(model(x).square().sum(), values)
    fused = gossamer.fuse_activations(model).model
    (got,) = torch.autograd.grad(fused(x).square().sum(), values)
    torch.testing.assert_close(got, expected)


def test_one_module_called_in_many_places() -> None:
    names = (("conv1", "relu"), ("conv2", "add, relu"))
    fused = same(Bottleneck().eval(), torch.randn(1, 8, 5, 5), *names)
    assert fused.stride == 1
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


def test_parts_of_what_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Bottleneck()
            self.again = self.block
            self.tail = nn.Sequential(conv(), nn.ReLU())

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            x = self.block(x) if skip is None else self.again(x + skip)
            y: Tensor = self.tail(x)
            return y

    model, x = Branching().eval(), torch.randn(1, 8, 5, 5)
    expected = model(x, x)
    names = (("block.conv1", "relu"), ("block.conv2", "add, relu"), ("tail.0", "relu"))
    fused = same(model, x, *names)
    assert fused is model
    assert fused.block is fused.again
    torch.testing.assert_close(fused(x, x), expected)


def test_residuals_wherever_they_come_from() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Bottleneck(), Bottleneck())
            self.convs = nn.ModuleList(conv() for _ in range(6))
            self.norm = nn.Identity()
            self.bias = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(x)
            x = F.silu(torch.add(self.norm(self.convs[0](x)), self.convs[1](x)))
            x = F.gelu(x + self.convs[2](x))
            x = F.relu(self.convs[3](x) + self.bias)
            x = F.relu(x.mean((2, 3), keepdim=True) + self.convs[4](x))  # torch broadcasts it
            y = self.convs[5](x)
            x.mul_(2)  # conv 5 sees what was before
            return F.relu(x + y)

    names = [(f"blocks.{i}.{name}", act) for i in range(2) for name, act in
             (("conv1", "relu"), ("conv2", "add, relu"))]  # fmt: skip
    names += [("convs.0", "add, silu"), ("convs.2", "add, gelu"), ("convs.4", "add, relu")]
    model, x = Net().eval(), torch.randn(2, 8, 5, 5)
    fused = same(model, x, *names)
    expected = fused(x).detach()
    with torch.no_grad():  # what adds is the kernel
        torch.testing.assert_close(fused(x), expected)


class Added(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.conv1(x)) + x)


def test_a_wider_residual_is_added_as_torch_does() -> None:
    model, x = Added().eval(), torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        fused = gossamer.fuse_activations(model).model
        assert fused(x).dtype == expected.dtype == torch.float32
        assert torch.equal(fused(x), expected)


class Doubled(SparseConv2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(2 * x)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Overwritten(Bottleneck):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()  # nobody looks into it

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(x)
        return F.relu(y + self.scale(x))


def overridden() -> nn.Module:
    return nn.Sequential(Doubled(8, 8, 3, pattern="2:4"), nn.ReLU())


class UsedTwice(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.relu(self.conv2(y) * 2) + F.relu(y)


class CalledTwice(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x)) + self.conv1(2 * x) + self.conv2(x)


def hooked() -> nn.Module:
    model = nn.Sequential(conv(), nn.ReLU())
    model[0].register_forward_hook(lambda *args: None)
    return model


def hooked_activation() -> nn.Module:
    model = nn.Sequential(conv(), nn.ReLU())
    model[1].register_forward_hook(lambda *args: None)
    return model


def shared() -> nn.Module:
    layer = conv()
    return nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Sigmoid()))


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())


WHAT_STAYS = [UsedTwice, CalledTwice, Overwritten, overridden, hooked, hooked_activation, shared]


@pytest.mark.parametrize("make", [*WHAT_STAYS, dense])
def test_what_stays(make: type[nn.Module]) -> None:
    model = make().eval()
    x = torch.randn(1, 8, 5, 5)
    assert gossamer.fuse_activations(model).model is model
    model(x)


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"Tensor, expected an nn.Module"):
        gossamer.fuse_activations(torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        gossamer.fuse_activations(nn.Sequential(conv(), nn.ReLU()))
    layer = conv()
    layer.activation = "relu"
    with pytest.raises(ValueError, match="to_dense: the layer applies 'relu'"):
        layer.to_dense()
    layer.activation = "tanh"
    with pytest.raises(ValueError, match="activation 'tanh', expected None"):
        layer(torch.randn(1, 8, 4, 4))


class Centred(nn.Module):
    """With a buffer and a Parameter of its own, which moves and loads replace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = SparseLinear(8, 8), nn.SiLU()
        self.register_buffer("mean", torch.randn(8))
        self.factor = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.linear(x - self.mean)) * self.factor
        return y


def test_what_was_given_still_does_the_same() -> None:
    body = nn.Sequential(SparseLinear(8, 8), nn.SiLU())
    for given in (Centred(), body):
        given.eval()
        x, keys = torch.randn(3, 8), list(given.state_dict())
        expected = given(x)
        made = gossamer.fuse_activations(given).model
        assert made is not given
        copied, pickled = copy.deepcopy(given), pickle.loads(pickle.dumps(given))
        exported = torch.export.export(given, (x,)).module()
        compiled = torch.compile(given, backend="eager", fullgraph=True)
        for model in (given, made, copied, pickled, exported, compiled, given.train()):
            torch.testing.assert_close(model(x), expected)
            assert list(copied.state_dict()) == keys
        torch.testing.assert_close(copied.double()(x.double()), expected.double())
        zeros = {
            key: torch.zeros_like(t) if t.is_floating_point() else t
            for key, t in copied.state_dict().items()
        }
        copied.load_state_dict(zeros, assign=True)
        assert not copied(x.double()).any()
        assert torch.equal(given(x), made(x))  # copies are of their own
        given.eval()
        assert len(gossamer.fuse_activations(given)) == 0
        assert torch.equal(given(x), made(x))


def test_a_part_that_was_replaced_still_does_the_same() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(), nn.SiLU())

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            y: Tensor = self.body(x) * times
            return y

    model, x = Repeated().eval(), torch.randn(2, 8, 5, 5)
    body, expected = model.body, model(x)
    same(model, x, ("body.0", "silu"))
    assert body is not model.body
    torch.testing.assert_close(body(x), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", BLOCK], ids=str)
def test_traced_with_a_residual(pattern: str | Block, packed: bool) -> None:
    layer = conv(pattern).eval()
    dense = layer.to_dense().double()
    if packed:
        layer.pack()
    layer.activation = "silu"
    x, residual = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    traced = torch.fx.symbolic_trace(layer)
    expected = F.silu(dense(x.double()) + residual)
    torch.testing.assert_close(traced(x, residual), expected.float())
    torch.testing.assert_close(traced(x, residual[:1, :, :1]), layer(x, residual[:1, :, :1]))
    torch.testing.assert_close(traced(x), F.silu(dense(x.double())).float())


def test_what_was_fused_is_traced_and_fused_again() -> None:
    model, x = nn.Sequential(Bottleneck(), Bottleneck()).eval(), torch.randn(2, 8, 5, 5)
    expected = model(x)
    fused = gossamer.fuse_activations(model).model
    traced = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(traced(x), expected)
    for again in (same(fused, x), same(traced, x)):
        torch.testing.assert_close(again(x), expected)
