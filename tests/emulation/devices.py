"""Where kernels run, in which orders, and what watches them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from emulator import HERE, KernelLibrary
from torch import Tensor

PRIMITIVES = HERE / "kernels" / "primitives.cu"
PRIMITIVES_SM90 = HERE / "kernels" / "primitives_sm90.cu"
CLUSTER_SUMS = HERE / "kernels" / "cluster_sums.cu"
GEMM_SM90 = HERE / "kernels" / "gemm_sm90.cu"
SCHEDULES = [(name, seed) for name in ("late", "early") for seed in (0, 1, 2)]
DEVICES = ("late", "early", "shuffled", "cuda")


class Sanitizers:
    """What AddressSanitizer and UBSan have written to their log; without them, nothing."""

    def __init__(self, base: str | None) -> None:
        self.on = base is not None
        self._log = Path(f"{base}.{os.getpid()}")
        self._taken = 0

    def take(self) -> str:
        """The reports since the last call."""
        text = self._log.read_text() if self._log.exists() else ""
        reports, self._taken = text[self._taken :], len(text)
        # Fibers switch with swapcontext where they have no assembly of their own.
        return re.sub(r"^==\d+==WARNING: ASan doesn't fully support makecontext.*\n", "", reports)


class Device:
    """Where kernels run: the emulation in one schedule, or a GPU."""

    def __init__(self, library: KernelLibrary, where: str, schedule: tuple[str, int]) -> None:
        self.library, self.where, self.schedule = library, where, schedule

    def to(self, t: Tensor) -> Tensor:
        return t.to(self.where).contiguous()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.where)

    def call(self, name: str, *arguments: Tensor | int | list[int]) -> None:
        """Inputs go to the device by themselves; outputs must be there (``to``, ``empty``)."""
        moved = [self.to(a) if isinstance(a, Tensor) else a for a in arguments]
        if self.where == "cuda":
            self.library.call(name, *moved)
        else:
            with self.library.schedule(*self.schedule):
                self.library.call(name, *moved)
