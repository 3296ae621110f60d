"""The block-sparse convolutions of a GPU, against torch's dense one in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocksparse_conv import CODES, TILES, WGMMA, WGMMA_TILES, BlockConv, build
from cases import bits
from conv_cases import CASES, typical
from devices import SCHEDULES, Sanitizers
from emulator import Emulator, KernelLibrary
from gossamer import _C, Block
from gossamer.formats import BlockSparse
from gossamer.formats.geometry import channels_last
from gossamer.ops.blocksparse_choice import blocksparse_ways
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)

# One for each mechanism of the tensor-core kernel; blocks whose channels lie side by side at
# multiples of 16 bytes are copied, the others gathered.
MMA_CASES = {
    "blocks of 16": typical(block=Block(16, 16), group_in=48, group_out=80, density=0.3),
    "blocks of 32": typical(
        block=Block(32, 32), group_in=96, group_out=300, extents=(13, 11), density=0.3
    ),
    "blocks of 64": typical(block=Block(64, 64), group_in=136, group_out=200),
    "wide and flat": typical(block=Block(16, 64), group_in=64, group_out=33),
    "high and narrow": typical(block=Block(64, 16), group_in=40, group_out=100),
    "padded blocks": typical(block=Block(24, 40), group_in=80, group_out=50),
    "small blocks": typical(block=Block(5, 8), group_in=24, group_out=37),
    "channels that end in a block": typical(block=Block(32, 32), group_in=40, group_out=40),
    "channels without alignment": typical(block=Block(16, 16), group_in=19, group_out=40),
    "columns without alignment": typical(block=Block(4, 3), group_in=24, group_out=24),
    "channels first": typical(block=Block(32, 32), group_in=64, group_out=48, channels_last=False),
    "groups": typical(block=Block(16, 16), groups=3, group_in=32, group_out=24),
    "stride and dilation": typical(
        block=Block(16, 16), group_in=32, stride=(2, 3), dilation=(3, 1), padding=(3, 2)
    ),
    "three axes": typical(
        block=Block(16, 32),
        group_in=32,
        kernel=(2, 3, 1),
        extents=(4, 5, 3),
        stride=(1, 2, 1),
        padding=(1, 0, 0),
        dilation=(1, 1, 1),
    ),
    "one axis": typical(
        block=Block(16, 16),
        group_in=16,
        kernel=(5,),
        extents=(300,),
        stride=(1,),
        padding=(2,),
        dilation=(1,),
    ),
    "a linear layer": typical(
        batch=70, block=Block(32, 32), group_in=520, group_out=70, kernel=(), extents=()
    ),
    "nothing live": typical(block=Block(16, 16), density=0.0),
    "all live": typical(block=Block(16, 16), group_in=64, group_out=64, density=1.0),
}
# The Hopper kernel takes blocks of 16, 32 or 64 and channels that lie side by side. x comes in
# tiles where a pixel of y sees one of x, otherwise pixel by pixel.
LINEAR = {"kernel": (), "extents": (), "channels_last": True}
POINTWISE = {"kernel": (1, 1), "padding": (0, 0)}
WGMMA_CASES = {
    **{
        name: MMA_CASES[name]
        for name in (
            "blocks of 16", "blocks of 32", "blocks of 64", "wide and flat", "high and narrow",
            "channels that end in a block", "groups", "stride and dilation", "three axes",
            "a linear layer", "all live",
        )
    },
    "rows of 16": typical(block=Block(16, 16), batch=300, group_in=136, group_out=600, **LINEAR),
    "rows of 32": typical(
        block=Block(32, 32), batch=500, group_in=200, group_out=330, density=0.1, **LINEAR
    ),
    "rows of 64": typical(block=Block(64, 64), batch=129, group_in=328, group_out=321, **LINEAR),
    "few channels": typical(block=Block(32, 16), group_in=8, group_out=3, **POINTWISE),
    "pointwise groups": typical(
        block=Block(16, 32), groups=2, group_in=96, group_out=80, **POINTWISE
    ),
    "groups that end in a block": typical(
        block=Block(16, 32), groups=3, group_in=40, group_out=24, **POINTWISE
    ),
    "one live block": typical(
        block=Block(16, 16), batch=3, group_in=512, group_out=900, density=0.002, **LINEAR
    ),
}  # fmt: skip
SEES_ITSELF = ("a linear layer", "rows of", "few channels", "pointwise groups", "one live block")


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return build(emulator)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("name", MMA_CASES)
def test_tiles_match_dense(kernels: KernelLibrary, sanitizers: Sanitizers, name: str) -> None:
    # The others differ in their sizes alone.
    for tile in (1, 4) if sanitizers.on else range(len(TILES)):
        conv = BlockConv.of(replace(MMA_CASES[name], dtype=HALVES[tile % 2]), tile % 4 > 0)
        expected = conv.expected()
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, tile):
                check_exact(conv.run(kernels, tile), expected)


@pytest.mark.parametrize("name", WGMMA_CASES)
def test_hopper_tiles_match_dense(
    kernels: KernelLibrary, sanitizers: Sanitizers, name: str
) -> None:
    for tile, (_, cluster) in enumerate(WGMMA_TILES):
        if cluster > 1 and not name.startswith(SEES_ITSELF):
            continue
        if sanitizers.on and tile > 1:
            continue
        conv = BlockConv.of(replace(WGMMA_CASES[name], dtype=HALVES[tile % 2]), tile == 1)
        expected = conv.expected()
        for schedule, seed in SCHEDULES[:: len(SCHEDULES) - 1]:
            with kernels.schedule(schedule, seed):
                check_exact(conv.run(kernels, tile, kernel=WGMMA), expected)


@pytest.mark.parametrize("number", [n for n in range(0, 300, 5) if len(CASES[n].kernel) > 1])
def test_any_hopper_convolution_matches_dense(kernels: KernelLibrary, number: int) -> None:
    case, sizes = CASES[number], (16, 32, 64)
    conv = BlockConv.of(
        replace(
            case,
            batch=max(case.batch, 1),
            group_in=(8, 16, 40, 64, 72)[number // 5 % 5],
            block=Block(sizes[number // 5 % 3], sizes[number // 15 % 3]),
            density=max(case.density, 0.2),
            channels_last=True,
            dtype=HALVES[number // 5 % 2],
        )
    )
    if len(conv.weight.col_indices) > 0:
        check_exact(conv.run(kernels, 1, kernel=WGMMA), conv.expected())


@pytest.mark.parametrize("number", range(0, 300, 5))
def test_any_convolution_matches_dense(kernels: KernelLibrary, number: int) -> None:
    conv = BlockConv.of(replace(CASES[number], dtype=DTYPES[number // 5 % 4]), number % 2 > 0)
    if conv.case.batch > 0:
        check_exact(conv.run(kernels), conv.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_passes_in_any_order(
    kernels: KernelLibrary, sanitizers: Sanitizers, dtype: torch.dtype
) -> None:
    # More stages than there are in shared memory, of several tiles both ways.
    conv = BlockConv.of(
        typical(block=Block(32, 32), group_in=96, group_out=140, density=0.4, dtype=dtype)
    )
    expected = conv.expected()
    for schedule, seed in SCHEDULES[::3] if sanitizers.on else SCHEDULES:
        with kernels.schedule(schedule, seed):
            check_exact(conv.run(kernels, 3), expected)


@pytest.mark.parametrize("name", ["rows of 16", "blocks of 32"])
def test_hopper_passes_in_any_order(
    kernels: KernelLibrary, sanitizers: Sanitizers, name: str
) -> None:
    conv = BlockConv.of(replace(WGMMA_CASES[name], dtype=torch.bfloat16))
    expected, tile = conv.expected(), 0 if name.startswith(SEES_ITSELF) else 1
    for schedule, seed in SCHEDULES[::3] if sanitizers.on else SCHEDULES:
        with kernels.schedule(schedule, seed):
            check_exact(conv.run(kernels, tile, kernel=WGMMA), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_hopper_bias_and_activation(
    kernels: KernelLibrary, activation: str, dtype: torch.dtype
) -> None:
    case = typical(block=Block(16, 16), group_in=24, group_out=37, dtype=dtype)
    conv = BlockConv(case, case.weight(), case.x(), torch.randn(37).to(dtype), activation)
    oracle = case.oracle(conv.x, conv.weight, conv.bias)
    oracle.y = getattr(torch.nn.functional, activation)(oracle.y)
    oracle.limit += 2.0**-22  # __fdividef and expf
    oracle.check(conv.run(kernels, 1, kernel=WGMMA))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_bias_and_activation(
    kernels: KernelLibrary, activation: str, dtype: torch.dtype, channels_last: bool
) -> None:
    case = typical(block=Block(16, 16), dtype=dtype, channels_last=channels_last)
    conv = BlockConv(case, case.weight(), case.x(), torch.randn(21).to(dtype), activation)
    oracle = case.oracle(conv.x, conv.weight, conv.bias)
    oracle.y = getattr(torch.nn.functional, activation)(oracle.y)
    oracle.limit += 2.0**-22 * (dtype != torch.float64)  # __fdividef and expf
    oracle.check(conv.run(kernels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_goes_through_live_blocks_only(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    cases = [
        (typical(block=block, density=0.3, dtype=dtype, group_in=40, bias=False), {})
        for block in (Block(16, 16), Block(5, 4), Block(8, 24))
    ]
    if dtype in HALVES:
        cases += [(cases[0][0], {"tile": 1, "kernel": WGMMA})]
        cases += [(replace(cases[0][0], **POINTWISE), {"tile": 0, "kernel": WGMMA})]
    for case, way in cases:
        conv = BlockConv.of(case)
        conv.x[0, 3, 4, 5], conv.x[1, 17, 0, 0], conv.x[1, 39, 8, 6] = (
            torch.inf,
            torch.nan,
            -torch.inf,
        )
        bad = (~conv.x.isfinite()).double()
        live = replace(conv.weight, values=torch.ones_like(conv.weight.values)).to_dense().double()
        reached = case.dense(bad, live, None) > 0
        y = conv.run(kernels, **way)
        assert reached.any()
        assert not reached.all()
        assert bool(y[~reached].isfinite().all())
        conv.x = conv.x.nan_to_num(0, 0, 0)
        assert torch.equal(y[~reached], conv.run(kernels, **way)[~reached])
        assert not y[reached].isfinite().all()


@pytest.mark.parametrize("margin", [1, 3, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_memory_of_any_alignment(kernels: KernelLibrary, dtype: torch.dtype, margin: int) -> None:
    conv = BlockConv.of(typical(block=Block(16, 16), group_in=32, group_out=24, dtype=dtype))
    check_exact(conv.run(kernels, margin=margin), conv.expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_indices_that_nobody_checked_stay_in_memory(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    """What comes out is anything; that nothing else was read, the sanitizers say."""
    wild = torch.tensor([2**31 - 1, -(2**31), -1, 7, 10**6, 0], dtype=torch.int32)
    conv = BlockConv.of(typical(block=Block(16, 16), group_in=32, group_out=40, dtype=dtype))
    for _ in range(8):
        for t in (conv.weight.crow_indices, conv.weight.col_indices):
            at = torch.randint(len(t), (3,))
            t[at] = wild[torch.randint(len(wild), (3,))]
        conv.run(kernels)
        if dtype in HALVES:
            conv.run(kernels, 1, kernel=WGMMA)
        sizes, indices = conv.sizes(), (conv.weight.crow_indices, conv.weight.col_indices)
        dense = torch.empty(40, 9, 32, dtype=dtype)
        kernels.call("to_dense", CODES[dtype], sizes, *indices, conv.weight.values, dense)
        kernels.call("gather", CODES[dtype], sizes, *indices, dense, conv.weight.values)


# ---- conversions --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions_are_those_of_the_cpu(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    for number in range(DTYPES.index(dtype), 300, 10):
        conv = BlockConv.of(replace(CASES[number], dtype=dtype))
        weight, sizes = conv.weight, conv.sizes()
        indices = (weight.crow_indices, weight.col_indices)
        dense = channels_last(weight.to_dense())
        dense[torch.rand(dense.shape) < 0.2] = -0.0
        live = torch.full(weight.grid, 7, dtype=torch.uint8)
        kernels.call("find_live", CODES[dtype], sizes, dense, live)
        size = (weight.block.rows, weight.block.cols, weight.groups)
        assert torch.equal(live, torch.ops.gossamer.blocksparse_find_live(dense, *size))
        values = torch.full_like(weight.values, torch.nan)
        kernels.call("gather", CODES[dtype], sizes, *indices, dense, values)
        expected = torch.ops.gossamer.blocksparse_gather(dense, *indices, *size)
        assert torch.equal(bits(values), bits(expected))
        back = torch.full_like(dense, torch.nan)
        kernels.call("to_dense", CODES[dtype], sizes, *indices, values, back)
        assert torch.equal(back, dense)


# ---- the choice ---------------------------------------------------------------------------------

H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}
A100 = {"capability": 80, "multiprocessors": 108, "shared_bytes": 163 << 10, "l2_bytes": 40 << 20}
L4 = {"capability": 89, "multiprocessors": 58, "shared_bytes": 99 << 10, "l2_bytes": 48 << 20}


def choose(
    pixels: int, c_out: int, c_in: int, block: int, density: float, device: dict[str, int] = A100
) -> tuple[int, int]:
    """The tile of a 3 x 3 over one row of pixels."""
    grid = -(-c_out // block) * 9 * -(-c_in // block)
    ones = (1, 1, 1)
    chosen = _C.blocksparse_choose(
        *((1, 1, 1, pixels, c_in), (1, 1, 1, pixels, c_out), "bfloat16", block, block),
        *(int(grid * density), 1, (1, 3, 3), ones, (0, 1, 1), ones, True, 1, device),
    )
    assert chosen["kernel"] == ("wgmma" if device is H200 else "mma")
    tile = chosen["tile_pixels"], chosen["tile_outputs"]
    assert chosen["blocks"] >= -(-pixels // tile[0]) * -(-c_out // tile[1])
    return tile


def test_choice_shares_x_among_outputs() -> None:
    many = 64 * 28 * 28
    assert choose(many, 512, 512, 32, 0.25) in TILES[:2]
    assert choose(many, 512, 512, 16, 0.25) in TILES[:2]
    assert choose(many, 64, 64, 32, 0.25) == (128, 64)  # there are no more outputs
    # Neither a tile that most of is empty nor one that leaves most multiprocessors idle.
    assert choose(49, 512, 512, 32, 0.25) in TILES[3:]
    assert choose(8, 4096, 512, 32, 0.25) == (16, 64)


def test_choice_fits_the_device() -> None:
    for pixels in (1, 100, 10**5):
        for c_out in (16, 64, 2048):
            for block in (1, 16, 64):
                assert choose(pixels, c_out, 256, block, 0.5, L4) in TILES[2:]


def test_choice_on_hopper() -> None:
    many = 64 * 28 * 28
    # Taps lie apart, so no x is shared in a cluster; fewer outputs where there are few pixels.
    assert choose(many, 512, 512, 32, 0.25, H200) == (128, 256)
    assert choose(many, 64, 64, 32, 0.25, H200) == (128, 64)
    assert choose(49, 512, 512, 32, 0.25, H200) == (128, 64)


def test_ways_are_those_that_the_kernels_take() -> None:
    weight = BlockSparse.from_dense(torch.ones(64, 64).bfloat16(), Block(16, 16))
    ways = blocksparse_ways((300, 64), weight, device=H200)
    assert [way[1:3] for way in ways if way[0] == "mma"] == list(TILES)
    assert [way[2:] for way in ways if way[0] == "wgmma"] == list(WGMMA_TILES)
    assert {way[0] for way in blocksparse_ways((300, 64), weight, device=A100)} == {"mma"}
    for other in (
        BlockSparse.from_dense(torch.ones(64, 64).bfloat16(), Block(16, 8)),
        BlockSparse.from_dense(torch.ones(64, 68).bfloat16(), Block(16, 16)),
        BlockSparse.from_dense(torch.zeros(64, 64).bfloat16(), Block(16, 16)),
        BlockSparse.from_dense(torch.ones(16, 1 << 16).bfloat16(), Block(16, 16)),
    ):
        ways = blocksparse_ways((300, other.shape[1]), other, device=H200)
        assert {way[0] for way in ways} == {"mma"}
    kernel = BlockSparse.from_dense(torch.ones(64, 64, 3, 3).bfloat16(), Block(16, 16))
    ways = blocksparse_ways((1, 64, 9, 9), kernel, channels_last=True, device=H200)
    assert [way[2:] for way in ways if way[0] == "wgmma"] == list(WGMMA_TILES[1:])
    # Channels that lie apart are laid side by side first, where they come in eights.
    assert blocksparse_ways((1, 64, 9, 9), kernel, device=H200) == ways
    kernel = BlockSparse.from_dense(torch.ones(64, 60, 3, 3).bfloat16(), Block(16, 16))
    ways = blocksparse_ways((1, 60, 9, 9), kernel, device=H200)
    assert {way[0] for way in ways} == {"mma"}
