"""SparseLinear: a linear layer that keeps, and multiplies, only part of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import Block, Unstructured
from ..ops.blocksparse import blocksparse_linear_tensors
from ..ops.csr import csr_linear_tensors
from ..ops.sparse24 import sparse24_linear_tensors
from .dense import check_layer
from .patterns import PatternName, pattern_of
from .trainable import TrainableModule

# Leaves for torch.fx, which could not follow their branches on x.
torch.fx.wrap("sparse24_linear_tensors")
torch.fx.wrap("blocksparse_linear_tensors")
torch.fx.wrap("csr_linear_tensors")


class SparseLinear(TrainableModule):
    """``y = x Wᵀ + b`` where W is 2:4, zero in whole blocks, or sparse without structure.

    A layer has two states. While it is *trainable* its weight is the Parameter ``values`` under
    the fixed pattern of its indices. ``pack()`` replaces both by ``panels``, the layout that the
    kernels of its device read fastest, for inference; ``unpack()`` brings them back. (Blocks have
    such a layout on the CPU only, and keep their indices beside it; unstructured weights have none,
    their kernels read what is trained.) A ``state_dict``, a pickle
    and a deep copy hold the portable form in either state, and all of them are validated before a
    layer takes them over.

    Parameters
    ----------
    in_features, out_features : int
        K and N, any numbers from 1 on.
    bias : bool
        Whether to add a learnable [N] bias.
    pattern : "2:4", Block or Unstructured
        The sparsity pattern: at most two non-zeros in every four columns of a row, blocks, or any
        places, of the density that the pattern has.
    device, dtype
        As for ``torch.nn.Linear``: float32, bfloat16, float16, or float64 (serial kernels only).
    density : float, optional
        The share of blocks or places that are live, in (0, 1], of a pattern of blocks, which needs
        it, or of ``Unstructured()``.

    Attributes
    ----------
    values : Parameter or None
        The kept weights; [N, 2 ceil(K / 4)] of 2:4, [nnz, rows, cols] of blocks, [nnz] without
        structure; None while packed.
    indices : Tensor or None
        Of 2:4: [N, ceil(ceil(K / 4) / 2)] uint8, their columns (``gossamer.formats.Sparse24``).
    crow_indices, col_indices : Tensor
        Of blocks and single places: where they are (``gossamer.formats.BlockSparse``,
        ``SparseCsr``).
    panels : Tensor or None
        The packed weight (``gossamer.formats.Sparse24Panels``, ``BlockSparsePanels``); None while
        trainable.
    format : Tensor
        int64: what a ``state_dict`` says of itself.
    bias : Parameter or None
        [N].
    activation : {None, "relu", "gelu", "silu"}
        What is applied to the result, in the same pass; ``gossamer.fuse_activations`` sets it.

    Raises
    ------
    ValueError
        If a size is below 1, the pattern unknown, or a density missing, superfluous or outside of
        its range.
    TypeError
        If there are no kernels for ``dtype``.
    """

    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: PatternName = "2:4",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        density: float | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"SparseLinear: in_features {in_features} and out_features {out_features}, "
                "both must be at least 1"
            )
        held = pattern_of("SparseLinear", pattern, (out_features, in_features))
        held.check("SparseLinear", density, wanted=True)
        self.out_features, self.in_features = held.shape
        self.pattern = pattern
        self._set_up(held, bias, density, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        pattern: PatternName = "2:4",
        prune: str | None = None,
        density: float | None = None,
    ) -> SparseLinear:
        """A trainable layer with the weight and a copy of the bias of a dense one.

        Parameters
        ----------
        linear : torch.nn.Linear
            Its weight must fit the pattern, unless ``prune`` says how to make it fit. Of blocks,
            those are live that hold a non-zero; without structure, the non-zeros are.
        pattern : "2:4", Block or Unstructured
            The sparsity pattern.
        prune : {None, "magnitude"}
            "magnitude" keeps the two largest of every four (``gossamer.prune.magnitude_24``), or
            the blocks of largest norm (``gossamer.prune.magnitude_blocks``), or the largest
            entries (``gossamer.prune.magnitude_unstructured``).
        density : float, optional
            The share of blocks that pruning keeps.

        Raises
        ------
        TypeError
            If ``linear`` is not a ``torch.nn.Linear`` or there are no kernels for its dtype.
        ValueError
            If the weight is not 2:4 and ``prune`` is None, or an argument is unknown, missing or
            superfluous.
        """
        op = f"{cls.__name__}.from_dense"
        check_layer(op, linear, nn.Linear)
        held = pattern_of(op, pattern, tuple(linear.weight.shape))
        weight = cls._sparse_weight(linear.weight.detach(), held, prune, density)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            pattern=pattern,
            device="meta",
            dtype=weight.dtype,
            density=held.any_density,
        )
        return layer._take_from(linear, weight)

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight and a copy of the bias."""
        weight = self.weight.to_dense().detach()
        sizes, bias = (self.in_features, self.out_features), self.bias is not None
        linear = nn.Linear(*sizes, bias=bias, device="meta", dtype=weight.dtype)
        self._give_to(linear, weight)
        return linear

    def forward(self, input: Tensor) -> Tensor:  # as torch's layer names it
        """``input`` [..., K] -> [..., N].

        Raises
        ------
        RuntimeError
            If a packed layer runs in training mode with gradients enabled.
        """
        shape = (self.out_features, self.in_features)
        # The dictionaries are read directly: an attribute costs half a microsecond each. Only a
        # parametrised or torch-pruned name lives elsewhere.
        parameters, buffers = self._parameters, self._buffers
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (lazily)
        panels_dtype = self._panels_dtype
        stored: Tensor | None
        if panels_dtype is None:
            stored = parameters["values"] if "values" in parameters else self.values  # noqa: SIM401
            dtype = stored.dtype  # type: ignore[union-attr]
        else:
            self._refuse_training()
            stored, dtype = buffers["panels"], panels_dtype
        assert stored is not None
        activation = self.activation or "none"
        if isinstance(self.pattern, Block):
            crow, col = buffers["crow_indices"], buffers["col_indices"]
            assert crow is not None
            assert col is not None
            packed_cols = 0 if panels_dtype is None else self.pattern.cols
            return blocksparse_linear_tensors(
                input, stored, crow, col, bias, shape, activation, packed_cols
            )
        if isinstance(self.pattern, Unstructured):
            crow, col = buffers["crow_indices"], buffers["col_indices"]
            assert crow is not None
            assert col is not None
            return csr_linear_tensors(input, stored, crow, col, bias, shape, activation)
        indices = buffers["indices"]  # None while packed
        return sparse24_linear_tensors(input, stored, indices, bias, shape, dtype, activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._pattern_repr()}"
        )
