"""The CUDA module: loaded when the first CUDA tensor comes, so an import touches no GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from . import _C


def load_cuda() -> tuple[ModuleType | None, str]:
    """The CUDA module, where there is one that loads, and its state in words."""
    if importlib.util.find_spec(f"{__package__}._cuda") is None:
        return None, "not built (no nvcc was found, or GOSSAMER_CUDA=OFF)"
    try:
        module = importlib.import_module(f"{__package__}._cuda")
    except ImportError as error:
        return None, f"built, but does not load: {error}"
    devices = module.devices()
    if not devices:
        return module, f"built, no GPU here ({module.driver_status()})"
    return module, f"built, {len(devices)} GPU(s)"


@cache
def _attached() -> str | None:
    """Hands the kernels to ``_C``; why that is impossible, otherwise None."""
    module, status = load_cuda()
    if module is None or not module.devices():  # torch's driver may be too old for this module
        return status
    _C.sparse24_attach_cuda(module.sparse24_kernels())
    return None


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on this device can be computed with."""
    if device.type != "cuda":
        return device.type == "cpu"
    if _attached() is not None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _C.cuda_lowest_capability


def on_cuda(op: str, native: Callable[..., Any]) -> Callable[..., Any]:
    """What implements an op for CUDA tensors: its native function, with the kernels attached."""

    @wraps(native)
    def call(*args: Any) -> Any:
        if (missing := _attached()) is not None:
            raise ValueError(f"{op}: a CUDA tensor, but the CUDA module is {missing}")
        return native(*args)

    return call
