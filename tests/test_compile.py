"""What torch's compilers see: opcheck, torch.compile forward and backward, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import sparse_24
from gossamer import sparse24_linear
from gossamer.formats import Sparse24, Sparse24Panels
from gossamer.nn import SparseLinear
from torch import Tensor, nn

ops = torch.ops.gossamer
# What torch's own compilers warn of, in one version or another.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),
]

SPARSE = sparse_24(6, 10)
PANELS = Sparse24Panels.from_sparse24(SPARSE).panels
X, BIAS = torch.randn(2, 3, 10), torch.randn(6)
PARTS = (SPARSE.values, SPARSE.indices)

OPCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (ops.sparse24_linear, (X, *PARTS, BIAS, 10, 6, "gelu")),
    "linear with gradient": (
        ops.sparse24_linear,
        (
            X.clone().requires_grad_(),
            SPARSE.values.clone().requires_grad_(),
            SPARSE.indices,
            BIAS.clone().requires_grad_(),
            10,
            6,
            "none",
        ),
    ),
    "linear without bias": (
        ops.sparse24_linear,
        (X[0].t().contiguous().t(), *PARTS, None, 10, 6, "none"),
    ),
    "linear on panels": (ops.sparse24_linear, (X, PANELS, None, BIAS, 10, 6, "relu")),
    "from_dense": (ops.sparse24_from_dense, (SPARSE.to_dense(),)),
    "to_dense": (ops.sparse24_to_dense, (*PARTS, 10)),
    "to_dense with gradient": (
        ops.sparse24_to_dense,
        (SPARSE.values.clone().requires_grad_(), SPARSE.indices, 10),
    ),
    "gather with gradient": (
        ops.sparse24_gather,
        (torch.randn(6, 10, requires_grad=True), SPARSE.indices),
    ),
    "project": (ops.sparse24_project, (torch.randn(6, 10), True, torch.tensor(1.5))),
    "validate": (ops.sparse24_validate, (*PARTS, 10)),
    "to_panels": (ops.sparse24_to_panels, (*PARTS, 10)),
    "from_panels": (ops.sparse24_from_panels, (PANELS, 10, 6, torch.float32)),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, args = OPCHECKS[case]
    torch.library.opcheck(op, args)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = SparseLinear(10, 24), SparseLinear(24, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_training_matches_eager(backend: str) -> None:
    model = Block()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in ((3,), (5,), (2, 4)):  # the second size turns the first dimension dynamic
        x = torch.randn(*batch, 10, requires_grad=True)
        operands = (x, *model.parameters())
        expected = model(x)
        got = compiled(x)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), operands),
            torch.autograd.grad(expected.square().sum(), operands),
        )


def test_compiled_inference_of_a_packed_layer() -> None:
    model = Block().eval()
    x = torch.randn(3, 10)
    expected = model(x)
    for layer in (model.up, model.down):
        layer.pack()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    model.train()
    # Older torch keeps the text to itself.
    with pytest.raises(Exception, match=r"unpack\(\)|Observed exception"):
        compiled(x)


def test_formats_are_arguments_of_compiled_functions() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor, weight: Sparse24 | Sparse24Panels, bias: Tensor) -> Tensor:
        return sparse24_linear(x, weight, bias, "silu") + weight.to_dense().sum()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def made_inside(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return sparse24_linear(x, Sparse24(values, indices, (6, 10)))

    values = SPARSE.values.clone().requires_grad_()
    trained = Sparse24(values, SPARSE.indices, SPARSE.shape)
    expected = sparse24_linear(X, SPARSE, BIAS, "silu") + SPARSE.to_dense().sum()
    for weight in (SPARSE, Sparse24Panels.from_sparse24(SPARSE), trained):
        torch.testing.assert_close(function(X, weight, BIAS), expected)
    (got,) = torch.autograd.grad(made_inside(X, values, SPARSE.indices).square().sum(), values)
    (want,) = torch.autograd.grad(sparse24_linear(X, trained).square().sum(), values)
    torch.testing.assert_close(got, want)


def test_compiled_mistakes_are_errors_too() -> None:
    layer = SparseLinear(10, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="x has 9 features, the weight expects 10"):
        compiled(torch.randn(3, 9))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_export(packed: bool, strict: bool) -> None:
    layer = SparseLinear(10, 6).eval()
    if packed:
        layer.pack()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        layer, (torch.randn(4, 10),), dynamic_shapes=({0: batch},), strict=strict
    )
    x = torch.randn(7, 10)
    torch.testing.assert_close(program.module()(x), layer(x))
    lowered = program.run_decompositions()
    torch.testing.assert_close(lowered.module()(x), layer(x))
    targets = {str(node.target) for node in lowered.graph.nodes}
    assert "gossamer.sparse24_linear.default" in targets


@pytest.mark.parametrize("packed", [False, True])
def test_symbolic_trace(packed: bool) -> None:
    model = Block().eval()
    if packed:
        model.up.pack()
    x = torch.randn(3, 10)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
