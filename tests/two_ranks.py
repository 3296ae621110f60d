"""Work on two processes that talk to each other by torch.distributed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[[int, Path], Any]


def _one_rank(rank: int, work: Work, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.save(work(rank, path), path / f"{rank}.pt")
    # Models go before the group does: the last reference to it must not be the one of a
    # DistributedDataParallel, which joins gloo's threads while it holds the interpreter's lock, for
    # which they may be waiting themselves.
    gc.collect()
    dist.destroy_process_group()


def on_two_ranks(work: Work, path: Path) -> list[Any]:
    """What ``work(rank, path)``, a function of a module, has returned on rank 0 and on rank 1."""
    torch.multiprocessing.spawn(_one_rank, (work, path), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
