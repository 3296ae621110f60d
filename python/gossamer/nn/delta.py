"""Layers over time that compute what has changed since the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.actsparse import actsparse_linear
from ..ops.conv_at import Taps, out_size, taps_for
from ..ops.gathered_conv import GatheredWeight, changes_pay, most_gathered_of
from ..ops.operands import autocast_dtype, autocast_to, has_content
from ..ops.pointcloud import pointcloud_conv
from .activation_sparse import ActSparseLinear, checked_threshold
from .checkpoint import CheckedModule, check_loaded
from .dense import arguments_of, check_layer
from .gathered_conv import WideConv2d, check_gathered, steps_of

if TYPE_CHECKING:
    from typing_extensions import Self


class _Streams:
    """What a delta layer remembers of every stream, and how it moves on by a step.

    ``seen`` is the input that the output stands for: the sum of all changes that were let through,
    in float32, so that what a change lost by rounding or by staying below the threshold is still
    missing from it and is part of the next one. ``output`` is the running sum, in float32 too.
    """

    def __init__(self) -> None:
        self.seen: Tensor | None = None
        self.output: Tensor | None = None
        self.shape: torch.Size | None = None  # of x
        self.steps = 0  # since all of it was computed anew
        self.scale = 1  # what the last change was divided by

    def start(self, x: Tensor, y: Tensor) -> Tensor:
        # Copies: x and y are the caller's, to be written to.
        self.seen, self.output, self.steps = _wide(x).clone(), _wide(y).clone(), 0
        self.shape = x.shape
        return y

    def skip(self, x: Tensor) -> None:
        """Remember nothing of a step whose output is computed from all of x."""
        self.seen, self.output, self.shape = None, None, x.shape

    def check_shape(self, op: str, x: Tensor) -> None:
        if self.shape is not None and x.shape != self.shape:
            raise ValueError(
                f"{op}: x has shape {list(x.shape)}, the streams had {list(self.shape)}; "
                "reset() starts others"
            )

    def went_on(self, x: Tensor, output: Tensor) -> Tensor:
        """Take over the next running sum, and give the caller a copy in the dtype of results."""
        self.output = output
        autocast = autocast_dtype(x)
        return output.to(
            x.dtype if autocast is None else autocast_to(x[:0], autocast).dtype, copy=True
        )

    def due(self, refresh_every: int | None) -> bool:
        return self.seen is None or (refresh_every is not None and self.steps + 1 >= refresh_every)

    def change(self, x: Tensor) -> Tensor:
        """x minus what was seen, over ``scale``, in the dtype of x."""
        assert self.seen is not None
        self.steps += 1
        difference = _wide(x) - self.seen
        # Two numbers of float16, and two results, may be further apart than its largest.
        self.scale = 2 if (autocast_dtype(x) or x.dtype) == torch.float16 else 1
        return difference.to(x.dtype) if self.scale == 1 else difference.div_(2).to(x.dtype)

    def forget(self) -> None:
        self.seen = self.output = self.shape = None

    def reset(self, streams: Tensor | Sequence[int] | None, silent: Tensor | float) -> None:
        """Forget all, or make some streams those whose input was 0."""
        if streams is None:
            self.forget()
        if self.seen is None or self.output is None:
            return
        self.seen, self.output = self.seen.clone(), self.output.clone()
        self.seen[streams] = 0
        self.output[streams] = silent


class _Remembering(CheckedModule):
    """What a layer remembers is of the weights it had, where they were."""

    streams: _Streams

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.streams.forget()
        return super()._apply(*args, **kwargs)

    def _load_checked_state(self, *args: Any) -> None:
        self.streams.forget()
        super()._load_checked_state(*args)


def _remembers(x: Tensor) -> bool:
    """Whether there is something to remember: not of x without content, nor while it is exported.

    Dynamo, which a strict export goes through, puts what it records in the place of the streams.
    """
    exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return has_content(x) and not exported


def _writable(t: Tensor) -> Tensor:
    """The tensor, or a copy where it is one of inference mode, which is over."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _check(op: str, layer: nn.Module, x: Tensor) -> None:
    wanted = x.requires_grad or any(p.requires_grad for p in layer.parameters())
    if torch.is_grad_enabled() and wanted:
        raise RuntimeError(
            f"{op}: it remembers its streams from call to call and has no gradient; call it under "
            "torch.no_grad()"
        )


def _checked_refresh(op: str, refresh_every: int | None) -> int | None:
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"{op}: refresh_every is {refresh_every}, expected 1 or more, or None")
    return refresh_every


class DeltaLinear(_Remembering, ActSparseLinear):
    """A linear layer over time: ``y_t = y_{t-1} + W Δ_t``, Δ the inputs that have changed.

    A change of at most ``threshold`` is left out and stays part of the next one, so that y is
    always that of an input within ``threshold`` of x; with 0 it is the dense layer's but for the
    rounding of the sums, which ``refresh_every`` bounds. An input that has not changed leaves a row
    of the weight unread.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    bias : bool
        Whether there is a [N] bias.
    threshold : float
        The largest change of one input that is left out for now, 0 or more.
    device, dtype
        As for ``torch.nn.Linear``.
    refresh_every : int, optional
        Every so many steps y is computed anew from all of x. The first step always is.

    Raises
    ------
    ValueError
        If the threshold is negative or not finite, or ``refresh_every`` below 1.

    Notes
    -----
    For inference only. x [..., K] has the same leading dimensions at every step, one stream an
    entry. A NaN or an infinity stays in its stream until that is reset or refreshed, as does that
    of a change beyond the largest number of float32 or bfloat16. In float16 any change of finite
    numbers is taken, but what is below 6e-8 of one is left out for now. The streams are no part of
    a ``state_dict``; loading one, or ``to()``, starts them anew. On "meta", of fake tensors and in
    ``torch.export`` (not strict) y is computed from all of x and nothing is remembered.

    References
    ----------
    Yousefzadeh and Sifalakis, "Training for temporal sparsity in deep neural networks, application
    in video processing", 2021 (arXiv:2107.07305).

    Examples
    --------
    >>> import torch, gossamer
    >>> layer = gossamer.nn.DeltaLinear.from_dense(torch.nn.Linear(64, 32), threshold=0.01)
    >>> with torch.no_grad():
    ...     ys = [layer(x) for x in torch.randn(10, 1, 64).cumsum(0) / 100]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        refresh_every: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, threshold, device, dtype)
        self.refresh_every = _checked_refresh("DeltaLinear", refresh_every)
        self.streams = _Streams()

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, threshold: float = 0.0, refresh_every: int | None = None
    ) -> Self:
        """A layer with a copy of the weight of a dense one, and with its very bias.

        Raises
        ------
        TypeError
            If it is not a ``torch.nn.Linear``.
        ValueError
            If the threshold is negative or not finite, or ``refresh_every`` below 1.
        """
        layer = super().from_dense(linear, threshold)
        assert isinstance(layer, cls)
        layer.refresh_every = _checked_refresh("DeltaLinear", refresh_every)
        return layer

    def reset(self, streams: Tensor | Sequence[int] | None = None) -> None:
        """Start all streams anew, or those of the first dimension that are named."""
        self.streams.reset(streams, 0.0 if self.bias is None else _wide(self.bias.detach()))

    def forward(self, input: Tensor) -> Tensor:  # as torch's layer names it
        """[..., K] of one step to [..., N]."""
        _check("DeltaLinear", self, input)
        streams = self.streams
        streams.check_shape("DeltaLinear", input)
        if not _remembers(input):
            return actsparse_linear(input, self.weight_kn, self.bias)
        with torch.no_grad():
            if streams.due(self.refresh_every):
                return streams.start(input, actsparse_linear(input, self.weight_kn, self.bias))
            change = streams.change(input)
            assert streams.seen is not None
            assert streams.output is not None
            # NaN is above any threshold.
            scale = streams.scale
            change = change.masked_fill(change.abs() <= self.threshold / scale, 0)
            streams.seen = streams.seen.add(change, alpha=scale)
            added = actsparse_linear(change, self.weight_kn)
            return streams.went_on(input, streams.output.add(added, alpha=scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, refresh_every={self.refresh_every}"


class DeltaConv2d(_Remembering, CheckedModule, WideConv2d):
    """A 2-D convolution over time that computes the outputs which see a changed pixel.

    A pixel has changed where any of its channels differs by more than ``threshold`` from what was
    seen of it before; smaller changes are left out and stay part of the next one. y is always that
    of an input within ``threshold`` of x.

    Parameters
    ----------
    *args, **kwargs
        As for ``torch.nn.Conv2d``; without groups, padded with zeros.
    threshold : float
        The largest change that is left out for now, 0 or more.
    refresh_every : int, optional
        Every so many steps y is computed anew from all of x. The first step always is.

    Raises
    ------
    ValueError
        If the threshold is negative, ``refresh_every`` below 1, or the convolution has groups, a
        padding by name or one that is not of zeros.

    Notes
    -----
    For inference only, over batches [B, C, H, W] of the same shape, one stream an image. Where so
    many pixels have changed that the dense convolution of the changes takes less time, that is
    computed. Finding and remembering what has changed takes some four passes over x, in float32,
    which a dense layer has no need of. Without a threshold the layer is therefore the dense one
    where few changes could not save that: on a CPU below 64 channels or 256 output positions, of
    1x1 kernels, and in bfloat16 beside AMX. With one it has to find them, and is slower there.

    References
    ----------
    Parger et al., "DeltaCNN: End-to-End CNN Inference of Sparse Frame Differences in Videos", 2022
    (arXiv:2203.03996).
    """

    def __init__(
        self,
        *args: Any,
        threshold: float = 0.0,
        refresh_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = checked_threshold("DeltaConv2d", threshold)
        check_gathered("DeltaConv2d", self)
        self.refresh_every = _checked_refresh("DeltaConv2d", refresh_every)
        self.streams = _Streams()
        self._gathered_weight = GatheredWeight()
        self.taps: Taps | None = None

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, threshold: float = 0.0, refresh_every: int | None = None
    ) -> Self:
        """A layer with the very weight and bias of a dense one.

        Raises
        ------
        TypeError
            If it is not a ``torch.nn.Conv2d``.
        ValueError
            If it has groups, a padding by name or one that is not of zeros, the threshold is
            negative or not finite, or ``refresh_every`` below 1.
        """
        check_layer(f"{cls.__name__}.from_dense", conv, nn.Conv2d)
        layer = cls(
            **arguments_of(conv), threshold=threshold, refresh_every=refresh_every, device="meta"
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        check_loaded(given, {"weight": self.weight, "bias": self.bias}, assign)

    def reset(self, streams: Tensor | Sequence[int] | None = None) -> None:
        """Start all streams anew, or those of the first dimension that are named."""
        bias = 0.0 if self.bias is None else _wide(self.bias.detach()).view(-1, 1, 1)
        self.streams.reset(streams, bias)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] of one step to [B, C_out, OH, OW]."""
        _check("DeltaConv2d", self, input)
        if input.dim() != 4:
            raise ValueError(f"DeltaConv2d: x has shape {list(input.shape)}, expected [B, C, H, W]")
        streams = self.streams
        streams.check_shape("DeltaConv2d", input)
        if not _remembers(input):
            return super().forward(input)
        with torch.no_grad():
            size = out_size(input.shape[-2:], self.kernel_size, steps_of(self))
            if self.threshold == 0 and not changes_pay(input, self.kernel_size, size):
                streams.skip(input)
                return super().forward(input)
            if streams.due(self.refresh_every):
                return streams.start(input, super().forward(input))
            change = streams.change(input)
            # NaN is above any threshold.
            changed = ~(change.abs().amax(1) <= self.threshold / streams.scale)
            return streams.went_on(input, self._add(change, changed))

    def _add(self, change: Tensor, changed: Tensor) -> Tensor:
        """The outputs with what the pixels that have changed add to them; those are seen now."""
        seen, before, scale = self.streams.seen, self.streams.output, self.streams.scale
        assert seen is not None
        assert before is not None
        self.taps = taps_for(change, self.kernel_size, steps_of(self), self.taps)
        at = self.taps.touched(changed).flatten().nonzero().squeeze(-1)
        if len(at) > most_gathered_of(change, self.taps) * before[:, 0].numel():
            change = change.masked_fill(~changed.unsqueeze(1), 0)
            added = self._conv_forward(change, self.weight, None)
            self.streams.seen = seen.add(change, alpha=scale)
            return before.add(added, alpha=scale)
        # Few: what is remembered is written to where they are.
        self.streams.seen, before = seen, before = _writable(seen), _writable(before)
        where = changed.nonzero(as_tuple=True)
        pixels = change.permute(0, 2, 3, 1)[where]
        by_tap = self._gathered_weight.by_tap(self.weight)
        added = pointcloud_conv(pixels, by_tap, None, self.taps.map_at(at, changed.flatten(1)))
        last = seen.permute(0, 2, 3, 1)
        last[where] = last[where].add(pixels, alpha=scale)
        shape = (len(before), *self.taps.out_size, self.out_channels)
        y = before.permute(0, 2, 3, 1).reshape(-1, self.out_channels)
        y.index_copy_(0, at, y.index_select(0, at).add(added, alpha=scale))
        return y.view(shape).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, threshold={self.threshold:g}, "
            f"refresh_every={self.refresh_every}"
        )
