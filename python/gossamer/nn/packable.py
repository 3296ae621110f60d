"""The two forms of a sparse weight in a layer: portable tensors, or packed as panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import CheckedModule, OpenWeight, check_weight

if TYPE_CHECKING:
    from typing_extensions import Self


def held_while_spawning(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is pickled, kept alive with the process that it is pickled for, if any.

    That process opens the shared memory of the tensors later, and they were made for the pickle
    alone.
    """
    process = get_spawning_popen()
    if process is not None:
        vars(process).setdefault("_held", []).append(state)
    return state


class PackableModule(CheckedModule):
    """A layer with one copy of a sparse weight.

    Packed, it holds the buffer ``panels``, which belong to one device and dtype. A ``state_dict``,
    a pickle, a deep copy and a move to another device or dtype go through the portable form in
    either state, and what comes in is validated first.
    """

    panels: Tensor | None
    format: Tensor
    bias: Tensor | None
    _panels_dtype: torch.dtype | None = None  # of the values, while packed

    @property
    def packed(self) -> bool:
        """Whether the weight is held as panels, for inference."""
        return self._panels_dtype is not None

    # What a kind of weight has to say.

    def _portable(self) -> OpenWeight:
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
            moves = (after.dtype, after.device) != (before.dtype, before.device)
            # What is done to numbers is not done to panels: a memory format, though they may have
            # four axes, is not for them, and those of to_empty() could not be read any more.
            if moves or _changes(fn_on_numbers, self.panels):
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
            if key not in self._parameters and key not in self._buffers:
                continue  # torch.nn.utils.prune saves what it made of it
            destination[prefix + key] = tensor if keep_vars else tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "format"] = state["format"]  # the buffer is empty after to_empty()

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        check_weight(given, self._portable(), self.bias, assign)

    def _make_room(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]
    ) -> None:
        """Prepare the portable tensors for those that a load is to put in their place."""

    def _load_checked_state(self, *args: Any) -> None:
        wants_panels = self._wants_panels()
        self._unpack()
        self._make_room(*args[:3])
        super()._load_checked_state(*args)
        if wants_panels:
            self._pack_where_possible()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        wants_panels, self._panels_dtype = self._wants_panels(), None
        self._portable().validate()
        if wants_panels:
            self._pack_where_possible()


def _changes(fn: Callable[[Tensor], Tensor], t: Tensor) -> bool:
    try:
        return fn(t) is not t
    except RuntimeError:  # of a memory format for another number of axes
        return True
