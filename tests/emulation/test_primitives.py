"""Every wrapper in common/ptx.cuh against its definition, written anew in torch and Python.

The same tests run on a GPU where there is one with nvcc (the ``cuda`` device): what they assume of
fragments, metadata and roundings is then what the hardware does.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from devices import Device
from torch import Tensor

LANES = range(32)
LEGAL_PAIRS = torch.tensor(list(itertools.combinations(range(4), 2)))


def int_bits(t: Tensor) -> Tensor:
    """The registers that hold ``t`` [..., elements of one register or more], as int32."""
    return t.contiguous().view(torch.int32)


# ---- ldmatrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(device: Device, matrices: int, transposed: bool) -> None:
    memory = torch.randint(-(2**15), 2**15, (80, 8), dtype=torch.int16)  # rows of 16 bytes
    rows = torch.randperm(80)[:32]
    out = device.empty(32, matrices, dtype=torch.int32)
    offsets = (16 * rows).int()
    device.call("load_matrices", out, memory, offsets, memory.nbytes, matrices, transposed)
    got = out.cpu().view(torch.int16).view(32, matrices, 2)
    for lane, m in itertools.product(LANES, range(matrices)):
        matrix = memory[rows[8 * m : 8 * m + 8]]
        row, pair = lane // 4, 2 * (lane % 4)
        want = (matrix.t() if transposed else matrix)[row, pair : pair + 2]
        assert torch.equal(got[lane, m], want), (lane, m)


# ---- mma and mma.sp ------------------------------------------------------------------------------

KINDS = {  # by the order of `enum class Mma`: element dtype, K, and whether A is sparse
    "f16": (torch.float16, 16, False),
    "bf16": (torch.bfloat16, 16, False),
    "tf32": (torch.float32, 8, False),
    "s8": (torch.int8, 32, False),
    "e4m3": (torch.float8_e4m3fn, 32, False),
    "sp_f16": (torch.float16, 32, True),
    "sp_bf16": (torch.bfloat16, 32, True),
    "sp_s8": (torch.int8, 64, True),
    "sp_e4m3": (torch.float8_e4m3fn, 64, True),
}


def random_operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers, so that every order of summation gives the same result."""
    return torch.randint(-8, 9, (rows, columns)).to(dtype)


def fragment_a(a: Tensor) -> Tensor:
    """[32 lanes, 4] registers of a [16, S] operand (PTX: mma.m16n8k*, multiplicand A).

    A warp's lanes are eight groups of four. Registers 0 and 2 hold row `group`, 1 and 3 row
    `group + 8`; 0 and 1 the first half of the columns, 2 and 3 the second; a lane's place in its
    group says which 4 bytes of that half.
    """
    halves = a.view(2, 8, 2, 4, a.shape[1] // 8)  # row half, group, column half, lane, elements
    registers = int_bits(halves)[..., 0].permute(1, 3, 2, 0)  # group, lane, column half, row half
    return registers.reshape(32, 4)


def fragment_b(b: Tensor) -> Tensor:
    """[32 lanes, R] registers of a [K, 8] operand: column `group`, 4 bytes of K for each lane."""
    per_register = 4 // b.itemsize
    k = b.shape[0] // (4 * per_register)
    columns = b.t().contiguous().view(8, k, 4, per_register)  # group, register, lane, elements
    return int_bits(columns)[..., 0].permute(0, 2, 1).reshape(32, k)


def matrix_d(d: Tensor) -> Tensor:
    """The [16, 8] result of [32 lanes, 4] registers; its own inverse is ``fragment_d``."""
    return d.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)


def fragment_d(d: Tensor) -> Tensor:
    return d.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)


def metadata(pairs: Tensor, selector: int, bits: int) -> Tensor:
    """[32] registers for the kept columns ``pairs`` [16, groups, 2] of a 16-row sparse operand.

    16-bit types: the two lanes of a group of four that `selector` names share the K columns; each
    holds 16 of them for row `group` in the low half and for row `group + 8` in the high half. The
    other two lanes hold garbage. 8-bit types: all four lanes, each 32 columns of one row.
    """
    nibbles = (pairs[..., 0] + 4 * pairs[..., 1]).to(torch.int64)
    if bits == 16:
        words = torch.randint(0, 2**32, (8, 4))
        for group, half in itertools.product(range(8), range(2)):
            sixteen = [
                sum(int(nibbles[row, 4 * half + q]) << (4 * q) for q in range(4))
                for row in (group, group + 8)
            ]
            words[group, 2 * selector + half] = sixteen[0] | sixteen[1] << 16
    else:
        words = torch.empty(8, 4, dtype=torch.int64)
        for group, lower, half in itertools.product(range(8), range(2), range(2)):
            row = nibbles[group + 8 * lower, 8 * half : 8 * half + 8]
            words[group, lower + 2 * half] = sum(int(row[q]) << (4 * q) for q in range(8))
    return words.view(32).to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize(
    ("kind", "selector"), [*((kind, 0) for kind in KINDS), ("sp_f16", 1), ("sp_bf16", 1)]
)
def test_mma(device: Device, kind: str, selector: int) -> None:
    dtype, k, sparse = KINDS[kind]
    accumulator = torch.int32 if dtype == torch.int8 else torch.float32
    for _ in range(3):
        stored = random_operand(16, k // 2 if sparse else k, dtype)
        b, c = random_operand(k, 8, dtype), random_operand(16, 8, accumulator)
        a, words = stored.double(), torch.zeros(32, dtype=torch.int32)
        if sparse:
            pairs = LEGAL_PAIRS[torch.randint(0, 6, (16, k // 4))]
            a = torch.zeros(16, k // 4, 4, dtype=torch.float64)
            a.scatter_(2, pairs, stored.double().view(16, k // 4, 2))
            a = a.view(16, k)
            words = metadata(pairs, selector, 8 * dtype.itemsize)
        d = device.to(fragment_d(c))
        device.call(
            "one_mma", d, fragment_a(stored), fragment_b(b), words,
            list(KINDS).index(kind), selector,
        )  # fmt: skip
        assert torch.equal(matrix_d(d.cpu()).double(), a @ b.double() + c.double())


def test_tf32_reads_19_bits(device: Device) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    d = device.to(torch.zeros(32, 4))
    device.call("one_mma", d, fragment_a(a), fragment_b(b), torch.zeros(32), 2, 0)
    torch.testing.assert_close(matrix_d(d.cpu()).double(), cut[0] @ cut[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("word", [0x0, 0x5, 0xA, 0xF, 0x1, 0x2, 0x3, 0x6, 0x7, 0xB])
def test_unordered_metadata_is_refused(emulated: Device, word: int) -> None:
    words = torch.full((32,), 0x44444444, dtype=torch.int32)
    words[12] = 0x44444044 | word << 8
    zeros = torch.zeros(32, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"metadata of lane 12, bits 8 to 11 are {hex(word)}:"):
        emulated.call("one_mma", torch.zeros(32, 4), zeros, zeros, words, 6, 0)


# ---- numbers -------------------------------------------------------------------------------------


def interesting_floats() -> Tensor:
    """Every exponent, ties and their neighbours at every precision, zeros, infinities, NaN."""
    exponents = torch.arange(1, 255, dtype=torch.int32) << 23
    mantissas = [0, 1, 0x7FFFFF, 0x400000]
    for kept in (2, 3, 4, 7, 8, 10, 11):
        tie = 1 << (22 - kept)
        mantissas += [tie, tie - 1, tie + 1, 3 * tie, 3 * tie - 1, 3 * tie + 1]
    bits = (exponents[:, None] | torch.tensor(mantissas, dtype=torch.int32)).flatten()
    whole = torch.arange(-300, 301) / 2
    special = torch.tensor(
        [0.0, 448.0, 464.0, 465.0, 65504.0, 65519.0, 65520.0, math.inf, math.nan]
    )
    x = torch.cat([bits.view(torch.float32), torch.rand(2000) * 600, special, whole])
    return torch.cat([x, -x])


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(0, torch.bfloat16), (1, torch.float16), (2, torch.int8), (3, torch.float8_e4m3fn)],
)
def test_conversion(device: Device, number: int, dtype: torch.dtype) -> None:
    x = interesting_floats()
    if dtype == torch.int8:
        want = x.nan_to_num(0.0).clamp(-128, 127).round().to(dtype)
    elif dtype == torch.float8_e4m3fn:  # torch itself does not saturate
        want = x.clamp(-448, 448).to(dtype)
    else:
        want = x.to(dtype)
    rounded, back = device.empty(x.numel(), dtype=dtype), device.empty(x.numel())
    device.call("round_trip", rounded, back, x, x.numel(), number)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int8
    number_of = ~x.isnan()
    assert torch.equal(rounded.cpu().view(bits)[number_of], want.view(bits)[number_of])
    if dtype == torch.int8:
        assert rounded.cpu()[~number_of].eq(0).all()
    else:
        assert rounded.cpu()[~number_of].float().isnan().all()
        torch.testing.assert_close(back.cpu(), want.float(), rtol=0, atol=0, equal_nan=True)


def test_every_small_float_becomes_float32(device: Device) -> None:
    """Through pairs and quads, which also pins the order of packing."""
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
        every = every[~every.isnan()][:65000].contiguous()
        packed = device.empty(every.numel() // 2, dtype=torch.int32)
        back = device.empty(every.numel())
        device.call("packed_pairs", packed, back, every, packed.numel(), number)
        assert torch.equal(packed.cpu().view(dtype).float(), every)
        assert torch.equal(back.cpu(), every)
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()][:252].contiguous()
    packed = device.empty(63, dtype=torch.int32)
    device.call("packed_quads", packed, every, 63)
    assert torch.equal(packed.cpu().view(torch.float8_e4m3fn).float(), every)


def test_tf32_rounds_ties_away(device: Device) -> None:
    x = interesting_floats()
    x = x[x.isfinite() & (x.abs() < 1e38) & ((x == 0) | (x.abs() > 1e-37))]
    out = device.empty(x.numel(), dtype=torch.int32)
    device.call("rounded_tf32", out, x, x.numel())
    exponent = torch.frexp(x.double())[1]
    steps = torch.ldexp(x.double().abs(), 11 - exponent)
    want = torch.ldexp((steps + 0.5).floor(), exponent - 11) * x.sign()
    assert torch.equal(out.cpu().view(torch.float32).double(), want)


def test_bit_intrinsics(device: Device) -> None:
    words = torch.randint(0, 2**32, (60, 3)).tolist()
    words += [[0, 0, 0x7531], [2**32 - 1, 1, 0xFEDC]]
    out = device.empty(len(words), 7, dtype=torch.int32)
    device.call("bits", out, torch.tensor(words).to(torch.uint32), len(words))
    for (x, y, s), got in zip(words, out.cpu().view(torch.uint32).tolist(), strict=True):
        data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        chosen = []
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = data[nibble & 7]
            chosen.append((255 if byte > 127 else 0) if nibble & 8 else byte)
        binary = f"{x:032b}"
        assert got == [
            int(binary[::-1], 2),
            binary.count("1"),
            len(binary) - len(binary.rstrip("0")) + 1 if x else 0,
            32 - x.bit_length(),
            int.from_bytes(chosen, "little"),
            ((y << 32 | x) << (s & 31) >> 32) & 0xFFFFFFFF,
            x * y >> 32,
        ]


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(device: Device, size: int) -> None:
    source = torch.randint(1, 256, (32, size)).to(torch.uint8)
    valid = torch.randint(0, size + 1, (32,), dtype=torch.int32)
    valid[:2] = torch.tensor([0, size])
    out = device.empty(32, size, dtype=torch.uint8)
    device.call("copies", out, source, valid, size)
    assert torch.equal(out.cpu(), source * (torch.arange(size) < valid[:, None]))


def test_sixteen_byte_accesses(device: Device) -> None:
    source = torch.randint(0, 256, (1024,)).to(torch.uint8)
    out = device.empty(1024, dtype=torch.uint8)
    device.call("wide_copies", out, source)
    assert torch.equal(out.cpu(), source)


def test_misaligned_global_access_is_refused(emulated: Device) -> None:
    source = torch.zeros(1100, dtype=torch.uint8)
    at = source[(16 - source.data_ptr() % 16) % 16 + 8 :]
    with pytest.raises(RuntimeError, match="load_nc16: the global address is not a multiple of 16"):
        emulated.call("wide_copies", torch.zeros(1100, dtype=torch.uint8), at)


# ---- a warp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("by", [0, 1, 5, 9, 31])
def test_shuffles(device: Device, width: int, by: int) -> None:
    values = torch.randint(0, 10**6, (32,), dtype=torch.int32)
    out = device.empty(4, 32, dtype=torch.int32)
    device.call("shuffles", out, values, width, by)
    for lane in LANES:
        begin = lane - lane % width
        sources = [
            begin + by % width,
            lane ^ by if (lane ^ by) < begin + width else lane,
            lane - by if lane - by >= begin else lane,
            lane + by if lane + by < begin + width else lane,
        ]
        assert out.cpu()[:, lane].tolist() == values[sources].tolist(), lane


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x55555555, 0x80000001])
def test_votes_and_reductions(device: Device, mask: int) -> None:
    values = torch.randint(0, 50, (32,), dtype=torch.int32)
    out = device.empty(9, 32, dtype=torch.int32)
    device.call("votes", out, values, mask)
    numbers = values.tolist()
    for lane in LANES:
        mine = [other for other in LANES if mask >> other & 1 == mask >> lane & 1]
        odd = [other for other in mine if numbers[other] & 1]
        same = [other for other in mine if numbers[other] & 3 == numbers[lane] & 3]
        ours = [numbers[other] for other in mine]
        any_bit, every_bit = 0, -1
        for number in ours:
            any_bit, every_bit = any_bit | number, every_bit & number
        want = [
            sum(1 << other for other in odd),
            len(odd) > 0,
            len(odd) == len(mine),
            sum(1 << other for other in same),
            *(sum(ours), min(ours), max(ours), any_bit, every_bit),
        ]
        got = out.cpu()[:, lane].view(torch.uint32).tolist()
        assert got == [int(value) for value in want], lane


# ---- a block and a grid --------------------------------------------------------------------------


def test_atomics(device: Device) -> None:
    values = torch.randint(-1000, 1000, (350,), dtype=torch.int32)
    fields = device.to(torch.zeros(12, dtype=torch.int32))
    fields[8] = torch.tensor(-1e30).view(torch.int32)
    device.call("totals", fields, values, values.numel())
    got = fields.cpu()
    total = int(values.sum())
    assert got[:6].tolist() == [
        total,
        max(0, int(values.max())),
        min(0, int(values.min())),
        0,
        total,
        350,
    ]
    assert int(got[6:7].view(torch.uint32)) == sum({1 << (v & 31) for v in values.tolist()})
    assert got[7:9].view(torch.float32).tolist() == [float(total), float(values.max())]
    assert int(got[10:].view(torch.int64)) == total << 20


@pytest.mark.parametrize("threads", [64, 160])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_named_barriers(device: Device, threads: int, rounds: int) -> None:
    out = device.empty(threads - 32, dtype=torch.int32)
    device.call("handed_over", out, threads, rounds)
    want = 1000 * sum(range(rounds)) + rounds * (torch.arange(threads - 32) % 32)
    assert torch.equal(out.cpu().long(), want)


@pytest.mark.parametrize("threads", [1, 32, 33, 100, 256, 1024])
def test_blocks_of_any_size(device: Device, threads: int) -> None:
    values = torch.randint(-50, 50, (threads,), dtype=torch.int32)
    out = device.empty(4, dtype=torch.int32)
    device.call("block_votes", out, values, threads)
    count = int((values > 0).sum())
    assert out.cpu().tolist() == [count, 0, 1, int(values.sum())]


def test_shared_memory_starts_as_poison(emulated: Device) -> None:
    out = emulated.empty(64, dtype=torch.int32)
    emulated.call("untouched", out, 64, 64)
    assert set(out.view(torch.uint32).tolist()) == {0xCBCBCBCB}
    as_numbers = [int(out.view(dtype)[0]) for dtype in (torch.float32, torch.bfloat16)]
    assert max(as_numbers) < -(10**7)


def test_polling_for_ever_is_a_deadlock(emulated: Device) -> None:
    with pytest.raises(
        RuntimeError, match="threads poll for something that does not come"
    ) as fault:
        emulated.call("wait_for_ever", torch.zeros(1, dtype=torch.int32))
    assert "warp 0: all lanes: load_acquire at primitives.cu:" in str(fault.value)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "message"),
    [
        (0, 32, 16, "a grid of 0 x 1 x 1 blocks"),
        (1, 0, 16, "a block of 0 x 1 x 1 threads"),
        (1, 1025, 16, "a block of 1025 x 1 x 1 threads"),
        (1, 32, 300_000, "300000 bytes of shared memory"),
        (1, 32, 0, "shared_memory: 4 bytes, but the launch asked for 0"),
    ],
)
def test_impossible_launch_is_refused(
    emulated: Device, blocks: int, threads: int, shared_bytes: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.call("launch_shape", blocks, threads, shared_bytes)
