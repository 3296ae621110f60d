"""SparseLinear: a linear layer that keeps, and multiplies, only half of a 2:4 weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..formats import VALUE_DTYPES, Sparse24, sparse24_shapes
from ..ops.sparse24 import sparse24_linear_tensors
from ..prune import magnitude_24
from .packable import TrainableModule

# A leaf for torch.fx, which could not follow its branches on x.
torch.fx.wrap("sparse24_linear_tensors")


class SparseLinear(TrainableModule):
    """``y = x Wᵀ + b`` where W is 2:4: at most two non-zeros in every four columns of a row.

    A layer has two states. While it is *trainable* its weight is the Parameter ``values`` under
    the fixed pattern ``indices``. ``pack()`` replaces both by ``panels``, the layout that the
    kernels of its device read fastest, for inference; ``unpack()`` brings them back. A
    ``state_dict``, a pickle and a deep copy hold the portable form in either state, and all of them
    are validated before a layer takes them over.

    Parameters
    ----------
    in_features, out_features : int
        K and N, any numbers from 1 on.
    bias : bool
        Whether to add a learnable [N] bias.
    pattern : {"2:4"}
        The sparsity pattern.
    device, dtype
        As for ``torch.nn.Linear``: float32, bfloat16, float16, or float64 (serial kernels only).

    Attributes
    ----------
    values : Parameter or None
        [N, 2 ceil(K / 4)], the kept weights; None while packed.
    indices : Tensor or None
        [N, ceil(ceil(K / 4) / 2)] uint8, their columns (``gossamer.formats.Sparse24``).
    panels : Tensor or None
        int32, the packed weight (``gossamer.formats.Sparse24Panels``); None while trainable.
    format : Tensor
        int64 (version, N, K): what a ``state_dict`` says of itself.
    bias : Parameter or None
        [N].

    Raises
    ------
    ValueError
        If a size is below 1 or the pattern unknown.
    TypeError
        If there are no kernels for ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: str = "2:4",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_pattern(pattern)
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"SparseLinear: in_features {in_features} and out_features {out_features}, "
                "both must be at least 1"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in VALUE_DTYPES:
            raise TypeError(
                f"SparseLinear: dtype {dtype}, expected float32, bfloat16, float16 or float64"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        value_shape, index_shape = sparse24_shapes(out_features, in_features)
        self.values = nn.Parameter(torch.empty(value_shape, device=device, dtype=dtype))
        self.register_buffer("indices", torch.empty(index_shape, device=device, dtype=torch.uint8))
        header = torch.tensor([Sparse24.version, out_features, in_features], device=device)
        self.register_buffer("format", header)
        self.register_buffer("panels", None, persistent=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a dense weight and a bias as ``torch.nn.Linear`` does, and keep the larger half."""
        if self.values is None or self.indices is None:
            raise RuntimeError("SparseLinear: reset_parameters() on a packed layer; unpack() first")
        if self.values.is_meta:
            return
        dense = self.values.new_empty((self.out_features, self.in_features))
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        weight = Sparse24.from_dense(magnitude_24(dense))
        self.values.copy_(weight.values)
        self.indices.copy_(weight.indices)
        self.format.copy_(weight.state()["format"])
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, pattern: str = "2:4", prune: str | None = None
    ) -> SparseLinear:
        """A trainable layer with the weight and a copy of the bias of a dense one.

        Parameters
        ----------
        linear : torch.nn.Linear
            Its weight must fit the pattern, unless ``prune`` says how to make it fit.
        pattern : {"2:4"}
            The sparsity pattern.
        prune : {None, "magnitude"}
            "magnitude" keeps the two largest of every four (``gossamer.prune.magnitude_24``).

        Raises
        ------
        TypeError
            If ``linear`` is not a ``torch.nn.Linear`` or there are no kernels for its dtype.
        ValueError
            If the weight is not 2:4 and ``prune`` is None, or an argument is unknown.
        """
        _check_pattern(pattern)
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"SparseLinear.from_dense: {type(linear).__name__}, expected torch.nn.Linear"
            )
        if prune not in (None, "magnitude"):
            raise ValueError(
                f"SparseLinear.from_dense: prune {prune!r}, expected None or 'magnitude'"
            )
        dense = linear.weight.detach()
        weight = Sparse24.from_dense(dense if prune is None else magnitude_24(dense))
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            pattern=pattern,
            device="meta",
            dtype=weight.dtype,
        )
        layer._set_portable(weight, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
            layer.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight and a copy of the bias."""
        weight = self.weight.to_dense().detach()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        linear.weight = nn.Parameter(weight, requires_grad=self.weight_requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().clone()
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N].

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
        if panels_dtype is None:
            values = parameters["values"] if "values" in parameters else self.values  # noqa: SIM401
            assert values is not None
            return sparse24_linear_tensors(x, values, buffers["indices"], bias, shape, values.dtype)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "SparseLinear: a packed layer cannot be trained: call unpack() to train it, or "
                "eval() to run it"
            )
        panels = buffers["panels"]
        assert panels is not None
        return sparse24_linear_tensors(x, panels, None, bias, shape, panels_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self.pattern}, packed={self.packed}"
        )


def _check_pattern(pattern: str) -> None:
    if pattern != "2:4":
        raise ValueError(f"SparseLinear: pattern {pattern!r}, expected '2:4'")
