"""``quantize`` rounds the sparse layers of a model: all are made first, then the model changed."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .conversion.eligibility import hooks_of
from .conversion.selection import layer_sites
from .nn import SparseLinear, SparseLinearQuantized

_OWN_TENSORS = {"values", "indices", "panels", "format", "bias"}


def quantize(model: nn.Module, dtype: str = "int8", group: int | None = None) -> nn.Module:
    """Replace ``gossamer.nn.SparseLinear`` by ``SparseLinearQuantized``, for inference.

    Rounding changes a model's answers; nothing is calibrated or retrained. A layer is rounded on
    its own, so the result does not depend on the machine or on what else is in the model. It is
    then held in the layout that the kernels read (``SparseLinearQuantized.pack``).

    Parameters
    ----------
    model : nn.Module
        A 2:4 ``SparseLinear``, packed or not, which stays as it is; or a model that holds some,
        which are replaced in place, at the very end: an error leaves it as it was. Layers of
        another pattern stay as they are, as dense ones do.
    dtype : {"int8", "float8_e4m3fn", "int4"}
        int8 and float8_e4m3fn quantise x row by row at run time and multiply in that type, with
        one scale a row of W. int4 keeps x as it is.
    group : int, optional
        Columns of W that share a scale, for int4: a multiple of 4, by default 128. From K on, and
        always for the other types, there is one scale a row.

    Returns
    -------
    nn.Module
        The quantised layer, or ``model`` itself.

    Raises
    ------
    TypeError
        If ``model`` is not a module, or a layer is float64.
    ValueError
        If there is nothing to quantise, a layer could not be replaced without loss (it has hooks,
        a class or a forward of its own, or holds more than a weight and a bias, or is compiled by
        itself), or as ``Sparse24Quantized.from_sparse24`` says.

    References
    ----------
    Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), for scales by row.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is {type(model).__name__}, expected torch.nn.Module")
    if isinstance(model, SparseLinear):
        return _quantized("the layer", model, dtype, group)
    sites = [site for site in layer_sites(model) if _has_24(site.module)]
    if not sites:
        held = Counter(type(m).__name__ for m in model.modules() if not m._modules)
        found = ", ".join(f"{count} {kind}" for kind, count in held.most_common())
        raise ValueError(
            f"quantize: {type(model).__name__} holds no 2:4 SparseLinear, but {found}; "
            "gossamer.convert makes linear layers sparse"
        )
    for name, module in model.named_modules():
        # The name, since asking for the class would import the compiler.
        if type(module).__name__ == "OptimizedModule" and _has_24(module._modules.get("_orig_mod")):
            raise ValueError(
                f"quantize: torch.compile() holds on to the layer in {name!r}; quantise first, "
                "then compile"
            )
    made = [(site, _quantized(repr(site.name), site.module, dtype, group)) for site in sites]
    for site, layer in made:
        site.replace(layer)
    return model


def _has_24(module: nn.Module | None) -> bool:
    return isinstance(module, SparseLinear) and module.pattern == "2:4"


def _quantized(name: str, layer: nn.Module, dtype: str, group: int | None) -> SparseLinearQuantized:
    hooks = hooks_of(layer)
    if hooks:
        raise ValueError(f"quantize: {name} has {' and '.join(hooks)}, which would be lost")
    if type(layer) is not SparseLinear or "forward" in layer.__dict__:
        raise ValueError(
            f"quantize: {name} is a {type(layer).__name__} with a class or a forward of its own, "
            "which would be lost"
        )
    more = {*layer._parameters, *layer._buffers, *layer._modules} - _OWN_TENSORS
    if more:
        raise ValueError(f"quantize: {name} also holds {', '.join(sorted(more))}")
    try:
        return SparseLinearQuantized.from_sparse(layer, dtype, group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantize: {name}: {error}") from error
