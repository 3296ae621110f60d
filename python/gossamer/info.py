"""What was built, what this machine has, and which kernels will run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, product, starmap
from typing import Any

import torch

from . import _C
from ._cuda_module import load_cuda, obstacle
from .formats import Block, BlockSparse
from .nn.patterns import pattern_of
from .ops.blocksparse_choice import blocksparse_choice

# (m, n, k, where it occurs): the regimes of the kernels, on shapes that somebody would recognise.
_TYPICAL_SHAPES = (
    (1, 4096, 4096, "Llama-3-8B q_proj, one token"),
    (16, 3072, 768, "BERT-base intermediate, 16 tokens"),
    (512, 3072, 768, "BERT-base intermediate, 512 tokens"),
)
# (shapes of x and of the weight, padding, where it occurs); _DENSITY of its blocks are live.
_TYPICAL_BLOCKS = (
    ((512, 768), (3072, 768), 0, "BERT-base intermediate, 512 tokens"),
    ((1, 64, 56, 56), (64, 64, 3, 3), 1, "ResNet-50 3x3 on 56x56, 1 image"),
)
_BLOCK, _DENSITY = Block(16, 16), 0.25
# (tokens, outputs, inputs) of one expert.
_TYPICAL_EXPERT = (8, 1024, 2048, "OLMoE-1B-7B gate_proj, an expert's 8")
_TYPICAL_ZEROS = (1, 4096, 14336, "Llama-3-8B down_proj, one token")
# (voxels, outputs, inputs) of a tap.
_TYPICAL_VOXELS = (100_000, 64, 64, "submanifold layer, 100k voxels")
# Of an unstructured weight, by its kernels.
_TYPICAL_PLACES = (
    (1, 4096, 4096, "Llama-3-8B q_proj at 90 % sparsity, one token"),
    (128, 4096, 4096, "Llama-3-8B q_proj at 90 % sparsity, 128 tokens"),
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Choice:
    """The kernel that an operation will use for x [m, k] and a weight [n, k], and why.

    Of a convolution, m is the pixels of y and k the input channels of all taps; of one over voxels,
    m is those of y and k the channels of one tap.
    """

    operation: str
    example: str
    m: int
    n: int
    k: int
    dtype: str
    target: str
    kernel: str
    why: str


@dataclass(frozen=True, repr=False)
class Info:
    """Printed, a page of text.

    Attributes
    ----------
    version, torch_version, python_version, machine : str
    targets_built, machine_targets : tuple of str
        Instruction sets this build has kernels for, and those of them this machine runs.
    target : str
        The one in force.
    threads : int
        ``torch.get_num_threads()``.
    cuda : str
        What the CUDA module or its loading says, or that it was not built.
    cuda_devices : tuple of dict
        What the CUDA module sees.
    choices : tuple of Choice
        Kernels for a few typical shapes.
    warnings : tuple of str
    """

    version: str
    torch_version: str
    python_version: str
    machine: str
    targets_built: tuple[str, ...]
    machine_targets: tuple[str, ...]
    target: str
    threads: int
    cuda: str
    cuda_devices: tuple[dict[str, Any], ...]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"gossamer {self.version}, torch {self.torch_version}, Python {self.python_version}",
            f"machine          {self.machine}",
            f"targets built    {', '.join(self.targets_built)}",
            f"targets here     {', '.join(self.machine_targets)}",
            f"target in force  {self.target}",
            f"threads          {self.threads}",
            f"CUDA module      {self.cuda}",
        ]
        for d in self.cuda_devices:
            major, minor = d["compute_capability"]
            lines.append(
                f"                 {d['name']}: compute capability {major}.{minor}, "
                f"{d['memory'] / 2**30:.1f} GiB, {d['multiprocessors']} multiprocessors"
            )
        for operation, choices in groupby(self.choices, key=lambda choice: choice.operation):
            lines += ["", f"{operation}, x [m, k] -> [m, n]"]
            lines += [
                f"  {c.dtype:<8}  {c.m:>4} x {c.k:<4} -> {c.n:<4}  {c.example:<34}  "
                f"{c.target}/{c.kernel}: {c.why}"
                for c in choices
            ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    __repr__ = __str__


def info() -> Info:
    """What this installation of gossamer can do on this machine.

    Looking for CUDA devices initialises the CUDA driver in this process, where there is one.

    Returns
    -------
    Info
        A page of text when printed, attributes otherwise.
    """
    cuda, status = load_cuda()
    warnings = []
    if cuda is None and torch.cuda.is_available():
        warnings.append(
            "torch sees a GPU, but gossamer's CUDA module is not there; on a GPU nothing of it "
            "runs. Install from source where nvcc is found (PATH, CUDA_HOME or /usr/local/cuda); "
            "-C cmake.define.GOSSAMER_CUDA=ON makes a missing nvcc an error."
        )
    devices = () if cuda is None else tuple(cuda.devices())
    if cuda is not None and not devices and torch.cuda.is_available():
        warnings.append(
            f"torch sees a GPU, but gossamer's CUDA module is {status}; on a GPU nothing of it "
            "runs. Where the driver is too old for the CUDA toolkit it was built with, install "
            "from source with that of an older one, from 12.5 on."
        )
    if torch.cuda.is_available():
        for index, device in enumerate(devices):
            reason = obstacle(torch.device("cuda", index))
            if reason is not None:
                warnings.append(f"layers on cuda:{index} ({device['name']}) stay dense: {reason}")
    threads = torch.get_num_threads()
    return Info(
        version=version("gossamer"),
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        machine=f"{platform.machine()}, {platform.system()}, {os.cpu_count()} logical cores",
        targets_built=tuple(_C.targets_built()),
        machine_targets=tuple(_C.machine_targets()),
        target=_C.target(),
        threads=threads,
        cuda=status,
        cuda_devices=devices,
        choices=tuple(
            _sparse24_choice(shape, dtype, threads)
            for dtype in _DTYPES
            for shape in _TYPICAL_SHAPES
        )
        + tuple(_blocksparse_choices(torch.device("cpu")))
        + tuple(starmap(_csr_choice, product(_TYPICAL_PLACES, _DTYPES)))
        + tuple(_grouped_choice(dtype) for dtype in _DTYPES)
        + tuple(_actsparse_choice(dtype) for dtype in _DTYPES)
        + tuple(_pointcloud_choice(dtype) for dtype in _DTYPES)
        + _cuda_choices(devices),
        warnings=tuple(warnings),
    )


def _cuda_choices(devices: tuple[dict[str, Any], ...]) -> tuple[Choice, ...]:
    """The kernels for the current GPU, where torch has one too."""
    if not devices or not torch.cuda.is_available():
        return ()
    device = torch.device("cuda", torch.cuda.current_device())
    if obstacle(device) is not None:
        return ()
    choices = []
    for dtype in _DTYPES[:3]:
        for shape in _TYPICAL_SHAPES:
            m, n, k, _ = shape
            chosen = _C.sparse24_choose_cuda(m, n, k, dtype, device.index)
            choices.append(_choice(f"sparse24_linear on {device}", shape, dtype, chosen))
    voxels, c_out, *_ = _TYPICAL_VOXELS
    for dtype in _DTYPES[:3]:
        chosen = _C.pointcloud_conv_choose_cuda(dtype, voxels, c_out, device.index)
        choices.append(_choice(f"pointcloud_conv on {device}", _TYPICAL_VOXELS, dtype, chosen))
    return (*choices, *_blocksparse_choices(device))


def _blocksparse_choices(device: torch.device) -> Iterator[Choice]:
    for (x_shape, shape, padding, example), dtype in product(_TYPICAL_BLOCKS, _DTYPES):
        pattern = pattern_of("info", _BLOCK, shape)
        weight = pattern.empty(_DENSITY, "meta", getattr(torch, dtype))
        assert isinstance(weight, BlockSparse)
        chosen = blocksparse_choice(x_shape, weight, padding=padding, device=device)
        operation = "blocksparse_conv" if len(shape) > 2 else "blocksparse_linear"
        operation += f" on {device}" if device.type == "cuda" else ""
        # Padded to the extents of x.
        m, n, k = math.prod(x_shape) // x_shape[1], shape[0], math.prod(shape[1:])
        yield _choice(operation, (m, n, k, example), dtype, chosen)


def _choice(
    operation: str, shape: tuple[int, int, int, str], dtype: str, chosen: dict[str, Any]
) -> Choice:
    m, n, k, example = shape
    target, kernel, why = (chosen[key] for key in ("target", "kernel", "why"))
    return Choice(operation, example, m, n, k, dtype, target, kernel, why)


def _csr_choice(shape: tuple[int, int, int, str], dtype: str) -> Choice:
    return _choice("csr_linear", shape, dtype, _C.csr_choose(shape[0], dtype))


def _grouped_choice(dtype: str) -> Choice:
    return _choice("grouped_linear", _TYPICAL_EXPERT, dtype, _C.grouped_choose(dtype))


def _actsparse_choice(dtype: str) -> Choice:
    target = _C.actsparse_target(dtype)
    kernel = "serial" if target == "serial" else "active_rows"
    why = "reads the rows of the weight whose input is not zero"
    chosen = {"target": target, "kernel": kernel, "why": why}
    return _choice("actsparse_linear", _TYPICAL_ZEROS, dtype, chosen)


def _pointcloud_choice(dtype: str) -> Choice:
    _, c_out, c_in, _ = _TYPICAL_VOXELS
    chosen = _C.pointcloud_conv_choose(dtype, c_in, c_out)
    return _choice("pointcloud_conv", _TYPICAL_VOXELS, dtype, chosen)


def _sparse24_choice(shape: tuple[int, int, int, str], dtype: str, threads: int) -> Choice:
    m, n, k, _ = shape
    return _choice("sparse24_linear", shape, dtype, _C.sparse24_choose(m, n, k, dtype, threads))
