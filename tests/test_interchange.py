"""2:4 weights of other packages come in exactly, and wrong ones are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gossamer.interchange import (
    from_torch_sparse,
    load_compressed_tensors,
    sparse24_from_bitmask,
    sparse24_from_torch,
)
from gossamer.nn import SparseLinear
from gossamer.prune import magnitude_24
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass


def as_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors writes it: the two largest of four, zeros among them where needed."""
    kept = weight.abs().view(-1, 4).topk(2).indices
    mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter(1, kept, True)
    mask = mask.view(weight.shape)
    bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    return {
        "compressed": weight[mask].view(len(weight), -1),
        "bitmask": torch.from_numpy(bits),
        "shape": torch.tensor(weight.shape).reshape(-1, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bitmask_is_read_exactly(dtype: torch.dtype) -> None:
    for n, k in ((1, 4), (5, 12), (16, 64)):
        weight = magnitude_24(torch.randn(n, k)).to(dtype)
        weight[0, :4] = 0  # stored all the same
        parts = as_bitmask(weight)
        made = sparse24_from_bitmask(**parts)
        assert torch.equal(made.to_dense(), weight)
        assert torch.equal(made.values, parts["compressed"])
        bad = {**parts, "bitmask": parts["bitmask"] ^ 1}
        with pytest.raises(ValueError, match="not 2:4 in row 0, group 0"):
            sparse24_from_bitmask(**bad)
        with pytest.raises(ValueError, match="compressed and bitmask have shapes"):
            sparse24_from_bitmask(**{**parts, "shape": torch.tensor([n + 1, k])})
    with pytest.raises(TypeError, match=r"float8_e4m3fn; multiply it by its scales"):
        sparse24_from_bitmask(
            **{**parts, "compressed": parts["compressed"].to(torch.float8_e4m3fn)}
        )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.LayerNorm(32)), nn.Linear(32, 8))


def test_a_checkpoint_of_compressed_tensors_makes_linear_layers_sparse() -> None:
    source, model = net(), net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
        source[0].weight.copy_(magnitude_24(source[0].weight))
    state = {k: v for k, v in source.state_dict().items() if k != "0.weight"}
    state |= {f"0.{k}": v for k, v in as_bitmask(source[0].weight.detach()).items()}
    before = model.state_dict()
    for wrong, message in (
        (
            {k: v for k, v in state.items() if k != "0.shape"},
            r"0: the checkpoint lacks \['shape'\]",
        ),
        ({k: v for k, v in state.items() if k != "2.bias"}, r"lacks \['2.bias'\]"),
        ({**state, "0.weight_scale": torch.ones(1)}, r"unknown \['0.weight_scale'\]"),
        ({**state, "2.bitmask": state["0.bitmask"]}, "2: the checkpoint lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            load_compressed_tensors(model, wrong)
        assert type(model[0]) is nn.Linear
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert load_compressed_tensors(model, state) == ["0"]
    assert isinstance(model[0], SparseLinear)
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), source(x))
    model(x).sum().backward()
    assert model[0].values.grad is not None


def compressed() -> tuple[nn.Sequential, dict[str, Tensor]]:
    source = net()
    with torch.no_grad():
        source[0].weight.copy_(magnitude_24(source[0].weight))
    state = {k: v for k, v in source.state_dict().items() if k != "0.weight"}
    return source, state | {f"0.{k}": v for k, v in as_bitmask(source[0].weight.detach()).items()}


def test_a_checkpoint_takes_the_dtype_of_the_model() -> None:
    source, state = compressed()
    x = torch.randn(3, 16, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 3e-2)):
        model = net().to(dtype)
        assert load_compressed_tensors(model, state) == ["0"]
        assert {p.dtype for p in model.parameters()} == {dtype}
        y = model(x.to(dtype)).double()
        torch.testing.assert_close(y, source.double()(x), rtol=tolerance, atol=tolerance)


def test_what_cannot_be_loaded_changes_nothing() -> None:
    _, state = compressed()
    last = state["2.weight"]
    other = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    for wrong, message in (
        ({"2.weight": last.to_sparse()}, "2.weight cannot be copied: .*, torch.sparse_coo, on cpu"),
        ({"2.weight": last.to("meta")}, "2.weight cannot be copied: .*, on meta"),
        ({"0.weight": torch.zeros(32, 16)}, r"unknown \['0.weight'\]"),
    ):
        model = net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises((TypeError, ValueError), match=message):
            load_compressed_tensors(model, {**other, **wrong})
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the model's 0.weight is on the meta device"):
        load_compressed_tensors(net().to("meta"), state)


def test_a_layer_with_two_names_is_loaded_by_one() -> None:
    source, state = compressed()
    model = nn.Module()
    model.a = model.b = net()
    given = {f"b.{k}": v for k, v in state.items()}
    assert load_compressed_tensors(model, given) == ["b.0"]
    assert model.a[0] is model.b[0]
    x = torch.randn(3, 16)
    torch.testing.assert_close(model.a(x), source(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torch_s_own_sparse_weights_become_sparse_layers() -> None:
    model = net().bfloat16()
    weight = magnitude_24(torch.randn(32, 64)).bfloat16()
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    held = SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)
    assert torch.equal(sparse24_from_torch(held).to_dense(), weight)
    with pytest.raises(TypeError, match="Tensor, expected a SparseSemiStructuredTensor"):
        sparse24_from_torch(weight)
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(held, requires_grad=False)
    model[0] = linear
    assert from_torch_sparse(model) == ["0"]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(model[0](x), expected)
