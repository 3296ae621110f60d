"""Block-sparse layers by tiles of a matrix unit: shapes that fill them, x that is not finite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import SumOracle, integers
from conv_cases import ConvCase, block_sparse
from gossamer import _C, Block, blocksparse_conv, blocksparse_linear, reference
from gossamer.formats import BlockSparse, BlockSparsePanels
from gossamer.ops.blocksparse_choice import blocksparse_choice
from torch import Tensor

TARGET, BF16 = "amx_bf16", torch.bfloat16
pytestmark = pytest.mark.skipif(
    TARGET not in _C.machine_targets(), reason="this machine has no matrix unit"
)
BLOCKS = [Block(*b) for b in ((4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (16, 8), (20, 7))]
NAMES = [f"{b.rows}x{b.cols}" for b in BLOCKS]


@pytest.fixture(autouse=True)
def _tiles() -> Iterator[None]:
    before = _C.target()
    _C.force_target(TARGET)
    yield
    _C.force_target(before)


def case_of(seed: int, block: Block) -> ConvCase:
    r = random.Random(seed)
    axes = r.choice((1, 2, 2, 2, 3))
    kernel = tuple(r.choice((1, 3, 3, r.randint(1, 5))) for _ in range(axes))
    return ConvCase(
        batch=r.choice((1, 2, 5)),
        groups=r.choice((1, 1, 2)),
        group_in=r.choice((32, 48, 64, 70)),
        group_out=r.choice((16, 33, 64)),
        kernel=kernel,
        extents=tuple(r.randint(k, (60, 17, 6)[axes - 1]) for k in kernel),
        stride=tuple(r.choice((1, 1, 2)) for _ in range(axes)),
        padding=tuple(r.randint(0, 2) for _ in range(axes)),
        dilation=tuple(1 if k > 3 else r.choice((1, 1, 2)) for k in kernel),
        block=block,
        density=r.choice((0.25, 0.5, 1.0)),
        dtype=BF16,
        channels_last=r.random() < 0.6,
    )


Weight = BlockSparse | BlockSparsePanels


def product(case: ConvCase, x: Tensor, weight: Weight, *rest: Any, **more: Any) -> Tensor:
    return blocksparse_conv(x, weight, *rest, **case.geometry, **more)


def kernel(x: Tensor, weight: BlockSparse, **geometry: Any) -> str:
    return str(blocksparse_choice(x.shape, weight, **geometry)["kernel"])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_matches_dense(block: Block, seed: int) -> None:
    case = case_of(seed, block)
    reaches = zip(case.kernel, case.dilation, case.extents, strict=True)
    if any((k - 1) * d >= e for k, d, e in reaches):
        case = ConvCase(**{**vars(case), "dilation": (1,) * len(case.kernel)})
    weight, x, bias = case.weight(), case.x(), torch.randn(case.shape[0]).to(BF16)
    activation = (None, "relu", "gelu", "silu")[seed % 4]
    oracle = case.oracle(x, weight, bias)
    oracle.y = reference.activate(oracle.y, activation)
    oracle.limit *= 1.2
    y = product(case, x, weight, bias, activation=activation)
    oracle.check(y)
    packed = BlockSparsePanels.from_blocksparse(weight)
    assert torch.equal(product(case, x, packed, bias, activation=activation), y)


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_linear_matches_dense(block: Block) -> None:
    for rows, columns, density in ((1, 64, 0.5), (16, 96, 0.3), (17, 520, 0.4), (131, 70, 1.0)):
        weight = block_sparse((81, columns), block, density, dtype=BF16)
        x, bias = torch.randn(rows, columns).to(BF16), torch.randn(81).to(BF16)
        dense, wide = weight.to_dense().double(), x.double()
        y = wide @ dense.t() + bias.double()
        size = wide.abs() @ dense.abs().t() + bias.double().abs()
        actual = blocksparse_linear(x, weight, bias)
        SumOracle(y, size, columns, BF16).check(actual)
        packed = BlockSparsePanels.from_blocksparse(weight)
        assert torch.equal(blocksparse_linear(x, packed, bias), actual)


def test_choice_is_of_what_is_live() -> None:
    x = torch.randn(8, 64).to(BF16)
    assert kernel(x, block_sparse((64, 64), Block(16, 16), 0.4, dtype=BF16)) == "tiles"
    assert kernel(x, block_sparse((64, 64), Block(4, 4), 0.5, dtype=BF16)) == "tiles"
    assert kernel(x, block_sparse((64, 64), Block(1, 1), 0.03, dtype=BF16)) == "pixel_lanes"
    assert kernel(x, block_sparse((4, 64), Block(4, 1), 0.3, dtype=BF16)) == "pixel_lanes"
    assert kernel(x.float(), block_sparse((64, 64), Block(16, 16))) != "tiles"


@pytest.mark.parametrize("block", [Block(8, 8), Block(16, 16)], ids=["8x8", "16x16"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_x_goes_through_live_blocks_only(poison: float, block: Block) -> None:
    case = ConvCase(
        2, 2, 24, 40, (3, 3), (9, 7), (1, 1), (1, 1), (1, 1), block, 0.4, BF16, channels_last=True
    )
    weight, x = case.weight(), case.x()
    x[1, 23, 3, 3] = x[0, 24, 0, 0] = poison
    assert kernel(x, weight, **case.geometry) == "tiles"
    one = [(1, 1), (1, 1)]
    want = reference.blocksparse_conv(
        x.double(), weight.to(torch.float64), None, *one[:1], one, *one[:1]
    )
    y = product(case, x, weight)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    finite = torch.where(x.isfinite(), x, 0)
    case.oracle(finite, weight, None).check(product(case, finite, weight))
    clean = want.isfinite()
    torch.testing.assert_close(y[clean].double(), want[clean], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 15, 16, 49])
def test_nothing_beside_x_is_read(rows: int) -> None:
    for columns in (32, 41):
        around = torch.full((rows * columns + 4096,), torch.nan, dtype=BF16)
        x = around[2048:-2048].view(rows, columns)
        x.copy_(torch.randn(rows, columns))
        weight = block_sparse((32, columns), Block(8, 8), 1.0, dtype=BF16)
        assert blocksparse_linear(x, weight).isfinite().all()
        conv = block_sparse((32, columns, 3), Block(8, 8), 1.0, dtype=BF16)
        y = blocksparse_conv(x.t()[None], conv, padding=1)
        assert y.isfinite().all()


def test_whole_numbers_are_exact() -> None:
    case = case_of(1, Block(16, 16))
    weight = case.weight()
    values = weight.values.float().clamp(-3, 3).round().to(BF16)
    weight = BlockSparse(values, weight.crow_indices, weight.col_indices, case.shape, case.groups)
    x = integers(*case.x().shape, limit=3, dtype=BF16)
    expected = case.dense(x.double(), weight.to_dense().double(), None)
    assert torch.equal(product(case, x, weight), expected.to(BF16))


def test_same_result_for_any_thread_count(threads: int) -> None:
    for seed in range(6):
        case = case_of(seed, BLOCKS[seed % len(BLOCKS)])
        weight, x = case.weight(), case.x()
        torch.set_num_threads(1)
        expected = product(case, x, weight)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(product(case, x, weight), expected)


@pytest.mark.parametrize("channels_last", [True, False])
def test_same_bits_where_threads_leave_strips_of_one_tile(
    threads: int, channels_last: bool
) -> None:
    weight = block_sparse((512, 512, 3, 3), Block(16, 16), 0.3, dtype=BF16)
    for images, size in ((2, (3, 4)), (5, (3, 3)), (3, (2, 5)), (1, (12, 1))):
        x = torch.randn(images, 512, *size).to(BF16)
        x = x.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        assert kernel(x, weight, padding=1) == "tiles"
        torch.set_num_threads(1)
        expected = blocksparse_conv(x, weight, padding=1)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(blocksparse_conv(x, weight, padding=1), expected)


def test_the_kernel_does_not_depend_on_which_thread_meets_large_sums(threads: int) -> None:
    dense = torch.ones(64, 64, dtype=BF16)
    dense[16:32, 16] = -1
    weight = BlockSparse.from_dense(dense, Block(16, 16))
    # Tiles take subnormal numbers for 0, the vector kernels do not. The products of neighbouring
    # tiles' sums overflow to both infinities, each in another thread's tokens.
    x = torch.full((400, 64), 2.0**-130, dtype=BF16)
    x[0, 0] = x[-1, 16] = 2.0**66
    assert kernel(x, weight) == "tiles"
    for count in (1, 2):
        torch.set_num_threads(count)
        assert (blocksparse_linear(x, weight)[1:-1] == 0).all()
