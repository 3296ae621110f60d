"""What convert() does to a model, and what it leaves alone."""

from __future__ import annotations

import gossamer
import pytest
import torch
from convert_models import MLP, fix_speedup, pruned_copy, small_mlp, small_sample
from gossamer.conversion import plan
from gossamer.conversion.timing import Speed
from gossamer.nn import SparseLinear
from gossamer.prune import magnitude_24
from torch import Tensor, nn


@pytest.fixture
def mlp() -> MLP:
    return small_mlp()


@pytest.fixture
def sample() -> Tensor:
    return small_sample()


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that convert() may not change when it fails."""
    return {
        "modules": dict(model.named_modules(remove_duplicate=False)),
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for key in ("modules", "training", "hooks"):
        assert after[key] == before[key], key
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_pruned_dense(dtype: torch.dtype, sample: Tensor) -> None:
    model = MLP(dtype=dtype).eval()
    x = sample.to(dtype)
    expected = pruned_copy(model)(x)
    report = gossamer.convert(model, prune="magnitude", sample_input=x, force=True)
    assert isinstance(model.up, SparseLinear)
    assert isinstance(model.down, SparseLinear)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert all(layer.error_max <= tolerance for layer in report)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_prunes_alike_whether_swapped_or_not(
    mlp: MLP, sample: Tensor, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    expected = pruned_copy(mlp)(sample)
    fix_speedup(monkeypatch, ratio)
    report = gossamer.convert(mlp, prune="magnitude", sample_input=sample)
    assert {layer.swapped for layer in report} == {ratio > 1}
    assert all(layer.pruned for layer in report)
    torch.testing.assert_close(mlp(sample), expected, rtol=1e-5, atol=1e-5)


def test_without_prune_a_weight_that_is_not_24_stays(mlp: MLP, sample: Tensor) -> None:
    with torch.no_grad():
        mlp.down.weight.copy_(magnitude_24(mlp.down.weight))
    before = mlp.up.weight.clone()
    report = gossamer.convert(mlp, sample_input=sample, force=True)
    assert type(mlp.up) is nn.Linear
    assert torch.equal(mlp.up.weight, before)
    groups = int(((before != 0).unflatten(1, (-1, 4)).sum(-1) > 2).sum())
    assert str(groups) in report["up"].reason
    assert report["down"].swapped
    assert not report["down"].pruned


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_answers_the_same(norm_first: bool) -> None:
    """The native inference path of torch's encoder still finds the weights that it reads."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    model.append(nn.Linear(64, 64))
    x = torch.randn(3, 5, 64)
    twin = pruned_copy(model)
    report = gossamer.convert(model, prune="magnitude", sample_input=x, force=True)
    assert [layer.name for layer in report.swapped] == ["1"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, {"encoder.0.up", "encoder.0.down", "encoder.1.up", "encoder.1.down", "head"}),
        ("head", None, {"head"}),
        (["encoder.1"], None, {"encoder.1.up", "encoder.1.down"}),
        (["encoder.*.up", "head"], None, {"encoder.0.up", "encoder.1.up", "head"}),
        (None, ["*.down"], {"encoder.0.up", "encoder.1.up", "head"}),
        ("encoder", ("encoder.0",), {"encoder.1.up", "encoder.1.down"}),
        ("head", "encoder.0.norm", {"head"}),
    ],
)
def test_names_select_layers(
    include: str | list[str] | None, exclude: str | tuple[str] | None, expected: set[str]
) -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(MLP(), MLP()), "head": nn.Linear(64, 8)})
    report = gossamer.convert(
        model, prune="magnitude", include=include, exclude=exclude, force=True
    )
    assert {layer.name for layer in report.swapped} == expected
    assert {layer.name for layer in report if layer.pruned} == expected
    assert {n for n, m in model.named_modules() if isinstance(m, SparseLinear)} == expected


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("entry", ["upp", "0.up", "*.sideways"])
def test_unknown_name_is_an_error(mlp: MLP, argument: str, entry: str) -> None:
    before = snapshot(mlp)
    with pytest.raises(ValueError, match="no such module") as error:
        gossamer.convert(mlp, prune="magnitude", force=True, **{argument: ["down", entry]})
    assert repr(entry) in str(error.value)
    if entry == "upp":
        assert "close matches: up" in str(error.value)
    assert_unchanged(mlp, before)


def test_including_a_module_without_linear_layers_is_an_error(mlp: MLP) -> None:
    with pytest.raises(ValueError, match=r"'norm'.*no linear layer"):
        gossamer.convert(mlp, include="norm")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"pattern": "1:4"}, ValueError),
        ({"prune": "random"}, ValueError),
        ({"include": [1]}, TypeError),
        ({"exclude": 0}, TypeError),
        ({"sample_input": 3}, TypeError),
        ({"sample_input": torch.zeros(10, 63)}, RuntimeError),
    ],
)
def test_wrong_argument_changes_nothing(
    mlp: MLP, arguments: dict[str, object], error: type[Exception]
) -> None:
    mlp.up.train()
    before = snapshot(mlp)
    with pytest.raises(error):
        gossamer.convert(mlp, **{"prune": "magnitude", "force": True, **arguments})
    assert_unchanged(mlp, before)


def test_failure_in_the_last_layer_changes_nothing(
    mlp: MLP, sample: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(mlp)
    seen = []

    def fail_late(layer: nn.Linear, *_: object) -> Speed:
        seen.append(layer)
        if layer is mlp.down:
            raise MemoryError
        return Speed(2.0, 1.0)

    monkeypatch.setattr(plan, "measure_speed", fail_late)
    with pytest.raises(MemoryError):
        gossamer.convert(mlp, prune="magnitude", sample_input=sample)
    assert seen == [mlp.up, mlp.down]
    assert_unchanged(mlp, before)


def test_rejects_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        gossamer.convert(torch.zeros(3))


def test_keeps_what_belongs_to_parents_and_parameters(mlp: MLP, sample: Tensor) -> None:
    calls = []
    mlp.register_forward_hook(lambda *_: calls.append(1))
    mlp.up.weight.requires_grad_(False)
    bias = mlp.up.bias
    gossamer.convert(mlp, prune="magnitude", force=True)
    mlp(sample)
    assert calls == [1]
    assert mlp.up.bias is bias
    assert not mlp.up.unpack().values.requires_grad
    assert mlp.down.unpack().values.requires_grad


def test_layers_are_packed_and_can_be_trained_after_unpacking(mlp: MLP, sample: Tensor) -> None:
    with torch.inference_mode():
        gossamer.convert(mlp, prune="magnitude", force=True)
    assert mlp.up.packed
    assert mlp.down.packed
    assert not any(tensor.is_inference() for tensor in (*mlp.parameters(), *mlp.buffers()))
    mlp.train()
    with pytest.raises(RuntimeError, match="unpack"):
        mlp(sample)
    mlp.up.unpack()
    mlp.down.unpack()
    mlp(sample).sum().backward()
    assert mlp.up.values.grad is not None


def test_shared_layer_is_swapped_once_everywhere(sample: Tensor) -> None:
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": layer})
    report = gossamer.convert(model, prune="magnitude", force=True)
    assert len(report) == 1
    assert report["a.0"] is report["b"]
    assert report["b"].aliases == ("b",)
    assert isinstance(model["b"], SparseLinear)
    assert model["a"][0] is model["b"]


def test_model_that_is_a_layer_itself(sample: Tensor) -> None:
    layer = nn.Linear(64, 64)
    expected = pruned_copy(layer)(sample)
    report = gossamer.convert(layer, prune="magnitude", sample_input=sample, force=True)
    assert isinstance(report.model, SparseLinear)
    assert report[""].swapped
    torch.testing.assert_close(report.model.eval()(sample), expected, rtol=1e-5, atol=1e-5)


def test_converting_again_changes_nothing(mlp: MLP, sample: Tensor) -> None:
    gossamer.convert(mlp, prune="magnitude", force=True)
    first = mlp.up
    report = gossamer.convert(mlp, prune="magnitude", sample_input=sample, force=True)
    assert mlp.up is first
    assert not report.swapped


def test_weight_made_in_inference_mode_is_pruned() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 64))
    expected = magnitude_24(model[0].weight.detach())
    gossamer.convert(model, prune="magnitude")
    assert torch.equal(model[0].weight, expected)


def test_compiled_model_takes_the_new_layers(mlp: MLP, sample: Tensor) -> None:
    expected = pruned_copy(mlp)(sample)
    compiled = torch.compile(mlp, backend="eager")
    with torch.no_grad():
        compiled(sample)
        report = gossamer.convert(compiled, prune="magnitude", sample_input=sample, force=True)
        assert [layer.rows for layer in report.swapped] == [10, 10]
        torch.testing.assert_close(compiled(sample), expected, rtol=1e-5, atol=1e-5)
