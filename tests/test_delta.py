"""Layers over time: equal to the dense ones but for what the threshold leaves out."""

from __future__ import annotations

import copy

import pytest
import torch
from gossamer.nn import DeltaConv2d, DeltaLinear, delta
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def steps(count: int, *shape: int) -> Tensor:
    """A walk in which most entries stay where they are."""
    moves = torch.randn(count, *shape) * (torch.rand(count, *shape) < 0.2)
    return moves.cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_without_threshold_is_dense(dtype: torch.dtype) -> None:
    dense = nn.Linear(37, 21).to(dtype)
    layer = DeltaLinear.from_dense(dense)
    exact = copy.deepcopy(dense).double()
    with torch.no_grad():
        for x in steps(200, 3, 2, 37).to(dtype):
            y = layer(x)
            assert y.dtype == dtype
            # bfloat16: what rounding takes from a change is part of the next one.
            tolerance = (
                1e-3 if dtype == torch.float32 else 0.15 if dtype == torch.bfloat16 else 1e-9
            )
            torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.01, atol=tolerance)


def test_linear_is_that_of_an_input_within_the_threshold() -> None:
    dense = nn.Linear(40, 10, bias=False)
    layer = DeltaLinear.from_dense(dense, threshold=0.3)
    walk = torch.randn(100, 4, 40).mul(0.05).cumsum(0)
    with torch.no_grad():
        for x in walk:
            y, seen = layer(x), layer.streams.seen
            assert seen is not None
            assert float((seen - x).abs().max()) <= 0.3 + 1e-6
            torch.testing.assert_close(y, dense(seen), rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen, x)


@pytest.fixture
def _changes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """For layers too small to gain by it."""
    monkeypatch.setattr(delta, "changes_pay", lambda *_: True)


@pytest.mark.usefixtures("_changes_pay")
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_without_threshold_is_dense(stride: int) -> None:
    dense = nn.Conv2d(16, 8, 3, stride, padding=1, dilation=stride)
    layer = DeltaConv2d.from_dense(dense)
    x = torch.randn(2, 16, 20, 17)
    with torch.no_grad():
        for step in range(12):
            x = x.clone()
            if step == 5:
                x += 1  # more changes than are gathered
            elif step != 7:
                x[step % 2, :, step : step + 4, 2:5] += torch.randn(16, 4, 3)
            if step == 3:
                x = x.contiguous(memory_format=torch.channels_last)
            # Tensors of inference mode are not for others to write to.
            with torch.inference_mode() if step in (0, 4, 9) else torch.no_grad():
                y = layer(x)
            torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)


def test_conv_is_that_of_an_input_within_the_threshold() -> None:
    dense = nn.Conv2d(4, 6, (1, 3), padding=(0, 1), bias=False)
    layer = DeltaConv2d.from_dense(dense, threshold=0.2)
    with torch.no_grad():
        for x in torch.randn(60, 1, 4, 9, 8).mul(0.05).cumsum(0):
            y, seen = layer(x), layer.streams.seen
            assert seen is not None
            assert float((seen - x).abs().max()) <= 0.2 + 1e-6
            torch.testing.assert_close(y, dense(seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_reset_and_refresh(conv: bool) -> None:
    dense = nn.Conv2d(2, 3, 3) if conv else nn.Linear(6, 3)
    shape = (3, 2, 5, 6) if conv else (3, 6)
    make = DeltaConv2d.from_dense if conv else DeltaLinear.from_dense
    layer = make(dense, threshold=100.0, refresh_every=4)
    walk = torch.randn(9, *shape)
    with torch.no_grad():
        for t, x in enumerate(walk):  # the threshold lets nothing pass between two refreshes
            torch.testing.assert_close(layer(x), dense(walk[t - t % 4]))
        layer.reset()
        torch.testing.assert_close(layer(walk[3]), dense(walk[3]))
        layer.reset([1])
        y = layer(walk[5])
        torch.testing.assert_close(y[0], dense(walk[3])[0])
        torch.testing.assert_close(y[1], dense(torch.zeros(shape))[1])
        with pytest.raises(ValueError, match=r"reset\(\)"):
            layer(walk[0][:2])
        layer.reset()
        assert layer(walk[0][:2]).shape[0] == 2
    assert layer.state_dict().keys() - {"_extra_state"} <= {"weight", "weight_kn", "bias"}
    with pytest.raises(RuntimeError, match="no_grad"):
        layer(walk[0])
    with pytest.raises(ValueError, match="refresh_every is 0"):
        make(dense, refresh_every=0)
    with pytest.raises(ValueError, match=r"Delta.*: threshold is -1"):
        make(dense, threshold=-1)


def test_conv_mistakes() -> None:
    with pytest.raises(ValueError, match="groups are 2"):
        DeltaConv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="'same'"):
        DeltaConv2d(4, 4, 3, padding="same")
    with torch.no_grad(), pytest.raises(ValueError, match=r"shape \[3, 8, 8\]"):
        DeltaConv2d(3, 4, 3)(torch.randn(3, 8, 8))
    with pytest.raises(TypeError, match="Linear"):
        DeltaConv2d.from_dense(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_changes_pay")
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_callers_may_write_to_input_and_output(kind: str) -> None:
    dense: nn.Module = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1)
    layer = (DeltaLinear if kind == "linear" else DeltaConv2d).from_dense(dense)  # type: ignore[arg-type]
    x = torch.empty(2, 6) if kind == "linear" else torch.empty(2, 6, 8, 8)
    with torch.no_grad():
        for step in range(5):
            if step != 3:  # where nothing changes, too
                x.normal_()
            y = layer(x)
            torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)
            y.relu_()


def test_autocast_gives_every_step_its_dtype() -> None:
    layer = DeltaLinear.from_dense(nn.Linear(6, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {layer(torch.randn(2, 6)).dtype for _ in range(3)} == {torch.bfloat16}


def test_conv_is_the_dense_one_where_changes_do_not_pay(cpu_target: str) -> None:
    walk = steps(3, 2, 64, 16, 16)
    for channels, size, dtype, pays in (
        (64, 16, torch.float32, cpu_target != "serial"),
        (64, 8, torch.float32, False),
        (63, 16, torch.float32, False),
        (64, 16, torch.bfloat16, cpu_target not in ("serial", "amx_bf16")),
    ):
        dense = nn.Conv2d(channels, 3, 3, padding=1).to(dtype)
        layer = DeltaConv2d.from_dense(dense)
        with torch.no_grad():
            for x in walk[:, :, :channels, :size, :size].to(dtype):
                torch.testing.assert_close(layer(x), dense(x), rtol=2e-2, atol=2e-2)
            assert (layer.streams.seen is not None) == pays
            with pytest.raises(ValueError, match=r"reset\(\)"):
                layer(x[:1])
            layer.threshold = 1e-6
            for x in walk[:, :, :channels, :size, :size].to(dtype):
                torch.testing.assert_close(layer(x), dense(x), rtol=2e-2, atol=2e-2)
            assert layer.streams.seen is not None


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_other_weights_start_the_streams_anew(kind: str) -> None:
    make = (lambda: nn.Linear(6, 5)) if kind == "linear" else (lambda: nn.Conv2d(6, 5, 1))
    layer = (DeltaLinear if kind == "linear" else DeltaConv2d).from_dense(make(), 1e-6)  # type: ignore[arg-type]
    x, other = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 4, 4), make()
    with torch.no_grad():
        layer(x)
        with pytest.raises(RuntimeError, match="bias"):  # which does nothing
            layer.load_state_dict({**other.state_dict(), "bias": torch.zeros(3)})
        assert layer.streams.seen is not None
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))
        torch.testing.assert_close(layer.double()(x.double()), other.double()(x.double()))
    layer = type(layer).from_dense(make(), 0.0, 2)  # type: ignore[arg-type]
    with torch.no_grad():
        layer(x)
        with pytest.raises(ValueError, match=r"reset\(\)"):  # where all is computed anew, too
            layer(x[:1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 500.0])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv, few"])
def test_float16_takes_any_change_of_finite_numbers(
    kind: str, threshold: float, autocast: bool
) -> None:
    dense = nn.Linear(64, 3) if kind == "linear" else nn.Conv2d(64, 3, 3, padding=1)
    with torch.no_grad():
        # Two results are further apart than the largest number, too.
        dense.weight.fill_(0.9 if kind == "linear" else 0.1)
    dense = dense if autocast else dense.half()
    layer: DeltaLinear | DeltaConv2d = (
        DeltaLinear.from_dense(dense, threshold)
        if isinstance(dense, nn.Linear)
        else DeltaConv2d.from_dense(dense, threshold)
    )
    exact = copy.deepcopy(dense).double()
    x = torch.zeros((2, 64) if kind == "linear" else (1, 64, 16, 16), dtype=dense.weight.dtype)
    changed = x[:, :1, 3:6, 4:7] if kind == "conv, few" else x[:, :1]
    with torch.no_grad():
        for value in (60000.0, -60000.0, -60100.0, 65504.0, 1000.0):
            changed.fill_(value)
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                y = layer(x)
            assert y.dtype == torch.float16
            torch.testing.assert_close(
                y.double(), exact(x.double()), rtol=2e-3, atol=100 + threshold
            )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_nothing_is_remembered_of_what_has_no_content(kind: str) -> None:
    dense = nn.Linear(64, 3) if kind == "linear" else nn.Conv2d(64, 3, 3, padding=1)
    x = torch.randn(2, 64) if kind == "linear" else torch.randn(2, 64, 16, 16)
    layer: DeltaLinear | DeltaConv2d = (
        DeltaLinear.from_dense(dense)
        if isinstance(dense, nn.Linear)
        else DeltaConv2d.from_dense(dense, threshold=1e-6)
    )
    with torch.no_grad():
        shape = dense(x).shape
        exported = torch.export.export(layer, (x,), strict=False).module()
        assert layer.streams.seen is None
        for step in (x, x + 1):
            torch.testing.assert_close(exported(step), dense(step))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == shape
        for step in (x, x + 1):  # those that a layer has stay
            torch.testing.assert_close(layer(step), dense(step), rtol=1e-4, atol=1e-4)
            seen = layer.streams.seen
            torch.export.export(layer, (x,), strict=False)
            assert layer.streams.seen is seen
        layer.to("meta")
        for _ in range(2):
            assert layer(x.to("meta")).shape == shape
        assert layer.streams.seen is None


def test_a_compiled_layer_remembers() -> None:
    torch._dynamo.reset()
    dense = nn.Linear(16, 8)
    layer = DeltaLinear.from_dense(dense)
    run = torch.compile(layer, backend="eager")
    with torch.no_grad():
        for step, x in enumerate(steps(3, 2, 16)):
            torch.testing.assert_close(run(x), dense(x), rtol=1e-5, atol=1e-5)
            assert layer.streams.steps == step
            torch.testing.assert_close(layer.streams.seen, x)
