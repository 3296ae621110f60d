"""The sample 2:4 GEMMs, their planted faults, and the product it should give."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from cases import integers, sparse_24
from emulator import HERE, KernelFault, KernelLibrary
from gossamer import reference
from gossamer.formats import Sparse24
from torch import Tensor

SAMPLE_GEMM = HERE / "kernels" / "sparse24_gemm.cu"
SAMPLE_GEMM_SM90 = HERE / "kernels" / "sparse24_gemm_sm90.cu"


@cache
def plants(source: Path) -> list[str]:
    """The members of the kernel file's ``enum Plant``, as in ``no_barrier_after_wait``."""
    body = re.search(r"^enum Plant.*?\{(.*?)\};", source.read_text(), re.M | re.S)
    assert body is not None
    names = re.findall(r"^  k(\w+),", body[1], re.M)
    return [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names]


def line_of(source: Path, text: str) -> int:
    """The one line of a kernel file that holds ``text``."""
    lines = source.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if text in line]
    assert len(found) == 1, (text, found)
    return found[0]


@dataclass
class Gemm:
    """Operands of whole numbers, so that every order of summation gives the same float32."""

    x: Tensor
    weight: Sparse24
    expected: Tensor

    @classmethod
    def of(cls, m: int, n: int, k: int) -> Gemm:
        weight = sparse_24(n, k, torch.bfloat16)
        values = integers(*weight.values.shape, limit=4, dtype=torch.bfloat16)
        weight = Sparse24(values, weight.indices, (n, k))
        x = integers(m, k, limit=4, dtype=torch.bfloat16)
        expected = reference.sparse24_linear(
            x.double(), values.double(), weight.indices, None, k, None
        )
        return cls(x, weight, expected.float())

    def cuda(self) -> Gemm:
        return Gemm(self.x.cuda(), self.weight.to("cuda"), self.expected.cuda())

    def run(self, library: KernelLibrary, plant: str = "none") -> Tensor:
        (m, k), n = self.x.shape, self.weight.shape[0]
        y = torch.full((m, n), torch.nan, device=self.x.device)
        library.call(
            "sparse24_gemm",
            y,
            self.x,
            self.weight.values,
            self.weight.indices,
            *(m, n, k),
            plants(library.source).index(plant),
        )
        return y

    def shows(self, library: KernelLibrary, plant: str, schedule: str, seed: int) -> bool:
        """Whether the result is wrong by a whole number, or by poison, which is -2.7e7."""
        with library.schedule(schedule, seed):
            try:
                y = self.run(library, plant)
            except KernelFault as fault:
                if "metadata" in str(fault):  # that the poison was, where it is not legal
                    return True
                raise
        return float((y - self.expected).abs().max()) >= 1.0
