"""What a checkpoint has to be before a sparse layer takes any of it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import (
    PANEL_DTYPES,
    VALUE_DTYPES,
    BlockSparse,
    Sparse24,
    Sparse24Conv,
    Sparse24Quantized,
    SparseCsr,
)

SavedWeight = Sparse24 | Sparse24Conv | BlockSparse | SparseCsr | Sparse24Quantized


class CheckedModule(nn.Module):
    """A module whose checkpoints are looked at as a whole before it takes any of them over."""

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        """Raise TypeError or ValueError where loading the module's own entries would break it."""
        raise NotImplementedError

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``torch.nn.Module``'s, but a load that fails leaves the layer as it was.

        Raises
        ------
        RuntimeError
            If an entry is no valid part of a sparse weight or, when ``strict``, if keys are missing
            or unexpected.
        """
        # Torch reports wrong keys after it has loaded the others.
        if strict and not self._modules and not self._load_state_dict_pre_hooks:
            own = self.state_dict().keys()
            missing = [key for key in own if key not in state_dict]
            unexpected = [key for key in state_dict if key not in own]
            if missing or unexpected:
                raise RuntimeError(
                    f"Error(s) in loading state_dict for {type(self).__name__}: "
                    f"missing key(s) {missing}, unexpected key(s) {unexpected}"
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {k[len(prefix) :]: t for k, t in state_dict.items() if k.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            self.check_state(given, assign)
        except (TypeError, ValueError) as error:
            error_msgs.append(f'While loading "{prefix}": {error}')
            return
        self._load_checked_state(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_checked_state(self, *args: Any) -> None:
        """Take over what was checked, with the arguments of ``_load_from_state_dict``."""
        super()._load_from_state_dict(*args)


def check_weight(
    given: Mapping[str, Any],
    weight: SavedWeight,
    bias: Tensor | None,
    assign: bool,
) -> None:
    """Raise where loading ``given`` into a layer of ``weight`` and ``bias`` would break the layer.

    Parameters
    ----------
    given : mapping
        The checkpoint's entries for this layer. What it lacks stays as the layer has it.
    weight, bias
        What the layer holds now.
    assign : bool
        Whether the layer takes the tensors themselves over, or copies them into its own.

    Raises
    ------
    TypeError, ValueError
        If an entry has the wrong kind, dtype or shape, or the indices are not valid.
    """
    loaded, held = weight, weight.state()
    if any(key in given for key in held):
        loaded = type(weight).from_state({**held, **given})
        if _kind(loaded) != _kind(weight):
            raise ValueError(
                f"the checkpoint holds a {_kind(loaded)} weight, the layer is {_kind(weight)}"
            )
        if not assign and loaded.values.shape != weight.values.shape:
            raise ValueError(
                f"the checkpoint holds {loaded.values.shape[0]} live {_parts(weight)}, the layer "
                f"{weight.values.shape[0]}: load it with assign=True, which replaces the layer's "
                "Parameter, or into a layer of that density"
            )
        _check_content("values", loaded.values, weight.values, assign)
    if bias is None or "bias" not in given:
        return
    loaded_bias = given["bias"]
    if not isinstance(loaded_bias, Tensor) or loaded_bias.dtype not in VALUE_DTYPES:
        what = loaded_bias.dtype if isinstance(loaded_bias, Tensor) else type(loaded_bias).__name__
        raise TypeError(f"'bias' is {what}, expected a floating-point tensor")
    if loaded_bias.layout != torch.strided or loaded_bias.shape != bias.shape:
        raise ValueError(
            f"'bias' has shape {list(loaded_bias.shape)} and layout {loaded_bias.layout}, "
            f"expected {list(bias.shape)}, strided"
        )
    _check_content("bias", loaded_bias, bias, assign)
    if not assign:
        return
    if isinstance(loaded, Sparse24Quantized):
        if loaded_bias.dtype not in PANEL_DTYPES:
            raise TypeError(f"'bias' is {loaded_bias.dtype}, expected float32, bfloat16 or float16")
    elif loaded_bias.dtype != loaded.dtype:
        raise TypeError(f"'bias' is {loaded_bias.dtype}, the values are {loaded.dtype}")


def _parts(weight: SavedWeight) -> str:
    return "places" if isinstance(weight, SparseCsr) else "blocks"


def _kind(weight: SavedWeight) -> str:
    kind = str(list(weight.shape))
    if isinstance(weight, Sparse24Quantized):
        kind += f" {weight.value_type} (group {weight.group})"
    if isinstance(weight, BlockSparse):
        kind += f" {weight.block}"
    if isinstance(weight, (BlockSparse, Sparse24Conv)) and weight.groups > 1:
        kind += f" of {weight.groups} groups"
    return kind


def _check_content(key: str, given: Tensor, held: Tensor, assign: bool) -> None:
    if given.is_meta and not held.is_meta and not assign:
        raise ValueError(f"{key!r} is a meta tensor, there is nothing to copy")
