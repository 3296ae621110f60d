"""Sparse layers in models of the transformers library: saved, and loaded again.

Importing this module registers the quantization method "gossamer" with transformers, so that
``from_pretrained`` knows which layers of a saved model are sparse before it reads their tensors::

    import gossamer.huggingface

    gossamer.convert(model, "2:4", prune="magnitude", include="*_proj")
    gossamer.huggingface.save_pretrained(model, "folder")
    model = AutoModelForCausalLM.from_pretrained("folder")

A dense checkpoint becomes sparse while it is loaded with
``from_pretrained(..., quantization_config=SparseConfig(pattern="2:4", prune="magnitude"))``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .convert import convert
from .formats import Block, Unstructured
from .formats.stored import StoredWeight
from .nn import SparseLinear
from .nn.patterns import PatternName

METHOD = "gossamer"
_ANYWHERE = "unstructured"

# Models initialise the weights of layers that they hold: what is missing from a file alone.
StoredWeight._is_hf_initialized = True  # type: ignore[attr-defined]


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers of a model are sparse, or how a dense one is to become so.

    Parameters
    ----------
    layers : dict, optional
        Of a saved model: for each name of a layer its pattern ("2:4", [rows, cols] or
        "unstructured"), how many blocks or places are live, and its activation.
    pattern : "2:4", "unstructured", Block or [rows, cols]
        Of a dense model: what ``gossamer.convert`` is called with after it is loaded.
    prune, include, exclude, density, force
        The same.

    Raises
    ------
    TypeError, ValueError
        Of another pattern.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        pattern: str | list[int] | Block = "2:4",
        prune: str | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        density: float | None = None,
        force: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.layers = layers
        self.pattern = _written(_read(pattern))
        self.prune, self.density = prune, density
        self.include, self.exclude, self.force = include, exclude, force


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads or saves a model with sparse layers."""

    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **ignored: Any) -> nn.Module:
        """Put sparse layers of the right shapes where the checkpoint has some."""
        config = self.quantization_config
        if config.layers is not None:
            config.layers = _names_in(model, config.layers)
        for name, spec in (config.layers or {}).items():
            dense = model.get_submodule(name)
            if type(dense) is not nn.Linear:
                raise TypeError(f"gossamer: {name} is {type(dense).__name__}, expected a Linear")
            holder, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(holder), attribute, _empty(dense, spec))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **ignored: Any) -> nn.Module:
        config = self.quantization_config
        if config.layers is None:
            convert(
                model,
                _read(config.pattern),
                prune=config.prune,
                include=config.include,
                exclude=config.exclude,
                density=config.density,
                force=config.force,
            )
            config.layers = describe(model)
        else:
            for name in config.layers:
                layer = model.get_submodule(name)
                assert isinstance(layer, SparseLinear)
                layer._portable().validate()
                layer._pack_where_possible()
        # Its layers are as trainable, and cast as well, as those of a model that convert() made.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module, *_: Any, **__: Any
    ) -> tuple[None, dict[str, Any]]:
        """What is saved is the state as it is; the config, written next, says of which layers."""
        self.quantization_config.layers = describe(model)
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What ``SparseConfig.layers`` says of the sparse layers of a model.

    Raises
    ------
    TypeError
        Of a layer of this package that is no ``SparseLinear``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            spec: dict[str, Any] = {"pattern": _written(layer.pattern)}
            if isinstance(layer.pattern, (Block, Unstructured)):
                counted = "blocks" if isinstance(layer.pattern, Block) else "places"
                spec[counted] = layer._portable().values.shape[0]
            if layer.activation is not None:
                spec["activation"] = layer.activation
            found[name] = spec
        elif type(layer).__module__.startswith("gossamer."):
            raise TypeError(f"gossamer: {name} is {type(layer).__name__}: SparseLinear alone loads")
    return found


def save_pretrained(model: Any, path: str | Path, **options: Any) -> None:
    """As ``model.save_pretrained``, with what ``from_pretrained`` has to know of sparse layers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its sparse layers packed or trainable; they are saved in the portable form.
    path : str or Path
        The folder.
    **options
        Of ``model.save_pretrained``.

    Raises
    ------
    ValueError
        If a ``state_dict`` is given, which transformers would pass over.
    """
    if options.get("state_dict") is not None:
        raise ValueError("gossamer.huggingface.save_pretrained: saves the model's own state_dict")
    config = SparseConfig(layers=describe(model))
    model.config.quantization_config = config
    model.hf_quantizer = SparseQuantizer(config, pre_quantized=True)
    model.save_pretrained(path, **options)


def _written(pattern: PatternName) -> str | list[int]:
    """A pattern as JSON has it."""
    if isinstance(pattern, Block):
        return [pattern.rows, pattern.cols]
    return _ANYWHERE if isinstance(pattern, Unstructured) else pattern


def _read(pattern: Any) -> PatternName:
    if isinstance(pattern, (list, tuple)) and len(pattern) == 2:
        return Block(*pattern)
    if pattern == _ANYWHERE or pattern == Unstructured():
        return Unstructured()
    if pattern == "2:4" or isinstance(pattern, Block):
        return pattern
    raise ValueError(
        f"SparseConfig: pattern {pattern!r}, expected '2:4', {_ANYWHERE!r}, a gossamer.Block or "
        "[rows, cols]"
    )


def _names_in(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    """By the names that a model has: as transformers, which adds or strips that of the base model.

    Layers that it lacks, of another head, are left out.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    held = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found = {}
    for name, spec in layers.items():
        names = (name, name.removeprefix(prefix), prefix + name)
        known = next((each for each in names if each in held), None)
        if known is not None:
            found[known] = spec
    return found


def _empty(dense: nn.Linear, spec: dict[str, Any]) -> SparseLinear:
    """A sparse layer in the place of a dense one, without content."""
    pattern, density = _read(spec["pattern"]), None
    if isinstance(pattern, Unstructured):
        density = max(spec["places"], 1) / dense.weight.numel()
    elif isinstance(pattern, Block):
        rows, columns = pattern.grid((dense.out_features, dense.in_features))
        density = spec["blocks"] / (rows * columns)
    layer = SparseLinear(
        dense.in_features, dense.out_features, dense.bias is not None, pattern,
        dense.weight.device, dense.weight.dtype, density,
    )  # fmt: skip
    if spec.get("places") == 0:  # of a weight that is zero: no layer is drawn so
        layer.values = nn.Parameter(dense.weight.detach().flatten()[:0])
        layer.col_indices = layer.col_indices[:0]
    layer.activation = spec.get("activation")
    return layer.train(dense.training)
