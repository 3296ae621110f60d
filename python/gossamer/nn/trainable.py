"""A layer whose sparse weight is trained under a fixed pattern, and may be packed to run faster."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from .._cuda_module import obstacle
from ..formats import PANEL_DTYPES, VALUE_DTYPES, BlockSparse, BlockSparsePanels, SparseCsr
from ..ops.csr_pattern import forget
from ..ops.operands import has_content
from .packable import PackableModule, held_while_spawning
from .patterns import Panels, Pattern, PatternName, Portable

if TYPE_CHECKING:
    from typing_extensions import Self


class TrainableModule(PackableModule):
    """A layer whose weight is trained while portable, and packed for inference.

    Trainable, it holds the Parameter ``values`` and the buffers that its pattern names; packed, the
    buffer ``panels``. A pattern without panels stays portable.
    """

    values: nn.Parameter | None
    bias: nn.Parameter | None
    pattern: PatternName
    # What is applied to the result: None, "relu", "gelu" or "silu".
    activation: str | None = None
    _pattern: Pattern
    _values_require_grad: bool = True  # what a packed layer gives its values back

    def _set_up(
        self,
        pattern: Pattern,
        bias: bool,
        density: float | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register the tensors of a fresh layer, without content."""
        name = type(self).__name__
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in VALUE_DTYPES:
            raise TypeError(f"{name}: dtype {dtype}, expected float32, bfloat16, float16, float64")
        self._pattern = pattern
        weight = pattern.empty(density, device, dtype)
        state = weight.state()
        self.values = nn.Parameter(weight.values)
        for key in (*pattern.index_names, "format"):
            self.register_buffer(key, state[key].to(weight.device))
        self.register_buffer("panels", None, persistent=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a dense weight and a bias as torch's layer does, and keep the largest part.

        As much is kept as the layer holds: of blocks as many as there are. Single places are drawn
        at random instead, without a dense weight, and their values as torch's layer does that has
        as many inputs as a row has places.
        """
        name = type(self).__name__
        if self.values is None:
            raise RuntimeError(f"{name}: reset_parameters() on a packed layer; unpack() first")
        if not has_content(self.values):
            return
        shape, held = self._pattern.shape, self._portable()
        if self.values.numel() > 0:
            weight = self._pattern.drawn(held).state()
            for key, tensor in held.state().items():
                if key != "format":
                    tensor.copy_(weight[key])
        else:  # nothing is live
            self._buffers["crow_indices"].zero_()  # type: ignore[union-attr]
        self.format.copy_(held.state()["format"])
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def _sparse_weight(
        cls, dense: Tensor, pattern: Pattern, prune: str | None, density: float | None
    ) -> Portable:
        """The weight of a dense layer that fits, or that is made to fit."""
        op = f"{cls.__name__}.from_dense"
        if prune not in (None, "magnitude"):
            raise ValueError(f"{op}: prune {prune!r}, expected None or 'magnitude'")
        pattern.check(op, density, wanted=prune is not None)
        return pattern.from_dense(dense) if prune is None else pattern.pruned(dense, density)

    def _take_from(self, dense: nn.Module, weight: Portable) -> Self:
        """Hold a weight, and what else a dense layer has: flags and a copy of the bias."""
        assert isinstance(dense.weight, Tensor)
        self._set_portable(weight, requires_grad=dense.weight.requires_grad)
        if isinstance(dense.bias, Tensor):
            bias = dense.bias.detach().clone()
            self.bias = nn.Parameter(bias, requires_grad=dense.bias.requires_grad)
        return self.train(dense.training)

    def _give_to(self, dense: nn.Module, weight: Tensor) -> None:
        """Put a dense weight, a copy of the bias and the flags into a layer of torch's."""
        if self.activation is not None:
            raise ValueError(
                f"{type(self).__name__}.to_dense: the layer applies {self.activation!r}, which "
                "torch's does not; set activation to None and apply it behind the layer"
            )
        dense.weight = nn.Parameter(weight, requires_grad=self.weight_requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().clone()
            dense.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        dense.train(self.training)

    @property
    def weight(self) -> Portable | Panels:
        """The weight as the format it is held in: portable while trainable, panels while packed."""
        if self._panels_dtype is not None:
            assert self.panels is not None
            kept = [getattr(self, name) for name in self._pattern.packed_names]
            return self._pattern.held_panels(self.panels, self._panels_dtype, *kept)
        assert self.values is not None
        indices = [getattr(self, name) for name in self._pattern.index_names]
        return self._pattern.portable(self.values, *indices)

    def pack(self) -> Self:
        """Hold the weight in the layout that its device reads fastest, for inference only.

        ``values``, and of a 2:4 weight the indices, are None from here on, so an optimizer made
        before no longer reaches the weight. Nothing happens to a packed layer, nor where there is
        no other layout: of unstructured weights, of convolutions that run through their dense
        weight, and of blocks on a GPU.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If the weight is float64, which has no panels.
        """
        # Outside inference mode, or its tensors could never be saved for a backward again.
        with torch.inference_mode(False):
            self._hold_panels()
        return self

    def unpack(self) -> Self:
        """Bring the Parameter ``values`` and the indices back, for training.

        ``values`` is a new Parameter: give it to the optimizer. Nothing happens to a trainable
        layer.

        Returns
        -------
        self
        """
        self._unpack()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As torch's; of a packed layer also of the Parameter ``values`` that unpacking makes.

        A module that holds this layer sets the Parameters that there are, as torch's modules do:
        freeze it before packing, or the layers one by one.
        """
        self._values_require_grad = requires_grad
        return super().requires_grad_(requires_grad)

    def __delattr__(self, name: str) -> None:
        # Torch would go on to put it into a ModuleDict, which has a method of that name, and leave
        # the layer without it.
        if name == "values" and sys._getframe(1).f_code is register_parametrization.__code__:
            raise ValueError(
                f"{type(self).__name__}: torch.nn.utils.parametrize cannot hold a tensor named "
                "'values'; parametrise the dense layer and make a sparse one of its weight"
            )
        super().__delattr__(name)

    @property
    def weight_requires_grad(self) -> bool:
        """Whether ``values`` is trained, or will be once unpacked."""
        return self._values_require_grad if self.values is None else self.values.requires_grad

    def _pattern_repr(self) -> str:
        weight = self.weight
        state = f"packed={self.packed}"
        if isinstance(weight, (BlockSparse, BlockSparsePanels, SparseCsr)):
            state = f"density={weight.density:.3g}, {state}"
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"pattern={self.pattern}, {state}{activation}"

    def _refuse_training(self) -> None:
        """Called by the forward of a packed layer."""
        if self._parameters.get("values") is not None:
            raise RuntimeError(
                f"{type(self).__name__}: a packed layer does not read the values that it was "
                "given: call unpack() first"
            )
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: a packed layer cannot be trained: call unpack() to train "
                "it, or eval() to run it"
            )

    def _portable(self) -> Portable:
        weight = self.weight
        if not isinstance(weight, Panels):
            return weight
        portable = self._pattern.unpacked(weight)
        portable.values.requires_grad_(self._values_require_grad)
        return portable

    def _set_portable(self, weight: Portable, requires_grad: bool) -> None:
        state = weight.state()
        self.values = nn.Parameter(weight.values, requires_grad=requires_grad)
        for name in self._pattern.index_names:
            setattr(self, name, state[name])
        self.format = state["format"].to(weight.device)
        self.panels = self._panels_dtype = None

    def _hold_portable(self) -> None:
        weight = self.weight
        if isinstance(weight, Panels):
            portable = self._pattern.unpacked(weight)
            self._set_portable(portable, requires_grad=self._values_require_grad)

    def _packed(self, weight: Portable) -> Panels | None:
        """The weight in the layout that its device reads fastest, or None if there is no other."""
        return self._pattern.packed(weight)

    def _hold_panels(self) -> None:
        weight = self.weight
        if isinstance(weight, Panels):
            return
        if "values" not in self._parameters:
            raise RuntimeError(
                f"{type(self).__name__}: 'values' are computed from others: call "
                "torch.nn.utils.prune.remove(layer, 'values') before pack()"
            )
        panels = self._packed(weight)
        if panels is not None:
            self._values_require_grad = weight.values.requires_grad
            self.values = None
            for name in self._pattern.index_names:
                if name not in self._pattern.packed_names:
                    setattr(self, name, None)
            self.panels, self._panels_dtype = panels.panels, panels.dtype

    def _can_pack(self) -> bool:
        weight = self.weight
        return weight.dtype in PANEL_DTYPES and obstacle(weight.device) is None

    def _wants_panels(self) -> bool:
        return self.packed

    def _takes_dtype(self, t: Tensor) -> bool:
        return t.is_floating_point()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = self.values if self._panels_dtype is None else self.panels
        assert stored is not None
        before = torch.empty(0, dtype=self._panels_dtype or stored.dtype, device=stored.device)
        dtype = fn(before).dtype
        if dtype not in VALUE_DTYPES:  # before anything has changed
            raise TypeError(
                f"{type(self).__name__}: cannot become {dtype}, only float32, bfloat16, float16 or "
                "float64"
            )
        return super()._apply(fn, recurse)

    def _make_room(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]
    ) -> None:
        for name in self._pattern.index_names:
            forget(getattr(self, name))
        # Assigned, a weight may have another number of blocks; torch compares shapes all the same.
        if local_metadata.get("assign_to_params_buffers", False):
            for name in ("values", *self._pattern.index_names):
                held, given = getattr(self, name), state_dict.get(prefix + name)
                if given is not None and given.shape != held.shape:
                    room = torch.empty_like(given)
                    if name == "values":
                        room = nn.Parameter(room, requires_grad=held.requires_grad)
                    setattr(self, name, room)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed:
            portable = self._portable().state()
            values = nn.Parameter(portable["values"], requires_grad=self._values_require_grad)
            indices = {name: portable[name] for name in self._pattern.index_names}
            state["_parameters"] = {**self._parameters, "values": values}
            state["_buffers"] = {**self._buffers, **indices, "panels": None}
        return held_while_spawning(state)
