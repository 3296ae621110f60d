"""Linear layers of binary inputs: eight spikes to a byte, and sums of the rows they choose.

``pack_spikes`` makes the bytes, ``spike_linear`` the sums; ``spike_linear`` of unpacked spikes does
both and keeps the bytes alone for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import TAGS_NOT_CAPTURED, calls_cpu_kernel, is_recorded, library
from .._wide import matmul, wide_matmul
from .actsparse_cuda import has_rows_kernel, rows_workspace
from .operands import (
    all_autocast_to,
    apply_function,
    as_rows,
    autocast_dtype,
    check_bias,
    check_devices,
    check_dtypes,
    gradient_wanted,
    row_major,
)

_PACK, _LINEAR = "pack_spikes", "spike_linear"


def pack_spikes(x: Tensor) -> Tensor:
    """Spikes, 0 or 1, as bits: input k of a token is bit ``k % 8`` of its byte ``k // 8``.

    Parameters
    ----------
    x : Tensor
        [..., K] bool, uint8 or floating, of zeros and ones.

    Returns
    -------
    Tensor
        [..., ceil(K / 8)] uint8; bits past the last input are 0. It has no gradient.

    Raises
    ------
    TypeError
        If x is of another dtype.
    ValueError
        If x is 0-d or an entry is neither 0 nor 1.
    """
    if x.dim() == 0:
        raise ValueError(f"{_PACK}: x is 0-d, it needs at least one dimension")
    x = x.detach()
    rows = as_rows(x, x.dim())
    if x.dtype == torch.bool and x.is_cuda and not is_recorded():
        bits = _bits(rows)  # zeros and ones: nothing to wait for
    else:
        bits = _pack(rows.view(torch.uint8) if x.dtype == torch.bool else rows)
    return bits.view(*x.shape[:-1], bits.shape[-1])


def unpack_spikes(bits: Tensor, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., ceil(K / 8)] uint8 as [..., K] zeros and ones of a dtype."""
    if bits.dtype != torch.uint8:
        raise TypeError(f"unpack_spikes: bits are {bits.dtype}, expected torch.uint8")
    if features < 0 or bits.dim() == 0 or bits.shape[-1] != _bytes(features):
        raise ValueError(
            f"unpack_spikes: bits have shape {list(bits.shape)} and features are {features}, "
            "expected [..., ceil(features / 8)]"
        )
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    spikes = (bits.unsqueeze(-1) >> places) & 1
    return spikes.flatten(-2)[..., :features].to(dtype)


def spike_linear(spikes: Tensor, weight_kn: Tensor, bias: Tensor | None = None) -> Tensor:
    """``spikes @ weight_kn + bias`` by adding up the rows of the weight whose spike is 1.

    Parameters
    ----------
    spikes : Tensor
        [..., K] zeros and ones in the dtype of the weight, or of bool; or [..., ceil(K / 8)] uint8
        from ``pack_spikes``.
    weight_kn : Tensor
        [K, N]: float32, bfloat16, float16, or float64 (serial kernel); the transpose of
        ``torch.nn.Linear.weight``.
    bias : Tensor, optional
        [N] in the dtype of the weight.

    Returns
    -------
    Tensor
        [..., N] in the dtype of the weight, summed in float32 (float64). Bit-identical for any
        number of threads.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel.
    ValueError
        If shapes or devices do not match, a spike is neither 0 nor 1, or, on a CPU, a bit is set
        past the last feature (a GPU leaves it out).

    Notes
    -----
    The gradients are those of the dense product: to floating spikes too, for a surrogate gradient
    behind them. What is kept for the gradient is the bits. On a GPU as many tokens as those of
    ``actsparse_linear`` are summed by its kernel, more are torch's product; floating spikes wait
    for the GPU to say that they are zeros and ones, bits and bool do not.

    References
    ----------
    Zhu et al., "SpikeGPT: Generative Pre-trained Language Model with Spiking Neural Networks", 2023
    (arXiv:2302.13939).

    Examples
    --------
    >>> import torch, gossamer
    >>> spikes, weight_kn = torch.rand(4, 64) < 0.1, torch.randn(64, 32)
    >>> y = gossamer.spike_linear(gossamer.pack_spikes(spikes), weight_kn)
    """
    autocast = autocast_dtype(weight_kn)
    if autocast is not None:
        weight_kn, spikes, bias = all_autocast_to(autocast, weight_kn, spikes, bias)
    check_dtypes(_LINEAR, weight_kn.dtype, bias=bias)
    if spikes.dim() == 0 or weight_kn.dim() != 2:
        raise ValueError(
            f"{_LINEAR}: spikes have shape {list(spikes.shape)} and weight_kn "
            f"{list(weight_kn.shape)}, expected [..., K] and [K, N]"
        )
    features = weight_kn.shape[0]
    packed = spikes.dtype == torch.uint8
    if spikes.shape[-1] != (_bytes(features) if packed else features):
        what = "bytes of spikes" if packed else "features"
        raise ValueError(
            f"{_LINEAR}: spikes have {spikes.shape[-1]} {what}, the weight expects "
            f"{_bytes(features) if packed else features}"
        )
    rows = as_rows(spikes, spikes.dim())
    if spikes.is_floating_point():
        check_dtypes(_LINEAR, weight_kn.dtype, spikes=spikes)
        if gradient_wanted(spikes):
            apply = _unpacked if is_recorded() else _unpacked_autograd
            y: Tensor = apply(rows, weight_kn, bias)
            return y.view(*spikes.shape[:-1], y.shape[1])
    bits = rows if packed else pack_spikes(rows)
    call = _linear if is_recorded() else _autograd
    y = call(bits, weight_kn, bias)
    return y.view(*spikes.shape[:-1], y.shape[1])


library.define("pack_spikes(Tensor x) -> Tensor", tags=TAGS_NOT_CAPTURED)
library.define(
    "spike_linear(Tensor bits, Tensor weight_kn, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(  # of spikes in floating point, for their gradient under torch.compile
    "spike_linear_unpacked(Tensor x, Tensor weight_kn, Tensor? bias) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
_pack = torch.ops.gossamer.pack_spikes.default
_linear = torch.ops.gossamer.spike_linear.default
_unpacked = torch.ops.gossamer.spike_linear_unpacked.default


def _bytes(features: int) -> int:
    return (features + 7) // 8


def _pack_native(x: Tensor) -> Tensor:
    bits = _pack_fake(x)
    _C.pack_spikes(bits, row_major(x), torch.get_num_threads())
    return bits


def _pack_cuda(x: Tensor) -> Tensor:
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"{_PACK}: x is {x.dtype}, which has no kernel")
    if bool(((x != 0) & (x != 1)).any()):
        raise ValueError(f"{_PACK}: an entry of x is neither 0 nor 1")
    return _bits(x)


def _bits(x: Tensor) -> Tensor:
    ones = torch.nn.functional.pad(x.to(torch.uint8), (0, -x.shape[1] % 8))
    places = torch.arange(8, device=x.device, dtype=torch.uint8)
    return (ones.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def _pack_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], _bytes(x.shape[1])), dtype=torch.uint8)


def _linear_native(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    y = _linear_empty(bits, weight_kn, bias)
    weight = row_major(weight_kn)
    added = None if bias is None else bias.contiguous()
    _C.spike_linear(y, bits.contiguous(), weight, added, torch.get_num_threads())
    return y


def _unpacked_native(x: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(_pack(x), weight_kn, bias)


def _linear_cuda(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    y = _linear_fake(bits, weight_kn, bias)
    if has_rows_kernel(len(bits), weight_kn):
        added = None if bias is None else bias.contiguous()
        workspace = rows_workspace(len(bits), weight_kn)
        _C.spike_linear_cuda(y, bits.contiguous(), weight_kn, added, *workspace)
        return y
    y = wide_matmul(unpack_spikes(bits, weight_kn.shape[0], weight_kn.dtype), weight_kn)
    return (y if bias is None else y + bias).to(weight_kn.dtype)


def _linear_fake(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    check_devices(_LINEAR, weight_kn, spikes=bits, bias=bias)
    return _linear_empty(bits, weight_kn, bias)


def _linear_empty(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    check_bias(_LINEAR, bias, weight_kn.shape[1])
    return weight_kn.new_empty((bits.shape[0], weight_kn.shape[1]))


def _autograd(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    if gradient_wanted(weight_kn, bias):
        y: Tensor = _apply_bits(bits, weight_kn, bias)
        return y
    if calls_cpu_kernel(bits, weight_kn, bias):
        return _linear_native(bits, weight_kn, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(bits, weight_kn, bias)


class _Bits(torch.autograd.Function):
    """dW = xᵀ dy, db = dyᵀ 1, of packed x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bits: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _linear(bits, weight_kn, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bits, weight_kn, _ = inputs
        ctx.features = weight_kn.shape[0]
        ctx.save_for_backward(bits)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dweight = None
        if wanted[1]:
            dweight = matmul(unpack_spikes(bits, ctx.features, dy.dtype).t(), dy)
        return None, dweight, dy.sum(0) if wanted[2] else None


class _Spikes(torch.autograd.Function):
    """The same of spikes in floating point, with dx = dy Wᵀ; x is kept packed.

    The third output stands for x where a gradient is differentiated: one number, expanded, whose
    gradient is that of x.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_kn: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            bits = _pack(x)
            return _linear(bits, weight_kn, bias), bits, x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, bits, stand_in = output
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(bits, stand_in, inputs[1])

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: None, dx: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        bits, stand_in, weight_kn = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dweight = db = None
        if dy is not None and wanted[0]:
            through = matmul(dy, weight_kn.t())
            dx = through if dx is None else dx + through
        if dy is not None and wanted[1]:
            dweight = matmul(_unpacked_bits(stand_in, bits).t(), dy)
        if dy is not None and wanted[2]:
            db = dy.sum(0)
        return dx, dweight, db


class _Unpacked(torch.autograd.Function):
    """x of its bits; the gradient goes to what stands for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stand_in: Tensor, bits: Tensor) -> Tensor:
        return unpack_spikes(bits, stand_in.shape[1], stand_in.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_apply_unpacked = apply_function(_Unpacked)


def _unpacked_bits(stand_in: Tensor, bits: Tensor) -> Tensor:
    if gradient_wanted(stand_in):
        x: Tensor = _apply_unpacked(stand_in, bits)
        return x
    return unpack_spikes(bits, stand_in.shape[1], stand_in.dtype)


_apply_bits = apply_function(_Bits)
_apply_spikes = apply_function(_Spikes)


def _unpacked_autograd(x: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _apply_spikes(x, weight_kn, bias)[0]
    return y


library.impl(_PACK, _pack_native, "CPU")
library.impl(_PACK, _pack_cuda, "CUDA")
torch.library.register_fake("gossamer::pack_spikes", _pack_fake, lib=library)
library.impl(_LINEAR, _linear_native, "CPU")
library.impl(_LINEAR, _linear_cuda, "CUDA")
library.impl(_LINEAR, _autograd, "Autograd")
torch.library.register_fake("gossamer::spike_linear", _linear_fake, lib=library)
for _device in ("CPU", "CUDA"):
    library.impl("spike_linear_unpacked", _unpacked_native, _device)
library.impl("spike_linear_unpacked", _unpacked_autograd, "Autograd")
torch.library.register_fake("gossamer::spike_linear_unpacked", _linear_fake, lib=library)
