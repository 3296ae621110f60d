"""What every kind of trainable layer promises: twins, copies, moves, checkpoints, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gossamer import Block, Unstructured
from layer_kinds import KINDS, Layer, dense_twin, make, x_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[kind for kind in KINDS if "blocks" in kind])
def blocks(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def density_of(layer: Layer) -> float | None:
    return 0.5 if isinstance(layer.pattern, Block) else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_its_dense_twin(kind: str, bias: bool, dtype: torch.dtype) -> None:
    layer = make(kind, bias=bias, dtype=dtype)
    x, dense = x_for(kind, dtype), layer.to_dense()
    torch.testing.assert_close(layer(input=x), dense(input=x))
    assert (dense.bias is None) == (layer.bias is None) == (not bias)
    back = type(layer).from_dense(dense, layer.pattern)
    assert torch.equal(back.to_dense().weight, dense.weight)
    assert repr(back) == repr(layer)
    assert torch.equal(back(x), layer(x))


def test_results_may_be_written_to(kind: str) -> None:
    layer, x = make(kind), x_for(kind)
    y = layer(x)
    (wanted,) = torch.autograd.grad(y.relu().sum(), layer.bias)
    (given,) = torch.autograd.grad(layer(x).relu_().sum(), layer.bias)
    assert torch.equal(given, wanted)


def test_pruning_only_on_request_and_as_much_as_asked(kind: str) -> None:
    dense, layer = dense_twin(kind), make(kind)
    if layer.pattern == "2:4":
        with pytest.raises(ValueError, match="more than 2 non-zeros"):
            type(layer).from_dense(dense, "2:4")
    elif isinstance(layer.pattern, Unstructured):
        with pytest.raises(ValueError, match=r"60 non-zeros, density 0\.4 allows 24"):
            type(layer).from_dense(dense, layer.pattern)
        assert type(layer).from_dense(dense, Unstructured()).weight.density == 1.0
    else:
        assert type(layer).from_dense(dense, layer.pattern).weight.density == 1.0
    pruned = type(layer).from_dense(dense, layer.pattern, "magnitude", density_of(layer))
    assert pruned.values.shape == layer.values.shape
    weight = pruned.to_dense().weight
    kept = weight != 0
    assert torch.equal(weight[kept], dense.weight[kept])
    assert weight.square().sum() > 0.5 * dense.weight.square().sum()


def test_blocks_of_zeros_are_kept_where_pruning_keeps_them() -> None:
    dense = nn.Conv1d(4, 4, 1)
    nn.init.zeros_(dense.weight)
    layer = make("conv1d, blocks")
    pruned = type(layer).from_dense(dense, layer.pattern, "magnitude", 0.5)
    assert pruned.values.shape[0] == 1
    empty = type(layer).from_dense(dense, layer.pattern)
    assert empty.values.shape[0] == 0
    torch.testing.assert_close(empty(torch.ones(1, 4, 3))[0, :, 0], empty.bias)
    empty.reset_parameters()
    empty.weight.validate()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "places" not in kind])
def test_fresh_layer_is_drawn_as_a_dense_one(kind: str) -> None:
    torch.manual_seed(7)
    layer = make(kind)
    torch.manual_seed(7)
    dense = layer.to_dense()
    dense.reset_parameters()
    weight = layer.to_dense().weight
    kept = weight != 0
    assert torch.equal(weight[kept], dense.weight[kept])
    assert torch.equal(layer.bias, dense.bias)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    layer.weight.validate()


def test_from_dense_keeps_flags_and_copies_the_bias(kind: str) -> None:
    layer = make(kind)
    dense = layer.to_dense().eval()
    dense.weight.requires_grad_(False)
    sparse = type(layer).from_dense(dense, layer.pattern)
    assert not sparse.training
    assert not sparse.values.requires_grad
    assert sparse.bias.requires_grad
    assert sparse.bias is not dense.bias
    assert not sparse.to_dense().weight.requires_grad
    assert not sparse.to_dense().training


def test_packing_leaves_what_has_no_other_layout(kind: str) -> None:
    layer = make(kind)
    before = [t.data_ptr() for t in tensors(layer)]
    assert layer.pack() is layer
    assert layer.packed == isinstance(layer.pattern, Block)
    if not layer.packed:
        assert layer.unpack() is layer
        assert [t.data_ptr() for t in tensors(layer)] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_blocks(blocks: str, dtype: torch.dtype) -> None:
    layer, x = make(blocks, dtype=dtype), x_for(blocks, dtype)
    layer.values.requires_grad_(False)
    y, state, weight = layer(x), layer.state_dict(), layer.to_dense().weight
    assert layer.pack() is layer
    assert layer.packed
    assert layer.values is None
    with pytest.raises(RuntimeError, match="packed layer cannot be trained"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.to_dense().weight, weight)
    assert (
        layer.weight.to_blocksparse().validate().nbytes == make(blocks, dtype=dtype).weight.nbytes
    )
    packed_state = layer.state_dict()
    assert state.keys() == packed_state.keys()
    assert all(torch.equal(packed_state[key], t) for key, t in state.items())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed
        assert torch.equal(other(x), y)
    layer.to(torch.float64)
    assert not layer.packed
    layer.to(torch.float32).pack()
    assert torch.equal(layer.to_dense().weight, weight.float())
    layer.to(dtype)
    assert layer.packed
    assert torch.equal(layer(x), y)
    layer.unpack()
    assert not layer.values.requires_grad
    assert torch.equal(layer(x), y)


def test_packed_blocks_load_another_number_of_them(blocks: str) -> None:
    layer, x = make(blocks).eval().pack(), x_for(blocks)
    other = type(layer).from_dense(dense_twin(blocks), layer.pattern)
    assert other.weight.density == 1.0
    layer.load_state_dict(other.state_dict(), assign=True)
    assert layer.packed
    assert torch.equal(layer(x), other(x))


def test_packed_blocks_pass_gradients_to_x(blocks: str) -> None:
    layer, x = make(blocks).eval(), x_for(blocks).requires_grad_()
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(layer.pack()(x).square().sum(), x)
    assert torch.equal(got, want)


def test_packed_blocks_under_autocast(blocks: str) -> None:
    layer, x = make(blocks).eval().pack(), x_for(blocks)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y.bfloat16())


def test_a_memory_format_leaves_panels_as_the_kernels_read_them(blocks: str) -> None:
    layer, x = make(blocks).eval(), x_for(blocks)
    y = layer(x)
    layer.pack().to(memory_format=torch.channels_last)
    assert layer.panels.is_contiguous()
    assert torch.equal(layer(x), y)


def test_float64_blocks_have_no_panels(blocks: str) -> None:
    layer = make(blocks, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"no panels of torch.float64"):
        layer.pack()
    assert not layer.packed


def test_training_follows_the_masked_dense_layer(kind: str) -> None:
    layer = make(kind)
    dense = layer.to_dense()
    stored = copy.deepcopy(layer)
    nn.init.ones_(stored.values)
    mask = stored.to_dense().weight.detach()
    ours = torch.optim.AdamW(layer.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.1)
    for _ in range(3):
        x = x_for(kind)
        target = torch.randn_like(layer(x))
        for step, module in ((ours, layer), (theirs, dense)):
            step.zero_grad()
            F.mse_loss(module(x), target).backward()
            if module is dense:
                dense.weight.grad.mul_(mask)
            step.step()
        torch.testing.assert_close(layer.to_dense().weight, dense.weight * mask)
    if layer.pattern != "2:4":
        layer.weight.validate()  # the padding stays 0


def test_deep_copies_and_pickles(kind: str) -> None:
    layer, x, buffer = make(kind).eval(), x_for(kind), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        assert not {t.data_ptr() for t in tensors(other)} & {t.data_ptr() for t in tensors(layer)}
    tied = copy.deepcopy(layer)
    tied.values = layer.values
    pair = copy.deepcopy(nn.ModuleList([layer, tied, layer]))
    assert pair[0] is pair[2]
    assert pair[0].values is pair[1].values


def test_pickles_are_validated(kind: str) -> None:
    layer = make(kind)
    corrupt(layer.state_dict())
    with pytest.raises(ValueError, match=INVALID):
        pickle.loads(pickle.dumps(layer))


INVALID = r"invalid indices|must increase|outside of"


def corrupt(state: dict[str, Tensor]) -> None:
    """Indices that no kernel may see, in place."""
    if "indices" in state:
        state["indices"][1, 0] = 0
    else:
        state["col_indices"][-1] = torch.iinfo(state["col_indices"].dtype).max


def test_moves(kind: str) -> None:
    layer, x = make(kind), x_for(kind)
    weight = layer.to_dense().weight
    before = [t.data_ptr() for t in tensors(layer)]
    layer.float().cpu().to("cpu").type(torch.float32)
    assert [t.data_ptr() for t in tensors(layer)] == before
    held = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    layer.type(torch.bfloat16)
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == held
    assert torch.equal(layer.to_dense().weight, weight.bfloat16())
    torch.testing.assert_close(layer(x.bfloat16()), layer.to_dense()(x.bfloat16()))
    assert layer.to("meta")(x.to("meta").bfloat16()).is_meta
    made = make(kind, device="meta")
    assert all(t.is_meta for t in tensors(made))
    made.to_empty(device="cpu").format.fill_(-1)  # what empty memory may hold
    made.reset_parameters()
    made.weight.validate()
    torch.testing.assert_close(made(x), made.to_dense()(x))


def test_functional_call_pruning_and_parametrisation(kind: str) -> None:
    layer, x = make(kind), x_for(kind)
    twin = copy.deepcopy(layer)
    mask = (torch.rand_like(layer.values) < 0.5).float()
    with torch.no_grad():
        twin.values.mul_(mask)
        twin.bias.mul_(2)
    torch.testing.assert_close(functional_call(layer, twin.state_dict(), (x,)), twin(x))
    prune.custom_from_mask(layer, "values", mask)
    parametrize.register_parametrization(layer, "bias", Doubled())
    torch.testing.assert_close(layer(x), twin(x))


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


def test_files(kind: str, tmp_path: Path) -> None:
    layer, x = make(kind), x_for(kind)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for state in (
        torch.load(tmp_path / "layer.pt", weights_only=True),
        load_file(tmp_path / "layer.safetensors"),
    ):
        other = make(kind)
        values = other.values
        assert not other.load_state_dict(state).missing_keys
        assert other.values is values
        assert torch.equal(other(x), layer(x))
        meta = make(kind, device="meta")
        meta.load_state_dict(state, assign=True)
        assert torch.equal(meta(x), layer(x))
    half = make(kind, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    assert torch.equal(half.values, layer.values.bfloat16())


STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "values of another shape": ("shape|live blocks", {"values": torch.zeros(3, 7, 2)}),
    "flat values": ("shape", {"values": torch.zeros(3)}),
    "values of whole numbers": ("int64", {"values": torch.zeros(3, 4, 2).long()}),
    "a list": ("list", {"values": [1.0]}),
    "newer format": ("version 7", {"format": torch.tensor([7, 6, 10])}),
    "format of another kind": ("format", {"format": torch.tensor([1, 6, 10])}),
    "bias of another shape": (r"\[7\]", {"bias": torch.zeros(7)}),
    "bias of whole numbers": ("int64", {"bias": torch.zeros(6).long()}),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", [*STATES, "indices", "another layer"])
def test_a_bad_checkpoint_changes_nothing(kind: str, case: str, assign: bool) -> None:
    layer = make(kind)
    if "places" in kind and case in ("another layer", "format of another kind"):
        pytest.skip(
            "of no other layer's kind, and that format is its own: tests/test_csr_format.py"
        )
    if case == "indices":
        text, state = INVALID, copy.deepcopy(layer.state_dict())
        corrupt(state)
    elif case == "another layer":
        others = [name for name in KINDS if name.endswith(kind[-4:]) and name != kind]
        text, state = "the layer is", make(others[0]).state_dict()
    else:
        text, change = STATES[case]
        state = {**layer.state_dict(), **change}
    before = [(t, t.data_ptr(), t.detach().clone()) for t in tensors(layer)]
    for module, prefix in ((layer, ""), (nn.Sequential(layer), "0.")):
        given = {prefix + key: t for key, t in state.items()}
        with pytest.raises(RuntimeError, match=text):
            module.load_state_dict(given, strict=False, assign=assign)
        for now, (held, pointer, content) in zip(tensors(layer), before, strict=True):
            assert (now is held, now.data_ptr()) == (True, pointer)
            assert torch.equal(now, content)


def test_another_number_of_blocks_is_taken_over_only_by_assignment() -> None:
    denser = type(make("conv2d, blocks")).from_dense(
        dense_twin("conv2d, blocks"), make("conv2d, blocks").pattern
    )
    layer, x = make("conv2d, blocks"), x_for("conv2d, blocks")
    layer.values.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"24 live blocks, the layer 12|assign=True"):
        layer.load_state_dict(denser.state_dict())
    layer.load_state_dict(denser.state_dict(), assign=True)
    assert torch.equal(layer(x), denser(x))
    assert not layer.values.requires_grad


def test_compiled_and_traced(kind: str) -> None:
    layer, x = make(kind), x_for(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, got = layer(x), compiled(x)
    torch.testing.assert_close(got, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), tuple(layer.parameters())) for y in (got, expected)
    ]
    torch.testing.assert_close(*gradients)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)


def test_autocast(kind: str) -> None:
    layer, x = make(kind), x_for(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_layers_without_memory_are_made(kind: str) -> None:
    with FakeTensorMode():
        layer, x = make(kind), x_for(kind)
        y = layer(x)
    held = make(kind)
    assert y.shape == held(torch.randn(x.shape)).shape
    assert {n: t.shape for n, t in layer.state_dict().items()} == {
        n: t.shape for n, t in held.state_dict().items()
    }
