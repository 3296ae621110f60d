"""2:4 weights that other packages have written: compressed-tensors, and torch's own subclass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .conversion.selection import layer_sites
from .formats import Sparse24
from .nn import SparseLinear

_PARTS = ("compressed", "bitmask", "shape")


def sparse24_from_bitmask(compressed: Tensor, bitmask: Tensor, shape: Tensor) -> Sparse24:
    """A weight in the layout "sparse-24-bitmask" of compressed-tensors, exactly.

    Parameters
    ----------
    compressed : Tensor
        [N, K / 2] floating point: the kept entries, row by row.
    bitmask : Tensor
        [N, ceil(K / 8)] uint8: bit b of byte j says whether column 8 j + b is kept; two of every
        four are.
    shape : Tensor
        [2] or [2, 1] integers: N and K, a multiple of 4.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes disagree, or the mask is not 2:4. Values that are quantized have to be
        scaled first.
    """
    op = "sparse24_from_bitmask"
    if shape.numel() != 2 or shape.is_floating_point():
        raise ValueError(f"{op}: shape is {shape.tolist()}, expected two whole numbers")
    n, k = (int(size) for size in shape.flatten())
    if bitmask.dtype != torch.uint8 or not compressed.dtype.is_floating_point:
        raise TypeError(f"{op}: compressed is {compressed.dtype}, bitmask {bitmask.dtype}")
    if compressed.dtype.itemsize < 2:
        raise TypeError(
            f"{op}: compressed is {compressed.dtype}; multiply it by its scales in a wider dtype"
        )
    sizes = [list(compressed.shape), list(bitmask.shape)]
    if n < 1 or k < 4 or k % 4 != 0 or sizes != [[n, k // 2], [n, (k + 7) // 8]]:
        raise ValueError(
            f"{op}: compressed and bitmask have shapes {sizes[0]} and {sizes[1]}, a [{n}, {k}] "
            f"weight needs {[n, k // 2]} and {[n, (k + 7) // 8]}, K a multiple of 4"
        )
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask[:, :, None] >> bits & 1).flatten(1).bool()
    kept = mask[:, :k].unflatten(1, (-1, 4)).sum(-1)
    if bool((kept != 2).any()) or bool(mask[:, k:].any()):
        row, group = ((kept != 2).nonzero().tolist() or [[0, k // 4]])[0]
        raise ValueError(f"{op}: the mask is not 2:4 in row {row}, group {group}")
    places = mask[:, :k].nonzero()[:, 1].view(n, k // 4, 2) % 4
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    pairs = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2)).unflatten(1, (-1, 2))
    indices = pairs[..., 0] | pairs[..., 1] << 4
    return Sparse24(compressed.contiguous(), indices, (n, k)).validate()


def sparse24_from_torch(weight: Tensor) -> Sparse24:
    """The weight of a ``torch.sparse.SparseSemiStructuredTensor``, exactly.

    Parameters
    ----------
    weight : SparseSemiStructuredTensor
        Of the CUTLASS backend on any device; of cuSPARSELt on a GPU, where torch unpacks it.

    Raises
    ------
    TypeError
        If it is another tensor, or of a dtype that has no kernels here.
    """
    from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    if not isinstance(weight, SparseSemiStructuredTensor):
        raise TypeError(
            f"sparse24_from_torch: {type(weight).__name__}, expected a SparseSemiStructuredTensor"
        )
    with torch.no_grad():
        if isinstance(weight, SparseSemiStructuredTensorCUTLASS):
            assert weight.packed is not None
            assert weight.meta is not None
            dense = sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta)
        else:
            dense = weight.to_dense()
        rows, columns = weight.shape
        made = Sparse24.from_dense(dense[:rows, :columns].cpu())
    return made.to(weight.device)


def from_torch_sparse(model: nn.Module) -> list[str]:
    """Replace linear layers with a ``SparseSemiStructuredTensor`` as weight by ``SparseLinear``.

    Parameters
    ----------
    model : nn.Module
        Changed in place, at the very end; the new layers are trainable.

    Returns
    -------
    list of str
        Their names.
    """
    from torch.sparse import SparseSemiStructuredTensor

    found = [
        site
        for site in layer_sites(model)
        if type(site.module) is nn.Linear
        and site.holders
        and isinstance(site.module.weight.data, SparseSemiStructuredTensor)
    ]
    made = [_layer(site.module, sparse24_from_torch(site.module.weight.data)) for site in found]  # type: ignore[arg-type]
    for site, layer in zip(found, made, strict=True):
        site.replace(layer)
    return [site.name for site in found]


def load_compressed_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load a checkpoint of compressed-tensors' layout "sparse-24-bitmask" into a dense model.

    Linear layers whose weight the checkpoint holds as ``compressed``, ``bitmask`` and ``shape``
    become ``SparseLinear``, trainable, of the model's dtype; all else is loaded as usual::

        state = safetensors.torch.load_file("model.safetensors")
        names = load_compressed_tensors(AutoModelForCausalLM.from_config(config), state)

    Parameters
    ----------
    model : nn.Module
        Changed in place, at the very end.
    state : mapping of str to Tensor
        The tensors of all files of the checkpoint.

    Returns
    -------
    list of str
        The names of the layers that are 2:4 now.

    Raises
    ------
    TypeError, ValueError
        If a layer is no ``torch.nn.Linear`` of that shape, the checkpoint lacks tensors or has
        unknown ones (such as scales: quantized weights are not read) or some that cannot be copied,
        a mask is not 2:4, or the model is on the meta device.
    """
    op = "load_compressed_tensors"
    names = [key.removesuffix(".bitmask") for key in state if key.endswith(".bitmask")]
    sites = {name: site for site in layer_sites(model) for name in site.names}
    made: dict[str, SparseLinear] = {}
    for name in names:
        site = sites.get(name)
        if site is None or type(site.module) is not nn.Linear or not site.holders:
            raise TypeError(f"{op}: {name} is no torch.nn.Linear inside the model")
        lacking = [part for part in _PARTS if f"{name}.{part}" not in state]
        if lacking:
            raise ValueError(f"{op}: {name}: the checkpoint lacks {lacking}")
        weight = sparse24_from_bitmask(*(state[f"{name}.{part}"] for part in _PARTS))
        if weight.shape != tuple(site.module.weight.shape):
            raise ValueError(
                f"{op}: {name}: the checkpoint's weight is {list(weight.shape)}, the layer's "
                f"{list(site.module.weight.shape)}"
            )
        own = site.module.weight
        made[name] = _layer(site.module, weight.to(own.device, own.dtype))
    sparse = {f"{name}.{part}" for name in names for part in _PARTS}
    rest = {key: tensor for key, tensor in state.items() if key not in sparse}
    replaced = {f"{alias}.weight" for name in names for alias in sites[name].names}
    wanted = model.state_dict(keep_vars=True)
    given = {id(wanted[key]) for key in rest if key in wanted}
    unknown = [key for key in rest if key not in wanted or key in replaced]
    missing = [
        key
        for key, tensor in wanted.items()
        if key not in rest and key not in replaced and id(tensor) not in given
    ]
    if unknown or missing:
        raise ValueError(f"{op}: the checkpoint lacks {missing[:5]} and has unknown {unknown[:5]}")
    for key, tensor in wanted.items():
        if tensor.is_meta:
            raise ValueError(f"{op}: the model's {key} is on the meta device, expected a real one")
    for key, tensor in rest.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{op}: {key} is {list(tensor.shape)}, the model's {list(wanted[key].shape)}"
            )
        first = (slice(1),) * tensor.dim()
        try:
            wanted[key].detach()[first].clone().copy_(tensor[first])
        except (RuntimeError, TypeError) as error:
            what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise TypeError(f"{op}: {key} cannot be copied: it is {what}") from error
    model.load_state_dict(rest, strict=False)
    for name, layer in made.items():
        bias = sites[name].module.bias
        if layer.bias is not None:
            assert isinstance(bias, Tensor)
            layer.bias.data.copy_(bias.detach())
        sites[name].replace(layer)
    return names


def _layer(linear: nn.Linear, weight: Sparse24) -> SparseLinear:
    """A layer with this weight and what else a dense one has."""
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = SparseLinear(*sizes, bias, "2:4", "meta", weight.dtype)
    return layer._take_from(linear, weight)
