"""GroupedLinear: the linear layers of many experts in one Parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.grouped import grouped_linear
from .dense import check_layer

torch.fx.wrap("grouped_linear")  # a leaf: torch.fx could not follow its branches on x


class GroupedLinear(nn.Module):
    """``y = x W_eᵀ + b_e`` of tokens sorted by their expert e (``gossamer.grouped_linear``).

    Parameters
    ----------
    num_experts, in_features, out_features : int
        E, K and N, from 1 on.
    bias : bool
        Whether to add a learnable [E, N] bias.
    device, dtype
        As for ``torch.nn.Linear``.

    Attributes
    ----------
    weight : Parameter
        [E, N, K], of each expert initialised as in ``torch.nn.Linear``.
    bias : Parameter or None
        [E, N].

    Raises
    ------
    ValueError
        If a size is below 1.

    Examples
    --------
    >>> import torch, gossamer
    >>> layer = gossamer.nn.GroupedLinear(4, 16, 32)
    >>> y = layer(torch.randn(6, 16), torch.tensor([2, 2, 5, 6]))  # the second has no token
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (num_experts, out_features, in_features)
        if min(sizes) < 1:
            raise ValueError(
                f"GroupedLinear: num_experts {num_experts}, in_features {in_features} and "
                f"out_features {out_features}, all must be at least 1"
            )
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(sizes[:2], device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias as ``torch.nn.Linear`` does."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear]) -> GroupedLinear:
        """Copies of the weights and biases of dense layers, an expert each.

        Raises
        ------
        TypeError
            If one is not a ``torch.nn.Linear``.
        ValueError
            If there is none, or they differ in sizes, dtype, device or in having a bias.
        """
        if not linears:
            raise ValueError("GroupedLinear: no linear layers, expected at least one")
        for linear in linears:
            check_layer("GroupedLinear", linear, nn.Linear, name="a layer")
        kinds = [(tuple(m.weight.shape), m.weight.dtype, m.weight.device, m.bias is not None)
                 for m in linears]  # fmt: skip
        for expert, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(
                    f"GroupedLinear: shape, dtype, device and bias of layer {expert} are {kind}, "
                    f"of layer 0 {kinds[0]}"
                )
        (outputs, features), dtype, device, bias = kinds[0]
        layer = cls(len(linears), features, outputs, bias, "meta", dtype).to_empty(device=device)
        with torch.no_grad():
            torch.stack([linear.weight for linear in linears], out=layer.weight.data)
            if layer.bias is not None:
                torch.stack([linear.bias for linear in linears], out=layer.bias.data)
        return layer.train(linears[0].training)

    def to_linears(self) -> list[nn.Linear]:
        """A dense layer of each expert, with copies of its weight and bias."""
        linears = []
        for expert, weight in enumerate(self.weight.detach()):
            linear = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype
            )
            linear.weight = nn.Parameter(weight.clone())
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.detach()[expert].clone())
            linears.append(linear.train(self.training))
        return linears

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """[T, K] tokens sorted by expert, and [E] where each expert's end, to [T, N]."""
        return grouped_linear(x, self.weight, offsets, self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )
