"""Convolutions of some output positions: equal to the masked dense one, and the scheduler."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gossamer.nn import PositionMaskedConv2d, PositionMaskScheduler
from gossamer.ops import masked_conv
from gossamer.ops.gathered_conv import most_gathered
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

CONVS = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (1, 4), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
)


@pytest.mark.parametrize("kept", [0.0, 0.15, 0.3, 0.8, 1.0])
def test_is_the_masked_dense_convolution(kept: float) -> None:
    for options in CONVS:
        dense = nn.Conv2d(17, 7, **options)  # type: ignore[arg-type]
        layer = PositionMaskedConv2d.from_dense(dense)
        x = torch.randn(3, 17, 14, 11)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        assert torch.equal(layer(x), dense(x))
        assert layer.out_size is not None
        mask = (
            torch.rand(layer.out_size) < kept
            if 0 < kept < 1
            else torch.full(layer.out_size, kept > 0)
        )
        layer.set_mask(mask)

        def masked(x: Tensor, dense: nn.Conv2d = dense, mask: Tensor = mask) -> Tensor:
            return dense(x).masked_fill(~mask, 0)

        operands = [x, *dense.parameters()]
        y, wanted = layer(x), masked(x)
        torch.testing.assert_close(y, wanted)
        dy = torch.randn_like(wanted)
        torch.testing.assert_close(
            torch.autograd.grad(y, operands, dy, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(wanted, operands, dy),
            rtol=1e-4,
            atol=1e-4,
        )


def test_16_bits_where_torch_would_read_beside_x() -> None:
    dense = nn.Conv2d(15, 15, (5, 5), (1, 2), 1).bfloat16()
    layer = PositionMaskedConv2d.from_dense(dense)
    x = torch.randn(2, 15, 8, 3).bfloat16()
    layer.set_mask(torch.ones(6, 1, dtype=torch.bool))
    exact = nn.functional.conv2d(x.float(), dense.weight.float(), dense.bias.float(), (1, 2), 1)
    for _ in range(5):
        y = layer(x)
        torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
        (dw,) = torch.autograd.grad(y.sum(), layer.weight)
        assert dw.abs().max() < 100


def test_part_of_a_checkpoint_leaves_the_mask() -> None:
    layer = PositionMaskedConv2d(4, 4, 3)
    layer.set_mask(torch.ones(2, 2, dtype=torch.bool))
    layer.load_state_dict({"bias": torch.zeros(4)}, strict=False)
    assert layer.mask is not None


def test_what_is_no_number_stays_out_of_masked_positions() -> None:
    layer = PositionMaskedConv2d(16, 3, 3, padding=1)
    x = torch.randn(1, 16, 6, 6)
    x[0, 0, 0, 0] = float("nan")
    for kept in (4, 30):  # gathered, and dense
        mask = torch.ones(36, dtype=torch.bool)
        mask[: 36 - kept] = False
        mask[:2] = False
        mask[6:8] = False
        layer.set_mask(mask.view(6, 6))
        assert layer(x).isfinite().all()


def test_what_is_kept_follows_its_tensors() -> None:
    layer = PositionMaskedConv2d(16, 5, 3, padding=1, bias=False).requires_grad_(False)
    layer(torch.randn(1, 16, 9, 9))

    def check(layer: PositionMaskedConv2d, batch: int = 2, size: int = 9) -> None:
        x = torch.randn(batch, 16, size, size).to(layer.weight.dtype)
        mask = layer.mask
        assert mask is not None
        wanted = nn.functional.conv2d(x, layer.weight, padding=1).masked_fill(~mask, 0)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-2, atol=1e-2)
        assert 0 < int(mask.sum()) < 0.5 * mask.numel()

    mask = torch.rand(9, 9) < 0.3
    layer.set_mask(mask)
    for batch in (2, 3, 0, 2):
        check(layer, batch)
    assert layer.mask is not None
    layer.mask[:4] = False  # in place
    check(layer)
    layer.weight.mul_(2)
    check(layer)
    layer.weight = nn.Parameter(torch.randn(5, 16, 3, 3), requires_grad=False)
    check(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.mask.bitwise_xor_(twin.mask.flip(0))
        twin.weight.neg_()
        check(twin)
    check(layer)
    check(layer.half())
    check(layer.float())
    layer.set_mask(torch.rand(5, 5) < 0.4)
    check(layer, size=5)
    with torch.inference_mode():
        layer.set_mask(torch.rand(5, 5) < 0.4)
        check(layer, size=5)
    check(layer, size=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 16, 5, 5)).dtype == torch.bfloat16


def test_where_positions_are_computed_alone() -> None:
    def most(*, dtype: torch.dtype = torch.float32, **given: Any) -> float:
        usual = {"channels": 64, "taps": 9, "positions": 3136, "channels_last": True}
        return most_gathered(dtype, **{**usual, "target": "avx512"} | given)

    bfloat16 = torch.bfloat16
    assert most() == most(channels_last=False) == most(taps=1) == 0.5
    assert most(dtype=bfloat16) < most(dtype=bfloat16, channels_last=False) < 0.5
    assert most(dtype=bfloat16, positions=196) == most(dtype=bfloat16, channels=3) == 0
    assert most(taps=1, channels_last=False) == most(target="serial") == 0
    assert most(dtype=torch.float64) == 0
    assert 0 < most(channels=3) < 0.2
    assert most(target="cuda") == 0.35


def test_state_dict_has_the_mask() -> None:
    layer, twin = PositionMaskedConv2d(2, 3, 3), PositionMaskedConv2d(2, 3, 3)
    layer.set_mask(torch.rand(4, 4) < 0.3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict(nn.Conv2d(2, 3, 3).state_dict())
    assert twin.mask is None


def test_scheduler() -> None:
    model = nn.Sequential(
        PositionMaskedConv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        PositionMaskedConv2d(4, 4, 3, padding=1),
    )
    x = torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match="run once"):
        PositionMaskScheduler(model, (16, 16), 100)
    model(x)
    scheduler = PositionMaskScheduler(model, (16, 16), 100, sparsity=0.5, frequency=2)
    assert scheduler.sparsity_at(10) == 0
    assert scheduler.sparsity_at(50) == pytest.approx(0.375)
    assert scheduler.sparsity_at(95) == 0.5
    for step in range(1, 101):
        scheduler.step()
        for layer in (model[0], model[3]):
            if step <= 10 or (step % 2 and step < 90):
                assert layer.mask is None
            else:
                wanted = round(scheduler.sparsity_at(step) * layer.mask.numel())
                assert int((~layer.mask).sum()) == wanted
    # Scores are aligned: what the coarse layer masks has a smaller score in the fine one.
    coarse = model[3].mask.float()[None, None]
    fine = torch.nn.functional.interpolate(coarse, scale_factor=2)[0, 0] > 0
    assert float(model[0].mask[fine].float().mean()) > float(model[0].mask[~fine].float().mean())
    assert model(x).shape == (1, 4, 8, 8)


def test_mistakes() -> None:
    layer = PositionMaskedConv2d(2, 3, 3)
    with pytest.raises(TypeError, match="float32"):
        layer.set_mask(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"\[4\]"):
        layer.set_mask(torch.ones(4, dtype=torch.bool))
    layer.set_mask(torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \[4, 4\], the output \[5, 4\]"):
        layer(torch.randn(1, 2, 7, 6))
    with pytest.raises(ValueError, match="groups are 2"):
        PositionMaskedConv2d(2, 2, 3, groups=2)
    with pytest.raises(ValueError, match="frequency 0"):
        PositionMaskScheduler(layer, (4, 4), 10, frequency=0)


def test_what_is_kept_follows_writes_that_make_no_version() -> None:
    layer = PositionMaskedConv2d(16, 8, 3, padding=1)
    x = torch.randn(2, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    layer.set_mask(torch.rand(20, 20) < 0.1)

    def check() -> None:
        dense = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), dense.masked_fill(~layer.mask, 0))

    with torch.no_grad():
        for _ in range(2):
            check()
            layer.weight.data.mul_(2)
            check()
            layer.weight.data = layer.weight.data * 1.5
            check()
            layer.mask.data[:3] ^= True
            check()


def test_inference_first_and_training_second() -> None:
    layer = PositionMaskedConv2d(16, 8, 3, padding=1)
    layer.set_mask(torch.rand(20, 20) < 0.1)
    x = torch.randn(2, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_functional_transforms_are_those_of_the_dense_convolution() -> None:
    layer = PositionMaskedConv2d(16, 8, 3, padding=1)
    layer.set_mask(torch.rand(20, 20) < 0.1)
    x, weights = torch.randn(2, 16, 20, 20), torch.randn(3, 8, 16, 3, 3)
    call = lambda w: torch.func.functional_call(layer, {"weight": w}, x)  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(weights), torch.stack([call(w) for w in weights]))
    with torch.no_grad():
        _, moved = torch.func.jvp(call, (weights[0],), (weights[1],))
        at = call(weights[1]) - layer.bias.detach().view(-1, 1, 1) * layer.mask
    torch.testing.assert_close(moved, at, rtol=1e-4, atol=1e-4)


def test_a_graph_holds_it_whole() -> None:
    dense = nn.Conv2d(16, 8, 3, padding=1, stride=(2, 1))
    layer = PositionMaskedConv2d.from_dense(dense)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(call: Callable[[Tensor], Tensor], images: int) -> None:
        x = torch.randn(images, 16, 20, 22, requires_grad=True)
        y, wanted = call(x), dense(x)
        if layer.mask is not None:
            wanted = wanted.masked_fill(~layer.mask, 0)
        torch.testing.assert_close(y, wanted)
        operands, dy = [x, *dense.parameters()], torch.randn_like(wanted)
        found, expected = (torch.autograd.grad(t, operands, dy) for t in (y, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    check(compiled, 2)
    if torch.__version__ >= "2.13":  # in 2.9 a graph takes itself for an export's
        assert layer.out_size == (10, 22)
    for kept in (0.1, 0.9, 0.3):  # masks of one size share the graph
        layer.set_mask(torch.rand(10, 22) < kept)
        check(compiled, 2)
        check(compiled, 3)
    assert layer.mask is not None
    layer.mask[:4] = False
    check(compiled, 2)
    with torch.no_grad():
        dense.weight.mul_(2)
    check(compiled, 3)
    x = torch.randn(2, 16, 20, 22)
    check(torch.export.export(layer, (x,)).module(), 2)
    check(layer, 2)  # to which an export does nothing
    steps = ([2, 1], [1, 1], [1, 1])
    operands = (x.requires_grad_(), dense.weight, dense.bias, layer.mask, *steps)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gossamer.masked_conv.default, operands, test_utils=checks)
    gradients = (torch.randn(2, 8, 10, 22), x, dense.weight, layer.mask, *steps, [True] * 3)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.ops.gossamer.masked_conv_gradients(*gradients)
    gradients = tuple(t.detach() if isinstance(t, Tensor) else t for t in gradients)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gossamer.masked_conv_gradients.default, gradients, test_utils=checks
    )


def test_what_a_graph_keeps_ends_with_its_mask() -> None:
    layer = PositionMaskedConv2d(16, 8, 3, padding=1)
    layer.set_mask(torch.rand(20, 20) < 0.1)
    assert layer.mask is not None
    before = len(masked_conv._positions)
    steps = ([1, 1], [1, 1], [1, 1])
    for _ in range(2):
        torch.ops.gossamer.masked_conv(
            torch.randn(1, 16, 20, 20), layer.weight, layer.bias, layer.mask, *steps
        )
    assert len(masked_conv._positions) == before + 1
    layer.set_mask(None)
    assert len(masked_conv._positions) == before


def test_neither_meta_nor_fake_tensors_leave_a_trace() -> None:
    layer = PositionMaskedConv2d(5, 3, 3, padding=1)
    layer.set_mask(torch.rand(8, 7) < 0.2)
    x = torch.randn(2, 5, 8, 7)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (2, 3, 8, 7)
    exact = copy.deepcopy(layer).double()
    expected = exact._conv_forward(x.double(), exact.weight, exact.bias).masked_fill(~layer.mask, 0)
    torch.testing.assert_close(layer(x), expected.float())
    given = x.to("meta").requires_grad_()
    y = layer.to("meta")(given)
    y.sum().backward()
    assert y.shape == (2, 3, 8, 7)
    assert given.grad.shape == given.shape
    assert layer.weight.grad.shape == layer.weight.shape


def test_a_mask_of_none_is_no_entry() -> None:
    layer = PositionMaskedConv2d(2, 3, 3)
    layer.set_mask(torch.rand(4, 4) < 0.5)
    before = copy.deepcopy(layer.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"the mask is NoneType, expected torch\.bool"):
            layer.load_state_dict(
                {**PositionMaskedConv2d(2, 3, 3).state_dict(), "mask": None}, strict
            )
        for key, held in layer.state_dict().items():
            assert torch.equal(held, before[key])
