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
    _C.attach_cuda(module.kernels())
    return None


def obstacle(device: torch.device) -> str | None:
    """Why tensors on this device cannot be computed with; None if they can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "there are no kernels for it"
    if (missing := _attached()) is not None:
        return f"the CUDA module is {missing}"
    lowest = _C.cuda_lowest_capability
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < lowest:
        needed = f"{lowest // 10}.{lowest % 10}"
        return f"it has compute capability {major}.{minor}, the kernels need {needed} or newer"
    from ._self_check import wrong_results

    # Asked while a graph is captured, the question has to wait: its answer needs the GPU's.
    return None if torch.cuda.is_current_stream_capturing() else wrong_results(device)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the CUDA module runs on this GPU, for what torch can compute, too."""
    major, minor = torch.cuda.get_device_capability(device)
    return _attached() is None and 10 * major + minor >= _C.cuda_lowest_capability


def gpu_of(device: torch.device | dict[str, int]) -> int | dict[str, int] | None:
    """As choices of ``_C`` take a GPU, or what describes one; None for the CPU."""
    if isinstance(device, dict):
        return device
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def on_cuda(op: str, native: Callable[..., Any]) -> Callable[..., Any]:
    """What implements an op for CUDA tensors: its native function, with the kernels attached."""

    @wraps(native)
    def call(*args: Any) -> Any:
        if (missing := _attached()) is not None:
            raise ValueError(f"{op}: a CUDA tensor, but the CUDA module is {missing}")
        return native(*args)

    return call
