"""Every wrapper in common/ptx_sm90.cuh against its definition, as in test_primitives_mma.py."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import pytest
import torch
from devices import Device
from mma_operands import LEGAL_PAIRS, fragment_a, fragment_d, matrix_d, metadata, random_operand
from torch import Tensor

SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by the number of `enum class Swizzle`


def swizzled(address: int, span: int) -> int:
    """128 bytes: 16-byte chunk c of every 8 rows' row r is at chunk c ^ r. Shorter spans: less."""
    chunk, row = address // 16 % 8, address // 128 % 8
    moved = chunk ^ (row % (span // 16) if span else 0)
    return address // 128 * 128 + moved * 16 + address % 16


def in_shared(tile: Tensor, span: int) -> Tensor:
    """The bytes of a tile as they lie in shared memory."""
    where = torch.tensor([swizzled(address, span) for address in range(tile.nbytes)])
    image = torch.zeros(int(where.max()) + 1, dtype=torch.uint8)
    image[where] = tile.contiguous().view(torch.uint8).flatten()
    return image[: tile.nbytes]


# ---- wgmma and wgmma.sp --------------------------------------------------------------------------

WGMMA_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def laid_out(matrix: Tensor, swizzle: int) -> tuple[Tensor, list[int]]:
    """[rows, columns] as wgmma reads it: the bytes, and [count, first, leading, stride]."""
    span, row_bytes = SPANS[swizzle], matrix.shape[1] * matrix.itemsize
    data = matrix.contiguous().view(torch.uint8)
    if span:
        # With room in the span, begin at some other chunk of it, as later steps along K do.
        leading, first = 16, (span - row_bytes) // 32 * 32
        stride = 16 * span  # twice what 8 rows take
    else:
        leading, stride, first = 128, 128 * (row_bytes // 16) + 256, 0
    image = torch.zeros(stride * (matrix.shape[0] // 8), dtype=torch.uint8)
    for row, chunk in itertools.product(range(matrix.shape[0]), range(row_bytes // 16)):
        if span:
            address = swizzled(row // 8 * stride + row % 8 * span + first + 16 * chunk, span)
        else:
            address = row // 8 * stride + chunk * leading + row % 8 * 16
        image[address : address + 16] = data[row, 16 * chunk : 16 * chunk + 16]
    return image, [image.numel(), first, leading, stride]


def check_wgmma(
    device: Device, dtype: torch.dtype, n: int, swizzle: int, sparse: bool, registers: bool,
    selector: int,
) -> None:  # fmt: skip
    k = (64 if sparse else 32) // dtype.itemsize
    stored, b = random_operand(64, k // 2 if sparse else k, dtype), random_operand(n, k, dtype)
    accumulator = torch.int32 if dtype == torch.int8 else torch.float32
    c = random_operand(64, n, accumulator)
    a, words = stored.double(), torch.zeros(128, dtype=torch.int32)
    if sparse:
        pairs = LEGAL_PAIRS[torch.randint(0, 6, (64, k // 4))]
        a = torch.zeros(64, k // 4, 4, dtype=torch.float64)
        a = a.scatter(2, pairs, stored.double().view(64, k // 4, 2)).view(64, k)
        bits = 8 * dtype.itemsize
        words = torch.cat([metadata(rows, selector, bits) for rows in pairs.split(16)])
    a_image, a_layout = laid_out(stored, swizzle)
    b_image, b_layout = laid_out(b, swizzle)
    # Each warp has 16 rows, and of each 8 columns the fragment of an mma.
    tiles = [[fragment_d(tile) for tile in rows.split(8, dim=1)] for rows in c.split(16)]
    d = device.to(torch.stack([torch.stack(row, dim=1).view(32, n // 2) for row in tiles]))
    device.call(
        "one_wgmma", d, a_image, b_image,
        torch.cat([fragment_a(rows.contiguous()) for rows in stored.split(16)]), words,
        [*a_layout, *b_layout, swizzle],
        WGMMA_DTYPES.index(dtype), n, sparse, registers, selector,
    )  # fmt: skip
    rows = [
        torch.cat(
            [matrix_d(tile.contiguous()) for tile in warp.view(32, n // 8, 4).unbind(1)], dim=1
        )
        for warp in d.cpu()
    ]
    assert torch.equal(torch.cat(rows).double(), a @ b.double().t() + c.double())


@pytest.mark.parametrize("dtype", WGMMA_DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_wgmma(device_sm90: Device, dtype: torch.dtype, sparse: bool, registers: bool) -> None:
    for selector in (0, 1) if sparse and dtype.itemsize == 2 else (0,):
        check_wgmma(device_sm90, dtype, 32, 3, sparse, registers, selector)


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("sparse", [False, True])
def test_wgmma_layouts(device_sm90: Device, swizzle: int, sparse: bool) -> None:
    if sparse and SPANS[swizzle] == 32:
        pytest.skip("a row of B is 64 bytes")
    check_wgmma(device_sm90, torch.bfloat16, 32, swizzle, sparse, False, 0)


def test_wgmma_of_256_columns(device_sm90: Device) -> None:
    check_wgmma(device_sm90, torch.bfloat16, 256, 3, True, False, 1)


# ---- copies --------------------------------------------------------------------------------------

TILES = (  # extents, box and where it begins, the contiguous dimension first
    ((70, 20), (32, 16), (0, 0)),
    ((70, 20), (32, 16), (48, 10)),  # past both ends
    ((70, 20), (16, 8), (-5, -3)),  # before both beginnings
    ((40, 9, 5), (16, 4, 3), (30, 6, 3)),
)


@pytest.mark.parametrize(("extents", "box", "at"), TILES)
@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
def test_tma_tile(
    device_sm90: Device, extents: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...],
    swizzle: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    span = SPANS[swizzle]
    if span and box[0] * dtype.itemsize > span:
        pytest.skip("rows are longer than the swizzle's span")
    pitch = -(-extents[0] * dtype.itemsize // 16) * 16
    padded = (*reversed(extents[1:]), pitch // dtype.itemsize)
    whole = torch.randint(1, 100, padded).to(dtype)
    source = torch.zeros(padded, dtype=dtype)
    source[..., : extents[0]] = whole[..., : extents[0]]
    # The tile by indexing a tensor with a wide border of zeros.
    border = 64
    outer = torch.zeros([2 * border + size for size in reversed(extents)], dtype=dtype)
    inside = tuple(slice(border, border + size) for size in reversed(extents))
    outer[inside] = whole[..., : extents[0]]
    begin = [border + first for first in reversed(at)]
    window = tuple(slice(b, b + size) for b, size in zip(begin, reversed(box), strict=True))
    tile = outer[window].contiguous()

    raw = device_sm90.empty(tile.nbytes, dtype=torch.uint8)
    out = device_sm90.empty(*padded, dtype=dtype)
    missing = 3 - len(extents)
    three = [*extents, *[1] * missing, *box, *[1] * missing, *at, *[0] * missing]
    device_sm90.call(
        "copied_tile", raw, out, whole, three, len(extents), dtype.itemsize,
        pitch, swizzle,
    )  # fmt: skip
    assert torch.equal(raw.cpu(), in_shared(tile, span))

    kept = torch.zeros_like(outer)
    kept[window] = tile
    want = torch.zeros(padded, dtype=dtype)
    want[..., : extents[0]] = kept[inside]
    assert torch.equal(out.cpu(), want)


class Convolution(NamedTuple):
    """Of x [N, H, W, C], and the tile of its im2col matrix that a test loads."""

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]  # along H and W, as all that follow
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    row: int  # the tile's first
    pixels: int
    channel: int  # the tile's first
    dtype: torch.dtype = torch.int16

    def out(self) -> list[int]:
        spans = ((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))
        sizes = zip(self.shape[1:3], self.padding, spans, self.stride, strict=True)
        return [(n + 2 * p - span - 1) // s + 1 for n, p, span, s in sizes]

    def pixel(self, row: int, tap: tuple[int, int]) -> tuple[int, int, int]:
        """n, h and w of what output ``row`` sees under a tap."""
        high, wide = self.out()
        at = (row // wide % high, row % wide)
        axes = zip(at, self.stride, tap, self.dilation, self.padding, strict=True)
        h, w = (o * s + t * d - p for o, s, t, d, p in axes)
        return row // wide // high, h, w

    def rows(self, x: Tensor, tap: tuple[int, int], count: int, channels: int) -> Tensor:
        """The tile, element by element: 0 is what x has nothing for."""
        tile = torch.zeros(count, channels, dtype=self.dtype)
        for i in range(count):
            where = self.pixel(self.row + i, tap)
            if all(0 <= at < size for at, size in zip(where, x.shape, strict=False)):
                inside = x[where][self.channel : self.channel + channels]
                tile[i, : len(inside)] = inside
        return tile

    def corners(self) -> list[int]:
        """Lower, upper and steps of the base pixels, each along W and H."""
        axes = zip(self.kernel, self.dilation, self.padding, strict=True)
        upper = [p - (k - 1) * d for k, d, p in axes]
        return [*(-p for p in self.padding[::-1]), *upper[::-1], *self.stride[::-1]]


@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(
            Convolution((3, 5, 7, 40), (3, 3), (1, 1), (1, 1), (1, 1), 0, 40, 0), id="padding"
        ),
        pytest.param(
            Convolution((2, 9, 14, 40), (3, 2), (2, 3), (2, 1), (2, 1), 8, 16, 24),
            id="stride and dilation, from within a row, past the channels",
        ),
        pytest.param(
            Convolution((2, 4, 9, 40), (1, 3), (1, 2), (1, 2), (0, 1), 28, 8, 8, torch.float32),
            id="past the last image",
        ),
        pytest.param(
            Convolution((4, 2, 145, 40), (1, 2), (1, 8), (1, 127), (0, 0), 2, 16, 16),
            id="far apart",
        ),
        pytest.param(
            Convolution((1, 3, 10, 40), (3, 4), (1, 1), (1, 85), (1, 127), 4, 8, 0),
            id="wide padding",
        ),
    ],
)
@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("blocks", [1, 2])
def test_tma_im2col(device_sm90: Device, conv: Convolution, swizzle: int, blocks: int) -> None:
    span, count, size = SPANS[swizzle], blocks * conv.pixels, conv.dtype.itemsize
    channels = (span or 48) // size
    n, h, w, c = conv.shape
    whole = torch.randint(1, 100, (n, h, w, c + 8)).to(conv.dtype)  # the pitch is more than C
    first = [conv.pixel(conv.row + i * conv.pixels, (0, 0)) for i in range(blocks)]
    for tap in itertools.product(*map(range, conv.kernel)):
        raw = device_sm90.empty(blocks, count * channels * size, dtype=torch.uint8)
        offsets = [t * d for t, d in zip(tap, conv.dilation, strict=True)]
        device_sm90.call(
            "im2col_tiles", raw, whole,
            [c, w, h, n, *conv.corners(), channels, conv.pixels], size, (c + 8) * size, swizzle,
            [conv.channel, *offsets[::-1], *(at for pixel in first for at in pixel[::-1])], blocks,
        )  # fmt: skip
        tile = conv.rows(whole[..., :c], (tap[0], tap[1]), count, channels)
        assert torch.equal(raw.cpu(), in_shared(tile, span).expand(blocks, -1))


def test_bulk_copies_phase_by_phase(device_sm90: Device) -> None:
    source = torch.randint(0, 256, (5 * 64,)).to(torch.uint8)
    out = device_sm90.empty(5 * 64, dtype=torch.uint8)
    device_sm90.call("bulk_copies", out, source, 5)
    assert torch.equal(out.cpu(), source)


def test_counted_copies_phase_by_phase(device_sm90: Device) -> None:
    source = torch.randint(0, 256, (5, 32, 16)).to(torch.uint8)
    out = device_sm90.empty(5, 32, 16, dtype=torch.uint8)
    device_sm90.call("counted_copies", out, source, 5)
    assert torch.equal(out.cpu(), source.flip(1))


# ---- a warp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(device_sm90: Device, matrices: int, transposed: bool) -> None:
    values = torch.randint(-(2**15), 2**15, (32, matrices, 2), dtype=torch.int16)
    rows = torch.randperm(80)[:32]
    out = device_sm90.to(torch.zeros(80, 8, dtype=torch.int16))
    device_sm90.call(
        "store_matrices", out, values, (16 * rows).int(), out.nbytes, matrices, transposed
    )
    want = torch.zeros(80, 8, dtype=torch.int16)
    for m in range(matrices):
        matrix = values[:, m].reshape(8, 8)  # lane 4r + t has elements 2t and 2t + 1 of row r
        want[rows[8 * m : 8 * m + 8]] = matrix.t() if transposed else matrix
    assert torch.equal(out.cpu(), want)


def test_setmaxnreg_changes_nothing_else(device_sm90: Device) -> None:
    out = device_sm90.empty(384, dtype=torch.int32)
    device_sm90.call("shared_registers", out, 384)
    assert out.cpu().tolist() == [40] * 128 + [232] * 256


def test_setmaxnreg_is_for_warpgroups(emulated_sm90: Device) -> None:
    with pytest.raises(RuntimeError, match="setmaxnreg_dec: needs four warps"):
        emulated_sm90.call("shared_registers", torch.zeros(384, dtype=torch.int32), 96)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, "mbarrier_arrive: no mbarrier was initialised at offset 0"),
        (1, "mbarrier_init: there is one at offset 0 already, of primitives_sm90.cu:"),
        (2, "mbarrier_arrive: the mbarrier at offset 0 was overwritten"),
        (3, r"deadlock: (.*\n)*.*phase 0 wants 1 of 1 arrivals and 0 bytes"),
        (4, "bulk_load: 24 bytes"),
    ],
)
def test_misused_mbarrier_is_reported(emulated_sm90: Device, how: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated_sm90.call("misused_mbarrier", how)


@pytest.mark.parametrize(
    ("extents", "box", "pitch", "swizzle", "message"),
    [
        ((64, 8), (9, 8), 128, 0, "rows of 18 bytes are not multiples of 16"),
        ((64, 8), (32, 8), 128, 1, "rows of 64 bytes, longer than the swizzle's 32"),
        ((64, 8), (8, 300), 128, 0, "a box of 300 elements"),
        ((64, 8), (8, 8), 136, 0, "a stride of 136 bytes is not a multiple of 16"),
        ((0, 8), (8, 8), 128, 0, "dimension 0 has 0 elements"),
    ],
)
def test_impossible_tensor_map_is_refused(
    emulated_sm90: Device, extents: tuple[int, int], box: tuple[int, int], pitch: int,
    swizzle: int, message: str,
) -> None:  # fmt: skip
    data = torch.zeros(4096, dtype=torch.int16)
    shape = [*extents, 1, *box, 1, 0, 0, 0]
    with pytest.raises(RuntimeError, match=message):
        emulated_sm90.call("copied_tile", data, data, data, shape, 2, 2, pitch, swizzle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower": (-129, 0)}, "im2col_map: no bits for corners at -129 and 0 and a step of 1"),
        ({"upper": (0, 128)}, "im2col_map: no bits for corners at 0 and 128 and a step of 1"),
        ({"steps": (9, 1)}, "im2col_map: no bits for corners at 0 and 0 and a step of 9"),
        ({"steps": (1, 0)}, "im2col_map: no bits for corners at 0 and 0 and a step of 0"),
        ({"upper": (0, -4)}, "corners at 0 and -4 around 4 pixels leave an empty box"),
        ({"channels": 60}, "rows of 120 bytes are not multiples of 16"),
        ({"channels": 72}, "rows of 144 bytes, longer than the swizzle's 128"),
        ({"channels": 264, "swizzle": 0}, "im2col_map: 264 channels a pixel"),
        ({"pixels": 1032}, "im2col_map: 1032 pixels"),
        ({"pitch": 136}, "im2col_map: a stride of 136 bytes is not a multiple of 16"),
        ({"pitch": 1 << 40}, "im2col_map: a stride of 1099511627776 bytes does not fit 40 bits"),
        ({"misaligned": 1}, "im2col_map: the tensor's address is not a multiple of 16"),
        ({"at": (4, 0, 0)}, "im2col: a base pixel at 4, outside the box from 0 to 3"),
        ({"at": (0, -1, 0)}, "im2col: a base pixel at -1, outside the box from 0 to 3"),
        ({"offsets": (0, 256)}, "im2col: an offset of 256 does not fit 8 bits"),
        ({"blocks": 2, "offsets": (256, 0)}, "im2col_multicast: an offset of 256 does not fit 8"),
    ],
    ids=str,
)
def test_impossible_im2col_is_refused(
    emulated_sm90: Device, change: dict[str, Any], message: str
) -> None:
    to: dict[str, Any] = {
        "lower": (0, 0), "upper": (0, 0), "steps": (1, 1), "channels": 64, "pixels": 8,
        "pitch": 128, "swizzle": 3, "misaligned": 0, "offsets": (0, 0), "at": (0, 0, 0),
        "blocks": 1, **change,
    }  # fmt: skip
    data = torch.zeros(4096, dtype=torch.int16)[to["misaligned"] :]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        emulated_sm90.call(
            "im2col_tiles", torch.zeros(4096, dtype=torch.uint8), data,
            [64, 4, 4, 2, *to["lower"], *to["upper"], *to["steps"], to["channels"], to["pixels"]],
            2, to["pitch"], to["swizzle"], [0, *to["offsets"], *to["blocks"] * to["at"]],
            to["blocks"],
        )  # fmt: skip


def test_im2col_needs_its_own_kind_of_map(emulated_sm90: Device) -> None:
    with pytest.raises(RuntimeError, match="tma_load_im2col: the tensor map is of the other mode"):
        emulated_sm90.call("im2col_of_tiled_map", torch.zeros(1024, dtype=torch.int16))
