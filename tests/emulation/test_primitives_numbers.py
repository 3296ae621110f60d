"""Conversions, roundings and bit intrinsics against their definitions, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from devices import Device
from torch import Tensor


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


@pytest.mark.parametrize(("number", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
def test_packed_fma_rounds_once(device: Device, number: int, dtype: torch.dtype) -> None:
    # Whole numbers: sums are exact in float32, with more digits than the type has, and often ties.
    abc = torch.randint(-180, 181, (4000, 3, 2)).to(dtype)
    want = (abc[:, 0].double() * abc[:, 1].double() + abc[:, 2].double()).float().to(dtype)
    out = device.empty(4000, dtype=torch.int32)
    device.call("packed_fma", out, abc.view(torch.int32).contiguous(), 4000, number)
    assert torch.equal(out.cpu().view(dtype), want.flatten())


def test_lop3_reads_its_table(device: Device) -> None:
    abc = torch.randint(0, 2**32, (500, 3))
    out = device.empty(500, 2, dtype=torch.int32)
    device.call("bitwise", out, abc.to(torch.uint32), 500)
    a, b, c = abc.unbind(1)
    assert torch.equal(out.cpu().view(torch.uint32).long(), torch.stack([a & b | c, a & ~b ^ c], 1))


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
