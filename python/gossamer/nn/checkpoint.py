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

OpenWeight = Sparse24 | Sparse24Conv | BlockSparse | SparseCsr | Sparse24Quantized


class CheckedModule(nn.Module):
    """A module whose checkpoints are looked at as a whole before it takes any of them over."""

    optional_state: frozenset[str] = frozenset()  # keys that a checkpoint may have or lack

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
            missing = [k for k in own if k not in state_dict and k not in self.optional_state]
            unexpected = [k for k in state_dict if k not in own and k not in self.optional_state]
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

    def _load_checked_state(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take over what was checked, with the arguments of ``_load_from_state_dict``."""
        given = buffers_detached(self, state_dict, prefix)
        super()._load_from_state_dict(given, prefix, *rest)


def buffers_detached(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """A checkpoint in which no buffer is a Parameter: torch would assign it as one."""
    given = dict(state_dict)
    for name in module._buffers:
        if isinstance(tensor := given.get(prefix + name), nn.Parameter):
            given[prefix + name] = tensor.detach()
    return given


def check_loaded(given: Mapping[str, Any], held: Mapping[str, Tensor | None], assign: bool) -> None:
    """Raise where loading dense tensors in the place of those that a layer holds would break it.

    Parameters
    ----------
    given : mapping
        The checkpoint's entries for this layer. What it lacks stays as the layer has it.
    held : mapping
        Those of the layer, by their names; None for one that it does not have.
    assign : bool
        Whether the layer takes the tensors themselves over, or copies them into its own.

    Raises
    ------
    TypeError, ValueError
        If an entry has the wrong kind, dtype or shape, or, when assigned, another dtype than the
        layer's others.
    """
    after = {}
    for key, own in held.items():
        if own is None:
            continue
        after[key] = own
        if key in given:
            _check_floating(key, given[key], own, assign)
            after[key] = given[key]
    if assign and len({t.dtype for t in after.values()}) > 1:
        raise TypeError(f"the dtypes differ: { {key: t.dtype for key, t in after.items()} }")


def check_weight(
    given: Mapping[str, Any],
    weight: OpenWeight,
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
    _check_floating("bias", loaded_bias, bias, assign)
    if not assign:
        return
    if isinstance(loaded, Sparse24Quantized):
        if loaded_bias.dtype not in PANEL_DTYPES:
            raise TypeError(f"'bias' is {loaded_bias.dtype}, expected float32, bfloat16 or float16")
    elif loaded_bias.dtype != loaded.dtype:
        raise TypeError(f"'bias' is {loaded_bias.dtype}, the values are {loaded.dtype}")


def _parts(weight: OpenWeight) -> str:
    return "places" if isinstance(weight, SparseCsr) else "blocks"


def _kind(weight: OpenWeight) -> str:
    kind = str(list(weight.shape))
    if isinstance(weight, Sparse24Quantized):
        kind += f" {weight.value_type} (group {weight.group})"
    if isinstance(weight, BlockSparse):
        kind += f" {weight.block}"
    if isinstance(weight, (BlockSparse, Sparse24Conv)) and weight.groups > 1:
        kind += f" of {weight.groups} groups"
    return kind


def _check_floating(key: str, given: Any, held: Tensor, assign: bool) -> None:
    if not isinstance(given, Tensor) or given.dtype not in VALUE_DTYPES:
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{key!r} is {what}, expected a floating-point tensor")
    if given.layout != torch.strided or given.shape != held.shape:
        raise ValueError(
            f"{key!r} has shape {list(given.shape)} and layout {given.layout}, "
            f"expected {list(held.shape)}, strided"
        )
    _check_content(key, given, held, assign)


def _check_content(key: str, given: Tensor, held: Tensor, assign: bool) -> None:
    if given.is_meta and not held.is_meta and not assign:
        raise ValueError(f"{key!r} is a meta tensor, there is nothing to copy")
    trained = assign and held.requires_grad
    if trained and given.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{key!r} is a tensor of inference mode, which cannot be trained: load it without "
            "assign=True, or a clone"
        )
