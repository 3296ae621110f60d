"""Convolutions whose outputs are zero in every channel at masked positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._library import is_recorded
from ..ops.conv_at import out_size
from ..ops.masked_conv import Positions, masked_conv, recorded_masked_conv
from ..ops.operands import has_content, is_transformed
from .checkpoint import CheckedModule, check_loaded
from .dense import arguments_of, check_layer
from .gathered_conv import WideConv2d, check_gathered, steps_of

if TYPE_CHECKING:
    from typing_extensions import Self


class PositionMaskedConv2d(CheckedModule, WideConv2d):
    """A 2-D convolution of some output positions; the others are 0 in every channel and image.

    Where few positions are kept they alone are computed, gradients too, by the kernels of
    ``gossamer.pointcloud`` and a map from pixels to positions that is made once a mask; where many
    are, all are, and the masked ones zeroed. The break-even on a CPU is at half of them kept (a
    quarter in bfloat16). Pixels in channels-last, as those of the result are then, are read where
    they lie; others are brought there first.

    Parameters
    ----------
    *args, **kwargs
        As for ``torch.nn.Conv2d``; without groups, padded with zeros.

    Attributes
    ----------
    mask : Tensor or None
        [OH, OW] bool, True where an output is computed; a buffer, part of the ``state_dict``.
        ``None``, as at first, keeps all.

    Raises
    ------
    ValueError
        If the convolution has groups, a padding by name or one that is not of zeros.

    Notes
    -----
    Which pixels a mask needs is kept for the last sizes of the batch and of its images, and, while
    no gradient is wanted, a copy of the weight in the order of the kernels, until that changes.
    ``torch.compile`` and ``torch.export`` record the layer as one op, whose result is in
    channels-last and which has first derivatives only.

    Weights that are not finite do not reach outputs by way of the padding's zeros where positions
    are computed alone.

    References
    ----------
    Grimaldi et al., "Accelerating Deep Neural Networks via Semi-Structured Activation Sparsity",
    2023 (arXiv:2309.06626).

    Examples
    --------
    >>> import torch, gossamer
    >>> layer = gossamer.nn.PositionMaskedConv2d(3, 8, 3, padding=1)
    >>> layer.set_mask(torch.rand(32, 32) < 0.25)
    >>> y = layer(torch.randn(1, 3, 32, 32))
    """

    mask: Tensor | None
    optional_state = frozenset({"mask"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_gathered("PositionMaskedConv2d", self)
        self.register_buffer("mask", None)
        self.out_size: tuple[int, int] | None = None  # of the last call
        self._positions = Positions()

    @classmethod
    def from_dense(cls, conv: nn.Conv2d) -> Self:
        """A layer with the very weight and bias of a dense one, and no mask.

        Raises
        ------
        TypeError
            If it is not a ``torch.nn.Conv2d``.
        ValueError
            If it has groups, a padding by name or one that is not of zeros.
        """
        check_layer(f"{cls.__name__}.from_dense", conv, nn.Conv2d)
        layer = cls(**arguments_of(conv), device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the outputs where the [OH, OW] mask is True, or all.

        Raises
        ------
        TypeError
            If the mask is not bool.
        ValueError
            If it does not have two dimensions.
        """
        if mask is not None:
            _check_mask(mask)
        self.mask = None if mask is None else mask.to(self.weight.device, copy=True)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C_out, OH, OW]."""
        steps = steps_of(self)
        size = out_size(input.shape[-2:], self.kernel_size, steps)
        if not torch.compiler.is_exporting():  # whose sizes are symbols
            self.out_size = size
        mask = self.mask
        if mask is None:
            return super().forward(input)
        if mask.shape != size:
            raise ValueError(
                f"PositionMaskedConv2d: the mask has shape {list(mask.shape)}, the output "
                f"{list(size)}"
            )
        operands = (input, self.weight, self.bias, mask, steps)
        if input.dim() == 4 and (is_recorded() or not has_content(input)):
            return recorded_masked_conv(*operands)
        if input.dim() == 4 and not is_transformed():
            return masked_conv(*operands, self._positions)
        return super().forward(input).masked_fill(~mask, 0)

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        check_loaded(given, {"weight": self.weight, "bias": self.bias}, assign)
        if "mask" in given:
            _check_mask(given["mask"])

    def _load_checked_state(self, *args: Any) -> None:
        state, prefix = args[:2]
        if prefix + "mask" in state or prefix + "weight" in state:
            self.set_mask(state.get(prefix + "mask"))  # of whatever size it is, or none
        super()._load_checked_state(*args)


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"PositionMaskedConv2d: the mask is {what}, expected torch.bool")
    if mask.dim() != 2 or mask.layout != torch.strided:
        raise ValueError(
            f"PositionMaskedConv2d: the mask has shape {list(mask.shape)} and layout "
            f"{mask.layout}, expected [OH, OW], strided"
        )


class PositionMaskScheduler:
    """Masks that grow while a model trains, aligned over its layers.

    One random score is drawn for the pixels of the image, and each layer sees it averaged to the
    size of its output. After ``t`` of ``steps`` steps a layer's ``round(s_t OH OW)`` positions of
    smallest score are masked, with ``s_t`` rising from 0 to ``sparsity`` as
    ``1 - (1 - p)²`` while p, the progress from ``begin`` to ``end`` of the steps, goes from 0 to 1.

    Parameters
    ----------
    model : torch.nn.Module
        With ``PositionMaskedConv2d`` layers; it must have run once, which tells their sizes.
    image_size : tuple of int
        Height and width of the images.
    steps : int
        Of the whole training, 1 or more.
    sparsity : float
        At the end, from 0 to below 1.
    begin, end : float
        Shares of the steps.
    frequency : int
        Until ``end`` masks are in force at every so many steps only; the others are dense.
    generator : torch.Generator, optional
        Of the score.

    Raises
    ------
    ValueError
        If a number is out of its range, or a layer has not run.

    References
    ----------
    Grimaldi et al., "Accelerating Deep Neural Networks via Semi-Structured Activation Sparsity",
    2023 (arXiv:2309.06626).
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: tuple[int, int],
        steps: int,
        sparsity: float = 0.25,
        begin: float = 0.1,
        end: float = 0.9,
        frequency: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (0 <= sparsity < 1 and 0 <= begin < end <= 1 and steps >= 1 and frequency >= 1):
            raise ValueError(
                f"PositionMaskScheduler: steps are {steps}, sparsity is {sparsity}, begin {begin}, "
                f"end {end} and frequency {frequency}; expected sparsity from 0 to below 1, begin "
                "below end in 0 to 1, and whole numbers from 1 on"
            )
        self.layers = [m for m in model.modules() if isinstance(m, PositionMaskedConv2d)]
        for layer in self.layers:
            if layer.out_size is None:
                raise ValueError(f"PositionMaskScheduler: the model must run once first: {layer}")
        self.steps, self.sparsity, self.frequency = steps, sparsity, frequency
        self.begin, self.end = begin, end
        self.score = torch.rand((1, 1, *image_size), generator=generator, device="cpu")
        self.steps_done = 0

    def sparsity_at(self, step: int) -> float:
        """s_t after so many steps."""
        progress = (step / self.steps - self.begin) / (self.end - self.begin)
        progress = min(max(progress, 0.0), 1.0)
        return self.sparsity * (1 - (1 - progress) ** 2)

    def step(self) -> None:
        """Call it after each step of the optimizer: sets the masks of the next one."""
        self.steps_done += 1
        sparsity = self.sparsity_at(self.steps_done)
        done = self.steps_done >= self.end * self.steps
        dense = self.steps_done % self.frequency != 0 and not done
        for layer in self.layers:
            assert layer.out_size is not None
            count = layer.out_size[0] * layer.out_size[1]
            masked = 0 if dense else round(sparsity * count)
            if masked == 0:
                layer.set_mask(None)
                continue
            score = F.adaptive_avg_pool2d(self.score, layer.out_size).flatten()
            kept = torch.ones(count, dtype=torch.bool, device="cpu")
            kept[score.argsort(stable=True)[:masked]] = False
            layer.set_mask(kept.view(layer.out_size))
