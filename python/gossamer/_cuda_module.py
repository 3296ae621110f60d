"""The CUDA module: loaded when the first CUDA tensor comes, so an import touches no GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

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
    # Asked while a graph is captured, the question has to wait: its answer needs the GPU's.
    return None if torch.cuda.is_current_stream_capturing() else wrong_results(device)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the CUDA module runs on this GPU, for what torch can compute, too."""
    major, minor = torch.cuda.get_device_capability(device)
    return _attached() is None and 10 * major + minor >= _C.cuda_lowest_capability


@cache
def wrong_results(device: torch.device) -> str | None:
    """Which kernels answer a small product wrongly on this device, if any.

    Nobody has every GPU, and wrong numbers are worse than none: so the floating-point kernels of
    each feature's forward pass are asked once, in whole numbers whose sums are exact.
    """
    from .formats import (
        PANEL_DTYPES,
        Block,
        BlockSparse,
        Sparse24,
        Sparse24Conv,
        Sparse24ConvPanels,
        Sparse24Panels,
    )
    from .ops.actsparse import actsparse_linear
    from .ops.blocksparse import blocksparse_by_way, blocksparse_conv
    from .ops.blocksparse_choice import blocksparse_ways
    from .ops.cuda_workspace import aligned_rows, chosen_config
    from .ops.grouped import grouped_linear
    from .ops.pointcloud import pointcloud_conv
    from .ops.sparse24 import sparse24_linear
    from .ops.sparse24_conv import sparse24_conv, sparse24_conv_by_way, sparse24_conv_ways
    from .ops.topk import topk_decode
    from .ops.topk_encoder import topk_encode
    from .pointcloud import Coordinates
    from .prune import magnitude_24, magnitude_blocks

    def integers(*shape: int) -> torch.Tensor:
        # On the CPU whatever torch.set_default_device says.
        return torch.randint(-4, 5, shape, generator=generator, device="cpu").float()

    wrong = []
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for dtype in PANEL_DTYPES:
            dense = magnitude_24(integers(48, 300))
            weight = Sparse24.from_dense(dense.to(device, dtype))
            panels = Sparse24Panels.from_sparse24(weight)
            for rows in (3, 40, 300):
                x = integers(rows, 300)
                given = x.to(device, dtype)
                found = [sparse24_linear(given, layout) for layout in (weight, panels)]
                # As it would be with a matrix larger than this GPU, too.
                index = max(given.get_device(), 0)
                large = chosen_config(8192, 8192, 8192, dtype, index)
                if large[0] != "float32":
                    found.append(given.new_empty(rows, 48))
                    operands = (found[-1], aligned_rows(given), panels.panels, None, "none")
                    _C.sparse24_linear_cuda(*operands, None, None, large)
                expected = (x @ dense.t()).to(dtype)
                if not all(torch.equal(y.cpu(), expected) for y in found):
                    wrong.append(f"{dtype} of {rows} rows")
            kernel = magnitude_blocks(integers(40, 32, 3, 3), Block(16, 16), 0.5)
            assert isinstance(kernel, torch.Tensor)
            blocks = BlockSparse.from_dense(kernel.to(device, dtype), Block(16, 16))
            x = integers(2, 32, 9, 7)
            expected = F.conv2d(x, kernel, padding=1).to(dtype)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                given = x.to(device, dtype).contiguous(memory_format=memory_format)
                found = [blocksparse_conv(given, blocks, padding=1)]
                last = memory_format == torch.channels_last
                for way in blocksparse_ways(x.shape, blocks, padding=1, channels_last=last):
                    found.append(blocksparse_by_way(way, given, blocks, padding=1))
                if not all(torch.equal(y.cpu(), expected) for y in found):
                    wrong.append(f"{dtype} of blocks, {memory_format}")
            # By TMA, where that gathers, and without it.
            kernel = magnitude_24(integers(48, 64, 3, 3), dim=1)
            if dtype != torch.float32:
                conv = Sparse24Conv.from_dense(kernel.to(device, dtype))
                x = integers(2, 64, 9, 7)
                given = x.to(device, dtype)
                held = Sparse24ConvPanels.from_sparse24(conv)
                found = [sparse24_conv(given, held, padding=1)]
                for cut in sparse24_conv_ways(x.shape, held, padding=1):
                    found.append(sparse24_conv_by_way(cut, given, held, padding=1))
                expected = F.conv2d(x, kernel, padding=1).to(dtype)
                if not all(torch.equal(y.cpu(), expected) for y in found):
                    wrong.append(f"{dtype} of 2:4 convolutions")
            # Where a pixel sees itself, x comes another way.
            matrix = magnitude_blocks(integers(80, 72), Block(32, 32), 0.5)
            assert isinstance(matrix, torch.Tensor)
            blocks = BlockSparse.from_dense(matrix.to(device, dtype), Block(32, 32))
            x = integers(300, 72)
            found = [
                blocksparse_by_way(way, x.to(device, dtype), blocks)
                for way in blocksparse_ways(x.shape, blocks)
            ]
            expected = (x @ matrix.t()).to(dtype)
            if not all(torch.equal(y.cpu(), expected) for y in found):
                wrong.append(f"{dtype} of blocks, linear")
            matrix = integers(300, 48)
            for rows in (1, 4, 16):
                x = integers(rows, 300)
                x[integers(rows, 300) > 0] = 0
                y = actsparse_linear(x.to(device, dtype), matrix.to(device, dtype))
                if not torch.equal(y.cpu(), (x @ matrix).to(dtype)):
                    wrong.append(f"{dtype} of zero inputs, {rows} rows")
            x, kernel = integers(1, 24, 7, 6, 5), integers(40, 24, 3, 3, 3)
            expected = F.conv3d(x, kernel, padding=1).to(dtype)
            voxels = torch.ones_like(x[:, 0]).nonzero().int()  # all of them, so as dense as can be
            map = Coordinates(voxels.to(device)).submanifold(3)
            feats = x[0].flatten(1).t().to(device, dtype)
            taps = kernel.flatten(2).permute(2, 1, 0).to(device, dtype)
            y = pointcloud_conv(feats, taps, None, map)
            if not torch.equal(y.cpu(), expected[0].flatten(1).t()):
                wrong.append(f"{dtype} of voxels")
            x, dictionary = integers(9, 24), integers(300, 24)
            dense, order = (x @ dictionary.t()).sort(dim=-1, descending=True, stable=True)
            given = dictionary.to(device, dtype)
            values, indices = topk_encode(x.to(device, dtype), given, k=40, relu=False)
            right = torch.equal(indices.cpu(), order[:, :40])
            y = topk_decode(values, indices, given)
            kept = dense[:, :40].to(dtype).float()
            codes = torch.zeros_like(dense).scatter_(1, order[:, :40], kept)
            if not right or not torch.equal(y.cpu(), (codes @ dictionary).to(dtype)):
                wrong.append(f"{dtype} of k-sparse codes")
            # Experts of 9, 0 and 61 tokens.
            x, dy, experts = integers(70, 40), integers(70, 24), integers(3, 24, 40)
            ends = torch.tensor([9, 9, 70], device=device)
            each = [(x[:9], dy[:9], experts[0]), (x[9:], dy[9:], experts[2])]
            sums = [
                torch.cat([a @ w.t() for a, _, w in each]),
                torch.cat([b @ w for _, b, w in each]),
                torch.stack([b.t() @ a for a, b, _ in each]),
            ]
            a, b, w = (t.to(device, dtype) for t in (x, dy, experts))
            found = [
                grouped_linear(a, w, ends),
                torch.ops.gossamer.grouped_input(b, w, ends),
                torch.ops.gossamer.grouped_weight(b, a, ends)[::2],
            ]
            pairs = zip(found, sums, strict=True)
            if not all(torch.equal(y.cpu(), right.to(dtype)) for y, right in pairs):
                wrong.append(f"{dtype} of experts")
    return f"the kernels give wrong results on it ({', '.join(wrong)})" if wrong else None


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
