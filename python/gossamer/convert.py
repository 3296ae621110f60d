"""``convert`` swaps the linear layers of a model: all is planned first, then the model changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .conversion.eligibility import dtype_name
from .conversion.plan import LayerPlan, plan_layers
from .conversion.report import ConversionReport, LayerReport
from .prune import magnitude_24


def convert(
    model: nn.Module,
    pattern: str = "2:4",
    prune: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    sample_input: Any = None,
    force: bool = False,
) -> ConversionReport:
    """Replace a model's linear layers by packed ``gossamer.nn.SparseLinear`` where that is faster.

    The model is changed in place, at the very end: an error leaves it as it was. A layer that
    cannot or should not be swapped stays dense, and the report says why. The new layers are packed
    for inference; call ``unpack()`` on one to train it.

    Parameters
    ----------
    model : nn.Module
        Linear layers anywhere inside it are candidates. A model that is itself a linear layer has
        no holder to put the new layer into: it is found as ``report.model``.
    pattern : str
        Only ``"2:4"``.
    prune : {None, "magnitude"}
        None prunes nothing: a layer whose weight is not 2:4 already stays dense. ``"magnitude"``
        prunes every included layer (``gossamer.prune.magnitude_24``), also those that stay dense,
        so the model's answers do not depend on the machine. Tied, parametrised and otherwise
        foreign weights are never pruned; the report says so.
    include, exclude : str or iterable of str, optional
        Names of modules (standing for everything beneath them) or fnmatch patterns of such names.
        By default all linear layers are included; ``exclude`` has the last word.
    sample_input : Tensor, tuple, list or dict, optional
        What the model is called with: one tensor, positional or keyword arguments. It is run once,
        in evaluation mode without gradients; each layer is then timed on as many rows as it was
        given, dense and sparse interleaved, and swapped where sparse is at least 1.05 times as
        fast. A layer that the sample does not reach stays dense. Without a sample a cost table
        decides.
    force : bool
        Swap even what measurement or table would leave dense.

    Returns
    -------
    ConversionReport
        A table when printed; ``report.rows()`` for machines; ``report["name"]`` for one layer.

    Raises
    ------
    ValueError
        Unknown pattern, pruning or name; names come with their closest matches.
    TypeError
        ``model`` is not a module, or ``sample_input`` of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is a torch.nn.Module, got {type(model).__name__}")
    if pattern != "2:4":
        raise ValueError(f"convert: pattern is '2:4', got {pattern!r}")
    if prune not in (None, "magnitude"):
        raise ValueError(f"convert: prune is None or 'magnitude', got {prune!r}")
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        plans = plan_layers(model, prune, include, exclude, sample_input, force)
        return _carry_out(model, plans)


def _carry_out(model: nn.Module, plans: list[LayerPlan]) -> ConversionReport:
    layers = tuple(_report(plan) for plan in plans)
    for plan in plans:
        if plan.pruned and plan.replacement is None:
            weight = plan.site.module.weight
            assert isinstance(weight, Tensor)
            # Tensors made in inference mode can be written to in inference mode only.
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.copy_(magnitude_24(weight))
    for plan in plans:
        if plan.replacement is not None:
            for holder, attribute in plan.site.holders:
                setattr(holder, attribute, plan.replacement)
            if plan.site.module is model:
                model = plan.replacement
    return ConversionReport(model, layers)


def _report(plan: LayerPlan) -> LayerReport:
    layer = plan.site.module
    tensors = [*layer.parameters(), *layer.buffers()]
    before = after = sum(map(_nbytes, tensors))
    if plan.replacement is not None:
        bias = plan.replacement.bias
        after = plan.replacement.weight.nbytes + (0 if bias is None else bias.nbytes)
    return LayerReport(
        name=plan.site.name,
        aliases=plan.site.names[1:],
        shape=(int(layer.out_features), int(layer.in_features)),  # type: ignore[arg-type]
        dtype=dtype_name(tensors[0].dtype) if tensors else "unknown",
        swapped=plan.replacement is not None,
        pruned=plan.pruned,
        kernel=plan.kernel,
        reason=plan.reason,
        bytes_before=before,
        bytes_after=after,
        **plan.measured,
    )


def _nbytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.nbytes
