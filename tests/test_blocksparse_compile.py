"""What torch's compilers see of the block-sparse ops: opcheck, torch.compile, torch.export."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import pytest
import torch
from conv_cases import block_sparse
from gossamer import Block, blocksparse_conv, blocksparse_linear
from gossamer.formats import BlockSparse
from torch import Tensor, nn

ops = torch.ops.gossamer
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),
]

LINEAR, CONV = block_sparse((6, 10), Block(2, 4)), block_sparse((6, 5, 3, 2), Block(2, 4), groups=2)
BIAS, ROWS = torch.randn(6), torch.randn(3, 10)


def parts(weight: BlockSparse, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    values = weight.values.clone().requires_grad_(gradient)
    return values, weight.crow_indices, weight.col_indices


def image(gradient: bool = False, last: bool = False) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 10, 5, 6).contiguous(memory_format=memory_format)
    return x.requires_grad_(gradient)


NO_AXES: tuple[Any, ...] = ((6, 10), 1, (), (), (), 0)
TWO_AXES: tuple[Any, ...] = ((6, 5, 3, 2), 2, (2, 1), (1, 0), (1, 2), 0)
OPCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (
        ops.blocksparse_product,
        (ROWS, *parts(LINEAR), BIAS, ROWS[:, :6].clone(), *NO_AXES, "gelu"),
    ),
    "linear with gradient": (
        ops.blocksparse_product,
        (ROWS.clone().requires_grad_(), *parts(LINEAR, True), None, None, *NO_AXES, "none"),
    ),
    "conv": (
        ops.blocksparse_product,
        (image(), *parts(CONV), None, torch.randn(2, 6, 3, 4), *TWO_AXES, "relu"),
    ),
    "conv with gradient": (
        ops.blocksparse_product,
        (image(True), *parts(CONV, True), BIAS.clone().requires_grad_(), None, *TWO_AXES, "silu"),
    ),
    "conv, channels last": (
        ops.blocksparse_product,
        (image(last=True), *parts(CONV), BIAS, None, *TWO_AXES, "none"),
    ),
    "conv of one channel, channels last": (
        ops.blocksparse_product,
        (
            torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last),
            *parts(block_sparse((1, 3, 3, 3), Block(4, 4))),
            *(None, None),
            *((1, 3, 3, 3), 1, (2, 2), (0, 0), (1, 1), 0),
            "none",
        ),
    ),
    "find_live": (ops.blocksparse_find_live, (torch.randn(6, 6, 5), 2, 4, 2)),
    "to_dense": (ops.blocksparse_to_dense, (*parts(CONV), 6, 6, 5, 2)),
    "to_dense with gradient": (ops.blocksparse_to_dense, (*parts(CONV, True), 6, 6, 5, 2)),
    "gather with gradient": (
        ops.blocksparse_gather,
        (torch.randn(6, 6, 5, requires_grad=True), *parts(CONV)[1:], 2, 4, 2),
    ),
    "dvalues": (
        ops.blocksparse_dvalues,
        (torch.randn(2, 6, 3, 4), image(), *parts(CONV)[1:], 2, 4, *TWO_AXES[:-1]),
    ),
    "dvalues with gradient, channels last": (
        ops.blocksparse_dvalues,
        (
            torch.randn(2, 6, 3, 4, requires_grad=True),
            image(True, last=True),
            *parts(CONV)[1:],
            *(2, 4, *TWO_AXES[:-1]),
        ),
    ),
    "validate": (ops.blocksparse_validate, (*parts(CONV), 6, 6, 5, 2)),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, args = OPCHECKS[case]
    torch.library.opcheck(op, args)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.formats = (CONV, LINEAR)
        self.conv_values = nn.Parameter(CONV.values.clone())
        self.linear_values = nn.Parameter(LINEAR.values.clone())
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        conv, linear = self.formats
        x = blocksparse_conv(
            x, replace(conv, values=self.conv_values), self.bias, padding="same", activation="relu",
            residual=x[:, 4:],
        )  # fmt: skip
        x = torch.cat([x, x[:, :4]], 1).mean((2, 3))
        return blocksparse_linear(x, replace(linear, values=self.linear_values))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_training_matches_eager(backend: str) -> None:
    model = Net()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, last in ((3, False), (5, False), (2, True)):
        x = torch.randn(batch, 10, 6, 5)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        operands = (x.requires_grad_(), *model.parameters())
        expected, got = model(x), compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), operands),
            torch.autograd.grad(expected.square().sum(), operands),
        )


def test_sizes_may_be_dynamic() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(x: Tensor, weight: BlockSparse) -> Tensor:
        return blocksparse_conv(x, weight, padding="same") * weight.to_dense().sum()

    for channels, block in ((5, Block(2, 4)), (6, Block(3, 2)), (9, Block(4, 4))):
        weight, x = block_sparse((channels, 4, 3), block), torch.randn(2, 4, channels)
        expected = blocksparse_conv(x, weight, padding="same") * weight.to_dense().sum()
        torch.testing.assert_close(function(x, weight), expected)


def test_compiled_autocast_and_formats_as_arguments() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor, weight: BlockSparse) -> Tensor:
        return blocksparse_linear(x, weight, BIAS, "silu") + weight.to_dense().sum()

    x = torch.randn(3, 10)
    expected = blocksparse_linear(x, LINEAR, BIAS, "silu") + LINEAR.to_dense().sum()
    torch.testing.assert_close(function(x, LINEAR), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(Net(), fullgraph=True)(image()).dtype == torch.bfloat16


def test_compiled_mistakes_are_errors_too() -> None:
    compiled = torch.compile(Net(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"[Ee]xception|expects 10 channels") as caught:
        compiled(torch.randn(2, 9, 5, 6))
    assert "expects 10 channels" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = Net().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 10, 5, 6)
    torch.testing.assert_close(program.module()(x), model(x))
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert "gossamer.blocksparse_product.default" in targets
