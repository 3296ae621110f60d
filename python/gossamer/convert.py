"""``convert`` swaps the layers of a model: all is planned first, then the model changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .conversion.eligibility import dtype_name
from .conversion.kinds import ACTIVATION, layer_pattern, linear_shape
from .conversion.plan import LayerPlan, Wanted, plan_layers
from .conversion.report import ConversionReport, LayerReport
from .conversion.timing import misfits, run_sample
from .nn.patterns import PatternName, pattern_of


def convert(
    model: nn.Module,
    pattern: PatternName = "2:4",
    prune: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    sample_input: Any = None,
    force: bool = False,
    density: float | None = None,
    thresholds: float | Mapping[str, float] = 0.0,
) -> ConversionReport:
    """Replace a model's linear layers and convolutions by sparse ones where that is faster.

    They become ``gossamer.nn.SparseLinear`` and ``SparseConv1d``, ``SparseConv2d``,
    ``SparseConv3d``, packed where their pattern has a layout for that, or ``ActSparseLinear``.

    The model is changed in place, at the very end: an error leaves it as it was. A layer that
    cannot or should not be swapped stays dense, and the report says why. The new layers are packed
    for inference; call ``unpack()`` on one to train it.

    Parameters
    ----------
    model : nn.Module
        Linear layers and convolutions (not transposed ones) anywhere inside it are candidates. A
        model that is itself such a layer has no holder to put the new layer into: it is found as
        ``report.model``.
    pattern : "2:4", Block, Unstructured or "activation"
        Two non-zeros in every four inputs of a weight, blocks, or (of linear layers) any places,
        whose share ``gossamer.Unstructured(density)`` says. "activation" leaves the weights
        of linear layers as they are and skips inputs that are zero (``ActSparseLinear``): for
        what follows a ReLU or one of its kind, or has thresholds. Only a sample tells where that
        pays, at as many rows as it has: give one like those that the model is to run on, such as
        a single token.
    prune : {None, "magnitude"}
        None prunes nothing: a layer whose weight does not fit already stays dense. ``"magnitude"``
        prunes every included layer (``gossamer.prune.magnitude_24``, ``magnitude_blocks`` or
        ``magnitude_unstructured``), also those that stay dense, so the model's answers do not
        depend on the machine. Tied, parametrised and otherwise foreign weights are never pruned;
        the report says so.
    include, exclude : str or iterable of str, optional
        Names of modules (standing for everything beneath them) or fnmatch patterns of such names.
        By default all candidates are included; ``exclude`` has the last word.
    sample_input : Tensor, tuple, list or dict, optional
        What the model is called with: one tensor, positional or keyword arguments. It is run in
        evaluation mode without gradients; each layer is then timed on as many rows or images as
        it was given, dense and sparse interleaved, and swapped where sparse is at least 1.05 times
        as fast. A layer that the sample does not reach stays dense. The model is then run with its
        sparse layers: one that it gives another dtype than its weight's stays dense, and all do
        where it fails, which a third run, dense, confirms. Without a sample a cost table decides.
        ``exclude`` layers whose weight the model itself reads, such as Mamba's ``dt_proj``.
    force : bool
        Swap even what measurement or table would leave dense, though not what makes a sample fail.
    density : float, optional
        The share of blocks or places that pruning keeps in each layer, of a pattern of blocks or
        of ``Unstructured()``.
    thresholds : float or mapping of str to float
        Of "activation": inputs of at most this absolute value count as zero, for all layers, or
        by a layer's name and 0 for others (``gossamer.calibrate_thresholds``).

    Returns
    -------
    ConversionReport
        A table when printed; ``report.rows()`` for machines; ``report["name"]`` for one layer.

    Raises
    ------
    ValueError
        Unknown pattern, pruning or name; names come with their closest matches. A density that is
        missing, superfluous or not in (0, 1]. Thresholds that are negative, not finite, of no
        layer, or of a pattern other than "activation".
    TypeError
        ``model`` is not a module, or ``sample_input`` of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is {type(model).__name__}, expected torch.nn.Module")
    if prune not in (None, "magnitude"):
        raise ValueError(f"convert: prune is {prune!r}, expected None or 'magnitude'")
    if pattern == ACTIVATION:
        _check_activation(model, prune, density, thresholds)
    elif thresholds != 0.0:
        raise ValueError(f"convert: thresholds are for pattern 'activation', got {pattern!r}")
    else:
        # Of any weight: the pattern and the density are looked at before the model.
        pattern_of("convert", pattern, (1, 1)).check("convert", density, wanted=prune is not None)
    wanted = Wanted(pattern, prune, density, thresholds)
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        plans = plan_layers(model, wanted, include, exclude, sample_input, force)
        if sample_input is not None:
            _try_out(model, plans, sample_input)
        return _carry_out(model, wanted, plans)


def _check_activation(
    model: nn.Module,
    prune: str | None,
    density: float | None,
    thresholds: float | Mapping[str, float],
) -> None:
    if prune is not None or density is not None:
        raise ValueError(
            f"convert: pattern 'activation' prunes no weight, got prune {prune!r} and density "
            f"{density}"
        )
    each = thresholds if isinstance(thresholds, Mapping) else {"": thresholds}
    for name, threshold in each.items():
        if not 0 <= threshold < math.inf:
            raise ValueError(f"convert: threshold {threshold} of {name!r}, expected 0 or more")
    layers = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if isinstance(thresholds, Mapping) and (unknown := set(thresholds) - layers):
        raise ValueError(f"convert: thresholds of {sorted(unknown)[0]!r}, no such module")


def _try_out(model: nn.Module, plans: list[LayerPlan], sample_input: Any) -> None:
    """Run the model with its sparse layers, and leave those dense that it does not get on with."""
    swapped: dict[nn.Module, LayerPlan] = {
        plan.replacement: plan for plan in plans if plan.replacement is not None
    }
    if not swapped:
        return
    reasons: dict[nn.Module, str] = {}
    failure: Exception | None = None
    done: list[LayerPlan] = []
    try:
        for layer, plan in swapped.items():
            plan.site.replace(layer)
            done.append(plan)
        reasons = misfits(model, swapped, sample_input)
    except Exception as error:
        failure = error
    finally:
        for plan in done:
            plan.site.replace(plan.site.module)
    if failure is not None and _runs(model, sample_input):
        text = f"the model does not run with sparse layers: {type(failure).__name__}: {failure}"
        reasons = dict.fromkeys(swapped, text)
    for layer, reason in reasons.items():
        plan = swapped[layer]
        plan.replacement, plan.kernel, plan.reason = None, None, reason


def _runs(model: nn.Module, sample_input: Any) -> bool:
    """Whether a sample can be run again: a cache that is part of it may be full."""
    try:
        run_sample(model, sample_input)
    except Exception:
        return False
    return True


def _carry_out(model: nn.Module, wanted: Wanted, plans: list[LayerPlan]) -> ConversionReport:
    layers = tuple(_report(plan) for plan in plans)
    for plan in plans:
        if plan.pruned and plan.replacement is None:
            weight = plan.site.module.weight
            assert isinstance(weight, Tensor)
            # Tensors made in inference mode can be written to in inference mode only.
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                held = layer_pattern(plan.site.module, wanted.pattern)
                weight.copy_(held.prune(weight, wanted.density))
    for plan in plans:
        if plan.replacement is not None:
            plan.site.replace(plan.replacement)
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
        shape=_shape(layer),
        dtype=dtype_name(tensors[0].dtype) if tensors else "unknown",
        swapped=plan.replacement is not None,
        pruned=plan.pruned,
        kernel=plan.kernel,
        reason=plan.reason,
        bytes_before=before,
        bytes_after=after,
        **plan.measured,
    )


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Of the dense weight, as far as the layer knows it."""
    if (sizes := linear_shape(layer)) is not None:
        return int(sizes[0]), int(sizes[1])
    group_in = int(layer.in_channels) // int(layer.groups)  # type: ignore[arg-type]
    return int(layer.out_channels), group_in, *layer.kernel_size  # type: ignore[arg-type, misc]


def _nbytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.nbytes
