"""The two forms of a 2:4 weight in a layer: portable tensors, or packed as panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._cuda_module import obstacle
from ..formats import PANEL_DTYPES, Sparse24, Sparse24Panels, Sparse24Quantized
from .checkpoint import CheckedModule, check_sparse24

if TYPE_CHECKING:
    from typing_extensions import Self


class PackableModule(CheckedModule):
    """A layer with one copy of a [out_features, in_features] 2:4 weight.

    Packed, it holds the buffer ``panels``, which belong to one device and dtype. A ``state_dict``,
    a pickle, a deep copy and a move to another device or dtype go through the portable form in
    either state, and what comes in is validated first.
    """

    in_features: int
    out_features: int
    panels: Tensor | None
    format: Tensor
    bias: Tensor | None
    _panels_dtype: torch.dtype | None = None  # of the values, while packed

    @property
    def packed(self) -> bool:
        """Whether the weight is held as panels, for inference."""
        return self._panels_dtype is not None

    # What a kind of weight has to say.

    def _portable(self) -> Sparse24 | Sparse24Quantized:
        """The weight in the form that is saved."""
        raise NotImplementedError

    def _hold_portable(self) -> None:
        """Replace the panels by the portable tensors, where there are panels."""
        raise NotImplementedError

    def _hold_panels(self) -> None:
        """Replace the portable tensors by panels, where there are none yet."""
        raise NotImplementedError

    def _can_pack(self) -> bool:
        """Whether there are panels of this weight where it lies."""
        raise NotImplementedError

    def _wants_panels(self) -> bool:
        """Whether it is to be packed again after a move or a load, where it can be."""
        raise NotImplementedError

    def _takes_dtype(self, t: Tensor) -> bool:
        """Whether a move to another dtype changes this tensor of the layer."""
        raise NotImplementedError

    def _pack_where_possible(self) -> None:
        if self._can_pack():
            # Outside inference mode, or its tensors could never be saved for a backward again.
            with torch.inference_mode(False):
                self._hold_panels()

    def _unpack(self) -> None:
        with torch.inference_mode(False):
            self._hold_portable()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wants_panels = self._wants_panels()

        def fn_on_numbers(t: Tensor) -> Tensor:
            moved = fn(t)
            # Index bytes and panel words are no numbers, though Module.type() would cast them.
            keep = moved.dtype != t.dtype and not self._takes_dtype(t)
            return t.to(moved.device) if keep else moved

        if self._panels_dtype is not None:
            assert self.panels is not None
            before = torch.empty(0, dtype=self._panels_dtype, device=self.panels.device)
            after = fn_on_numbers(before)
            if (after.dtype, after.device) != (before.dtype, before.device):
                self._unpack()
        super()._apply(fn_on_numbers, recurse)
        if wants_panels:
            self._pack_where_possible()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        state = self._portable().state()
        for key, tensor in state.items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "format"] = state["format"]  # the buffer is empty after to_empty()

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        check_sparse24(given, self._portable(), self.bias, assign)

    def _load_checked_state(self, *args: Any) -> None:
        wants_panels = self._wants_panels()
        self._unpack()
        super()._load_checked_state(*args)
        if wants_panels:
            self._pack_where_possible()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        wants_panels, self._panels_dtype = self._wants_panels(), None
        self._portable().validate()
        if wants_panels:
            self._pack_where_possible()


class TrainableModule(PackableModule):
    """A layer whose weight is trained while portable, and packed for inference.

    Trainable, it holds the Parameter ``values`` and the buffer ``indices``; packed, the buffer
    ``panels``.
    """

    values: nn.Parameter | None
    indices: Tensor | None
    bias: nn.Parameter | None
    _values_require_grad: bool = True  # what a packed layer gives its values back

    @property
    def weight(self) -> Sparse24 | Sparse24Panels:
        """The weight as the format it is held in: portable while trainable, panels while packed."""
        shape = (self.out_features, self.in_features)
        if self._panels_dtype is not None:
            assert self.panels is not None
            return Sparse24Panels(self.panels, shape, self._panels_dtype)
        assert self.values is not None
        assert self.indices is not None
        return Sparse24(self.values, self.indices, shape)

    def pack(self) -> Self:
        """Hold the weight in the layout that its device reads fastest, for inference only.

        ``values`` and ``indices`` are None from here on, so an optimizer made before no longer
        reaches the weight. Nothing happens to a packed layer.

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
        """Bring the Parameter ``values`` and ``indices`` back, for training.

        ``values`` is a new Parameter: give it to the optimizer. Nothing happens to a trainable
        layer.

        Returns
        -------
        self
        """
        self._unpack()
        return self

    @property
    def weight_requires_grad(self) -> bool:
        """Whether ``values`` is trained, or will be once unpacked."""
        return self._values_require_grad if self.values is None else self.values.requires_grad

    def _portable(self) -> Sparse24:
        weight = self.weight
        return weight if isinstance(weight, Sparse24) else weight.to_sparse24()

    def _set_portable(self, weight: Sparse24, requires_grad: bool) -> None:
        self.values = nn.Parameter(weight.values, requires_grad=requires_grad)
        self.indices = weight.indices
        self.format = weight.state()["format"].to(weight.device)
        self.panels = self._panels_dtype = None

    def _hold_portable(self) -> None:
        weight = self.weight
        if isinstance(weight, Sparse24Panels):
            self._set_portable(weight.to_sparse24(), requires_grad=self._values_require_grad)

    def _hold_panels(self) -> None:
        weight = self.weight
        if isinstance(weight, Sparse24):
            panels = Sparse24Panels.from_sparse24(weight)
            self._values_require_grad = weight.values.requires_grad
            self.values = self.indices = None
            self.panels, self._panels_dtype = panels.panels, panels.dtype

    def _can_pack(self) -> bool:
        weight = self.weight
        return weight.dtype in PANEL_DTYPES and obstacle(weight.device) is None

    def _wants_panels(self) -> bool:
        return self.packed

    def _takes_dtype(self, t: Tensor) -> bool:
        return t.is_floating_point()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed:
            weight = self._portable()
            values = nn.Parameter(weight.values, requires_grad=self._values_require_grad)
            state["_parameters"] = {**self._parameters, "values": values}
            state["_buffers"] = {**self._buffers, "indices": weight.indices, "panels": None}
        return state
