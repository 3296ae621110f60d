"""Derivatives of the block-sparse products and layouts: both orders, per sample, under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import compress, product

import pytest
import torch
import torch.nn.functional as F
from cases import SumOracle
from conv_cases import CASES, CONVS, ConvCase, block_sparse, typical
from gossamer import _C, Block, blocksparse_conv, blocksparse_linear, reference
from gossamer.formats import BlockSparse, BlockSparsePanels
from gossamer.ops import blocksparse_gradient, blocksparse_transpose
from gossamer.ops.conv_operands import Geometry
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

ops = torch.ops.gossamer
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def check_nested_transforms(
    layer: Callable[[Tensor, Tensor], Tensor], operands: tuple[Tensor, Tensor]
) -> None:
    def length(x: Tensor, values: Tensor, inner: int) -> Tensor:
        return grad(lambda *given: layer(*given).pow(3).sum(), inner)(x, values).square().sum()

    for inner in (0, 1):
        y = layer(*operands).pow(3).sum()
        (first,) = torch.autograd.grad(y, operands[inner], create_graph=True)
        wanted = torch.autograd.grad(first.square().sum(), operands)
        got = grad(length, (0, 1))(*(t.detach() for t in operands), inner)
        torch.testing.assert_close(got, wanted)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3), (2, 1, 2)], ids=str)
def test_first_and_second_derivatives(
    serial_target: str, kernel: tuple[int, ...], activation: str | None
) -> None:
    groups = 2 if kernel else 1
    sparse = block_sparse((4, 3, *kernel), Block(2, 2), 0.6, groups, torch.float64)

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = replace(sparse, values=values)
        if not kernel:
            return blocksparse_linear(x, weight, bias, activation)
        return blocksparse_conv(x, weight, bias, 2, 1, padding_mode="zeros", activation=activation)

    operands = (double(2, 3 * groups, *(3,) * len(kernel)), double(*sparse.values.shape), double(4))
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands, fast_mode=True)


def test_layout_derivatives(serial_target: str) -> None:
    sparse = block_sparse((4, 3, 2), Block(3, 2), 0.6, 2, torch.float64)
    indices = (sparse.crow_indices, sparse.col_indices)

    def to_dense(values: Tensor) -> Tensor:
        return BlockSparse(values, *indices, sparse.shape, 2).to_dense()

    def gather(dense: Tensor) -> Tensor:
        return ops.blocksparse_gather(dense, *indices, 3, 2, 2)

    for function, operand in (
        (to_dense, double(*sparse.values.shape)),
        (gather, double(4, 2, 3)),
    ):
        assert torch.autograd.gradcheck(function, (operand,))
        assert torch.autograd.gradgradcheck(function, (operand,))


def dense_gradients(case: ConvCase, x: Tensor, dense: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, dense = x.requires_grad_(), dense.requires_grad_()
    dx, dweight = torch.autograd.grad(case.dense(x, dense, None), (x, dense), dy)
    return dx, dweight


@pytest.mark.parametrize("case", CASES[::3], ids=map(str, range(0, len(CASES), 3)))
def test_gradients_are_those_of_the_dense_layer(blocksparse_target: str, case: ConvCase) -> None:
    weight, x, bias = case.weight(), case.x(), torch.randn(case.shape[0]).to(case.dtype)
    operands = (x.requires_grad_(), weight.values.requires_grad_(), bias.requires_grad_())
    y = blocksparse_conv(x, weight, bias, **case.geometry)
    dy = torch.randn_like(y)
    dx, dvalues, db = torch.autograd.grad(y, operands, dy)

    exact = [t.detach().double() for t in (x, weight.to_dense(), dy)]
    wanted = dense_gradients(case, *exact)
    sizes = dense_gradients(case, *(t.abs() for t in exact))
    products = (case.group_out * weight.to_dense()[0, 0].numel(), max(1, dy.numel() // dy.shape[1]))
    SumOracle(wanted[0], sizes[0], products[0], case.dtype).check(dx)
    indices = (weight.crow_indices, weight.col_indices, weight.block, weight.groups)
    kept = [reference.blocksparse_gather(t, *indices) for t in (wanted[1], sizes[1])]
    SumOracle(*kept, products[1], case.dtype).check(dvalues)
    axes = [0, *range(2, dy.dim())]
    SumOracle(exact[2].sum(axes), exact[2].abs().sum(axes), products[1], case.dtype).check(db)


@pytest.fixture
def dx_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes, where there is such a way."""
    monkeypatch.setattr(blocksparse_gradient, "dx_by_blocks", lambda *sizes: True)


@pytest.mark.usefixtures("dx_by_blocks")
@pytest.mark.parametrize("case", CASES[::4], ids=map(str, range(0, len(CASES), 4)))
def test_dx_by_transposed_blocks(blocksparse_target: str, case: ConvCase) -> None:
    weight, x = case.weight(), case.x().requires_grad_()
    y = blocksparse_conv(x, weight, **case.geometry)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = [t.detach().double() for t in (x, weight.to_dense(), dy)]
    wanted, _ = dense_gradients(case, *exact)
    sizes, _ = dense_gradients(case, *(t.abs() for t in exact))
    SumOracle(wanted, sizes, case.group_out * exact[1][0, 0].numel(), case.dtype).check(dx)


@pytest.mark.usefixtures("dx_by_blocks")
@pytest.mark.parametrize(("kernel", "stride"), [((), 1), ((3,), 1), ((2, 3), 1), ((2, 3), 2)])
def test_derivatives_by_transposed_blocks(
    serial_target: str, kernel: tuple[int, ...], stride: int
) -> None:
    groups = 2 if kernel else 1
    sparse = block_sparse((4, 3, *kernel), Block(2, 2), 0.6, groups, torch.float64)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        weight = replace(sparse, values=values)
        return (
            blocksparse_conv(x, weight, None, stride, 1)
            if kernel
            else blocksparse_linear(x, weight)
        )

    operands = (double(2, 3 * groups, *(3,) * len(kernel)), double(*sparse.values.shape))
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands, fast_mode=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    got = torch.autograd.grad(compiled(*operands).square().sum(), operands)
    want = torch.autograd.grad(layer(*operands).square().sum(), operands)
    torch.testing.assert_close(got, want)
    check_nested_transforms(layer, operands)


def test_when_dx_goes_by_blocks() -> None:
    def chosen(density: float, block: int, pixels: int, dtype: torch.dtype, *kernel: int) -> bool:
        weight = block_sparse((256, 256, *kernel), Block(block, block), density, dtype=dtype)
        geometry = Geometry(weight.shape, 1, *[(1,) * len(kernel)] * 3)
        x_shape = (pixels, 256, *(1,) * len(kernel))
        return bool(blocksparse_transpose.dx_by_blocks(x_shape, weight.values, geometry))

    assert chosen(0.4, 16, 512, torch.float32, 3, 3)
    assert not chosen(0.6, 16, 512, torch.float32, 3, 3)
    assert not chosen(0.4, 16, 16, torch.float32, 3, 3)
    assert not chosen(0.4, 16, 512, torch.bfloat16, 3, 3)
    assert not chosen(0.4, 4, 512, torch.float32, 3, 3)
    assert chosen(0.2, 4, 512, torch.float32, 3, 3)
    assert not chosen(0.4, 16, 512, torch.float32)
    for kernel, most in ((3, 0.25), (1, 0.5)):
        shape, steps = (256, 256, kernel), ((2,), (kernel // 2,), (1,))
        for density in (most, most + 0.05):
            values = torch.empty(int(density * 256 * kernel), 16, 16)
            geometry = Geometry(shape, 1, *steps)
            by_blocks = blocksparse_transpose.dx_by_blocks((512, 256, 4), values, geometry)
            assert by_blocks == (density == most)
    strided = Geometry((8, 8, 3), 1, (2,), (1,), (1,))
    assert blocksparse_transpose.transposed_geometry(strided) is None
    far = Geometry((8, 8, 3), 1, (1,), (3,), (1,))
    assert blocksparse_transpose.transposed_geometry(far) is None


@pytest.fixture
def dvalues_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes."""
    monkeypatch.setattr(blocksparse_gradient, "dvalues_by_blocks", lambda *sizes: True)


# Beside the drawn ones: strips of several images, rows, and parts of a row, and several sums.
MANY_PIXELS = (
    typical(batch=9, group_in=40, group_out=40, block=Block(16, 16), dtype=torch.float32),
    typical(batch=2, extents=(70, 90), block=Block(2, 8)),
    typical(batch=2, group_in=300, extents=(5, 900), stride=(1, 2), block=Block(24, 24)),
    typical(batch=5, kernel=(1, 1), padding=(0, 0), extents=(40, 33), channels_last=False),
)


@pytest.mark.usefixtures("dvalues_by_blocks")
def test_dvalues_by_live_blocks(blocksparse_target: str, threads: int) -> None:
    for index, case in enumerate((*CASES[1::3], *MANY_PIXELS)):
        weight, x = case.weight(), case.x()
        values = weight.values.requires_grad_()
        gradients = []
        for count in (1, 3):
            torch.set_num_threads(count)
            y = blocksparse_conv(x, weight, **case.geometry)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(index)).to(y.dtype)
            gradients += torch.autograd.grad(y, values, dy)
        assert torch.equal(*gradients), (index, case)
        exact = [t.detach().double() for t in (x, weight.to_dense(), dy)]
        indices = (weight.crow_indices, weight.col_indices, weight.block, weight.groups)
        wanted, sizes = (
            reference.blocksparse_gather(dense_gradients(case, *operands)[1], *indices)
            for operands in (exact, [t.abs() for t in exact])
        )
        products = max(1, dy.numel() // dy.shape[1])
        try:
            SumOracle(wanted, sizes, products, case.dtype).check(gradients[0])
        except AssertionError as error:
            raise AssertionError(f"case {index}: {case}") from error


def test_dy_of_the_wrong_shape() -> None:
    weight = block_sparse((6, 5, 3), Block(2, 4))
    operands = (torch.randn(2, 6, 9), torch.randn(2, 5, 9), weight.crow_indices, weight.col_indices)
    with pytest.raises(ValueError, match=r"dy has shape \[2, 6, 9\], expected \[2, 6, 7\]"):
        ops.blocksparse_dvalues(*operands, 2, 4, weight.shape, 1, (1,), (0,), (1,))


@pytest.mark.usefixtures("dvalues_by_blocks")
def test_nan_goes_through_the_pixels_that_see_it() -> None:
    x = torch.randn(2, 16, 6, 6)
    x[1, 3, 0, 5] = torch.nan  # a corner: taps left of the middle or below it are not laid over it
    weight = block_sparse((32, 16, 3, 3), Block(16, 16), 1.0)
    weight.values.requires_grad_()
    blocksparse_conv(x, weight, padding=1).sum().backward()
    wrong = replace(weight, values=weight.values.grad.isnan().float()).to_dense()
    seen = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert torch.equal(wrong[:, 3], seen.expand(32, 3, 3).float())
    assert not wrong[:, :3].any()
    assert not wrong[:, 4:].any()


@pytest.mark.usefixtures("dvalues_by_blocks")
@pytest.mark.parametrize("kernel", [(), (2, 2)], ids=str)
def test_derivatives_by_live_blocks(serial_target: str, kernel: tuple[int, ...]) -> None:
    groups = 2 if kernel else 1
    sparse = block_sparse((4, 3, *kernel), Block(2, 2), 0.6, groups, torch.float64)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        weight = replace(sparse, values=values)
        return blocksparse_conv(x, weight, None, 2, 1) if kernel else blocksparse_linear(x, weight)

    operands = (double(2, 3 * groups, *(3,) * len(kernel)), double(*sparse.values.shape))
    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands, fast_mode=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    got = torch.autograd.grad(compiled(*operands).square().sum(), operands)
    want = torch.autograd.grad(layer(*operands).square().sum(), operands)
    torch.testing.assert_close(got, want)
    check_nested_transforms(layer, operands)


def test_when_dvalues_go_by_blocks(serial_target: str) -> None:
    def chosen(
        density: float, block: Block, pixels: int, kernel: int, dtype: torch.dtype = torch.float32
    ) -> bool:
        shape = (256, 256, *(3,) * kernel)
        count = int(density * 65536 * 3**kernel / (block.rows * block.cols))
        geometry = Geometry(shape, 1, *[(1,) * kernel] * 3)
        x = torch.empty(pixels, 256, *(1,) * kernel, dtype=dtype)
        return bool(
            blocksparse_gradient.dvalues_by_blocks(x, count, block.rows, block.cols, geometry)
        )

    if "avx512" not in _C.machine_targets():
        pytest.skip("chosen for this machine's lanes")
    _C.force_target("avx2")
    assert chosen(0.5, Block(8, 8), 4, 2)
    _C.force_target("avx512")
    for dtype in (torch.float32, torch.float16):
        assert chosen(0.5, Block(16, 16), 4, 2, dtype)
    assert not chosen(0.6, Block(16, 16), 4, 2)
    assert not chosen(0.5, Block(8, 8), 4, 2)
    assert chosen(0.25, Block(8, 8), 4, 2)
    assert chosen(0.125, Block(1, 16), 4, 2)
    assert not chosen(0.2, Block(1, 16), 4, 2)
    assert not chosen(0.2, Block(16, 16), 4, 2, torch.bfloat16)
    assert chosen(0.25, Block(16, 16), 128, 0)
    assert not chosen(0.25, Block(16, 16), 64, 0)
    assert not chosen(0.1, Block(16, 16), 4, 2, torch.float64)
    _C.force_target("serial")
    assert not chosen(0.1, Block(16, 16), 4, 2)


@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=3) if any(w)])
@pytest.mark.parametrize("axes", [0, 2])
def test_any_operand_alone(axes: int, wanted: tuple[bool, bool, bool]) -> None:
    weight = block_sparse((6, 5, *(3,) * axes), Block(4, 2))
    x, bias = torch.randn(2, 5, *(4,) * axes), torch.randn(6)
    operands = [x.requires_grad_(wanted[0]), weight.values.requires_grad_(wanted[1])]
    operands += [bias.requires_grad_(wanted[2])]
    call = blocksparse_conv if axes else blocksparse_linear
    got = torch.autograd.grad(
        call(x, weight, bias).square().sum(), list(compress(operands, wanted))
    )
    dense = weight.to_dense()
    twin = CONVS[axes - 1](x, dense, bias) if axes else F.linear(x, dense, bias)
    expected = torch.autograd.grad(twin.square().sum(), list(compress(operands, wanted)))
    torch.testing.assert_close(got, expected)


def test_no_gradient_is_wanted_where_none_is_asked_for() -> None:
    weight, x = block_sparse((6, 12), Block(2, 4)), torch.randn(2, 12)
    assert not blocksparse_linear(x, weight).requires_grad
    weight.values.requires_grad_()
    with torch.no_grad():
        assert not blocksparse_linear(x, weight).requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_one_output_of_one_channels_last_image(packed: bool) -> None:
    sparse = block_sparse((1, 4, 2, 3), Block(1, 2), 0.6)
    held = BlockSparsePanels.from_blocksparse(sparse) if packed else sparse
    x = torch.randn(1, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    stored = (held.panels if packed else held.values).clone().requires_grad_()
    weight = replace(held, **{"panels" if packed else "values": stored})
    y = blocksparse_conv(x, weight)
    dx, _ = torch.autograd.grad(y, (x, stored), torch.ones_like(y))
    dense = sparse.to_dense()
    torch.testing.assert_close(dx, F.conv_transpose2d(torch.ones_like(y), dense))


def test_padding_gets_no_gradient() -> None:
    weight = block_sparse((5, 3, 3), Block(4, 4), 1.0)
    weight.values.requires_grad_()
    blocksparse_conv(torch.randn(2, 3, 7), weight).square().sum().backward()
    replace(weight, values=weight.values.grad).validate()


def test_raw_op_has_the_same_gradient() -> None:
    case = typical()
    weight, x, bias = case.weight(), case.x().requires_grad_(), torch.randn(21, requires_grad=True)
    operands = (x, weight.values.requires_grad_(), bias)
    blocks = (weight.values, weight.crow_indices, weight.col_indices)
    geometry = (case.shape, 1, (1, 1), (1, 1), (1, 1), 0)
    raw = ops.blocksparse_product(x, *blocks, bias, None, *geometry, "gelu")
    public = blocksparse_conv(x, weight, bias, padding=1, activation="gelu")
    assert torch.equal(raw, public)
    for got, want in zip(
        torch.autograd.grad(raw.sum(), operands),
        torch.autograd.grad(public.sum(), operands),
        strict=True,
    ):
        assert torch.equal(got, want)


class Twin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse = block_sparse((6, 4, 3), Block(4, 2))
        self.values = torch.nn.Parameter(self.sparse.values)
        self.bias = torch.nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return blocksparse_conv(x, replace(self.sparse, values=self.values), self.bias, padding=1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms() -> None:
    layer, x = Twin(), torch.randn(3, 2, 4, 7)
    params = dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, params, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(params, sample), list(params.values()))
        for got, want in zip(per_sample.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want)
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(sample) for sample in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_have_the_gradients_of_values(dtype: torch.dtype) -> None:
    weight = block_sparse((6, 10), Block(4, 3), dtype=dtype)
    packed = BlockSparsePanels.from_blocksparse(weight)
    x, values, panels = torch.randn(4, 10).to(dtype), weight.values, packed.panels
    for w in (weight, packed):
        next(iter(w._tensors().values())).requires_grad_()
        blocksparse_linear(x, w).float().square().sum().backward()
    assert values.grad is not None
    assert panels.grad is not None
    assert torch.equal(replace(packed, panels=panels.grad).to_blocksparse().values, values.grad)


def test_forward_mode_is_refused_and_not_dropped() -> None:
    weight, x = block_sparse((6, 10), Block(2, 4)), torch.randn(4, 10)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: blocksparse_linear(x, weight), (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_the_dense_layer_does(dtype: torch.dtype) -> None:
    layer, x = Twin(), torch.randn(3, 4, 7, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        twin = F.conv1d(x, layer.sparse.to_dense(), layer.bias, padding=1)
    assert y.dtype == twin.dtype == dtype
    torch.testing.assert_close(y, twin)
    y.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(serial_target: str) -> None:
    weight = block_sparse((6, 12), Block(2, 4), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = blocksparse_linear(torch.randn(3, 12, dtype=torch.float64), weight)
    assert y.dtype == torch.float64
