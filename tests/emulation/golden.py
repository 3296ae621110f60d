"""Golden vectors: what one instruction makes of given registers and memory, as a GPU did it.

A vector holds the arguments of a function of ``kernels/primitives*.cu`` as they are, bit by bit,
and what came out. No reading of the manual goes into them: operands are random small whole numbers
wherever the instruction takes them from. So they pin the layouts of fragments and metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from devices import Device
from torch import Tensor

Argument = Tensor | int | list[int]

MMA_KINDS = ("f16", "bf16", "tf32", "s8", "e4m3", "sp_f16", "sp_bf16", "sp_s8", "sp_e4m3")
WGMMA_KINDS = ("f16", "bf16", "s8", "e4m3")
DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "s8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
}
LEGAL = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])  # two different columns in increasing order
# Operands of wgmma as one_wgmma takes them: rows of 64 bytes at chunks of a span of 128, groups of
# eight rows 2048 bytes apart; count, first, leading, stride.
SPAN_128 = 3
A_LAYOUT, B_LAYOUT = [8 * 2048, 0, 16, 2048], [4 * 2048, 0, 16, 2048]


@dataclass
class Vector:
    """A call; ``out`` among its arguments is written, and ``expected`` is what it held then."""

    name: str
    library: str  # "primitives" or "primitives_sm90"
    function: str
    arguments: list[Argument]
    out: int = 0
    expected: Tensor | None = None

    def run(self, device: Device) -> Tensor:
        """What the device makes of the arguments: the bits, as bytes."""
        given = list(self.arguments)
        out = device.to(given[self.out]).clone()
        given[self.out] = out
        device.call(self.function, *given)
        return out.cpu().contiguous().view(-1).view(torch.uint8)


def _numbers(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Bytes of small whole numbers: sums of their products are exact in any order."""
    numbers = torch.randint(-8, 9, (count,), generator=generator).to(dtype)
    return numbers.view(torch.uint8)


def _metadata(lanes: int, generator: torch.Generator) -> Tensor:
    """A legal word for each lane, used or not."""
    words = torch.zeros(lanes, dtype=torch.int64)
    for nibble in range(8):
        words |= LEGAL[torch.randint(0, 6, (lanes,), generator=generator)] << 4 * nibble
    return words.to(torch.uint32).view(torch.int32)


def vectors() -> Iterator[Vector]:
    """Every vector that is recorded, without what is expected."""
    generator = torch.Generator().manual_seed(2024)
    for matrices in (1, 2, 4):
        for transposed in (0, 1):
            memory = torch.randint(0, 256, (80 * 16,), generator=generator).to(torch.uint8)
            offsets = (16 * torch.randperm(80, generator=generator)[:32]).int()
            out = torch.zeros(32 * matrices, dtype=torch.int32)
            yield Vector(
                f"ldmatrix_x{matrices}{'_trans' * transposed}", "primitives", "load_matrices",
                [out, memory, offsets, memory.numel(), matrices, transposed],
            )  # fmt: skip
    for number, kind in enumerate(MMA_KINDS):
        sparse = kind.startswith("sp_")
        dtype = DTYPES[kind.removeprefix("sp_")]
        accumulator = torch.int32 if dtype is torch.int8 else torch.float32
        per_register = 4 // dtype.itemsize
        for selector in (0, 1) if sparse and dtype.itemsize == 2 else (0,):
            yield Vector(
                f"mma_{kind}_{selector}", "primitives", "one_mma",
                [
                    torch.randint(-8, 9, (32 * 4,), generator=generator).to(accumulator),
                    _numbers(32 * 4 * per_register, dtype, generator),
                    _numbers(32 * (4 if sparse else 2) * per_register, dtype, generator),
                    _metadata(32, generator), number, selector,
                ],
            )  # fmt: skip
    for number, kind in enumerate(WGMMA_KINDS):
        dtype = DTYPES[kind]
        accumulator = torch.int32 if dtype is torch.int8 else torch.float32
        for registers in (0, 1):
            for selector in (0, 1) if dtype.itemsize == 2 else (0,):
                yield Vector(
                    f"wgmma_sp_{kind}_{'rs' if registers else 'ss'}_{selector}",
                    "primitives_sm90", "one_wgmma",
                    [
                        torch.randint(-8, 9, (128 * 16,), generator=generator).to(accumulator),
                        _numbers(A_LAYOUT[0] // dtype.itemsize, dtype, generator),
                        _numbers(B_LAYOUT[0] // dtype.itemsize, dtype, generator),
                        _numbers(128 * 16 // dtype.itemsize, dtype, generator),
                        _metadata(128, generator),
                        [*A_LAYOUT, *B_LAYOUT, SPAN_128], number, 32, 1, registers, selector,
                    ],
                )  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def save(path: Path, found: list[Vector], about: dict[str, str]) -> None:
    """Write vectors with what is expected; ``about`` says where it comes from."""
    arrays: dict[str, np.ndarray] = {}
    calls = []
    for vector in found:
        arguments: list[object] = []
        for index, argument in enumerate(vector.arguments):
            if isinstance(argument, Tensor):
                arrays[f"{vector.name}.{index}"] = argument.numpy()
            arguments.append(None if isinstance(argument, Tensor) else argument)
        assert vector.expected is not None
        arrays[f"{vector.name}.expected"] = vector.expected.numpy()
        calls.append([vector.name, vector.library, vector.function, arguments, vector.out])
    arrays["calls"] = np.array(json.dumps({"about": about, "calls": calls}))
    np.savez_compressed(path, **arrays)


def load(path: Path) -> list[Vector]:
    """The vectors of a file."""
    with np.load(path) as arrays:
        calls = json.loads(str(arrays["calls"]))["calls"]
        return [
            Vector(
                name,
                library,
                function,
                [
                    torch.from_numpy(arrays[f"{name}.{index}"]) if given is None else given
                    for index, given in enumerate(arguments)
                ],
                out,
                torch.from_numpy(arrays[f"{name}.expected"]),
            )
            for name, library, function, arguments, out in calls
        ]
