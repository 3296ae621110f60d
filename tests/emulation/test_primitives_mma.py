"""ldmatrix, mma and mma.sp against their definitions.

The same tests run on a GPU where there is one with nvcc (the ``cuda`` device): what ``fragments``
says of lanes and metadata is then what the hardware does.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from devices import Device
from mma_operands import (
    LEGAL_PAIRS,
    fragment_a,
    fragment_b,
    fragment_d,
    matrix_d,
    metadata,
    random_operand,
)

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


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(device: Device, matrices: int, transposed: bool) -> None:
    memory = torch.randint(-(2**15), 2**15, (80, 8), dtype=torch.int16)  # rows of 16 bytes
    rows = torch.randperm(80)[:32]
    out = device.empty(32, matrices, dtype=torch.int32)
    offsets = (16 * rows).int()
    device.call("load_matrices", out, memory, offsets, memory.nbytes, matrices, transposed)
    got = out.cpu().view(torch.int16).view(32, matrices, 2)
    for lane, m in itertools.product(range(32), range(matrices)):
        matrix = memory[rows[8 * m : 8 * m + 8]]
        row, pair = lane // 4, 2 * (lane % 4)
        want = (matrix.t() if transposed else matrix)[row, pair : pair + 2]
        assert torch.equal(got[lane, m], want), (lane, m)


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
