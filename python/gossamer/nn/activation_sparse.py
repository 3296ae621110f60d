"""ActSparseLinear and SparseMLP: dense weights, of which zero activations save the reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.actsparse import actsparse_linear
from ..ops.actsparse_outputs import actsparse_outputs
from .checkpoint import CheckedModule, check_loaded
from .dense import check_layer

# Leaves for torch.fx, which could not follow their branches on x.
torch.fx.wrap("actsparse_linear")
torch.fx.wrap("actsparse_outputs")


class ActSparseLinear(CheckedModule):
    """``y = x Wᵀ + b`` that skips inputs with ``|x| <= threshold`` (``gossamer.actsparse_linear``).

    With a threshold of 0 it is ``torch.nn.Linear``, gradients included. The weight is held once,
    input-major, so that an inactive input leaves a row of it unread.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    bias : bool
        Whether to add a learnable [N] bias.
    threshold : float
        0 or more, finite.
    device, dtype
        As for ``torch.nn.Linear``: float32, bfloat16, float16, or float64 (serial kernel only).

    Attributes
    ----------
    weight_kn : Parameter
        [K, N], the transpose of ``torch.nn.Linear.weight``.
    weight : Tensor
        [N, K], a view of it.
    bias : Parameter or None
        [N].
    threshold : float
        May be set at any time. A ``state_dict`` holds it, as a float64 tensor of no dimensions;
        that of a ``torch.nn.Linear`` can be loaded and leaves it as it is.

    Raises
    ------
    ValueError
        If the threshold is negative or not finite.

    Examples
    --------
    >>> import torch, gossamer
    >>> layer = gossamer.nn.ActSparseLinear.from_dense(torch.nn.Linear(64, 32), threshold=0.1)
    >>> y = layer(torch.randn(1, 64).relu())
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.threshold = checked_threshold(type(self).__name__, threshold)
        shape = (in_features, out_features)
        self.weight_kn = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``torch.nn.Linear`` does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_dense(cls, linear: nn.Linear, threshold: float = 0.0) -> ActSparseLinear:
        """A layer with a copy of the weight of a dense one, and with its very bias.

        Raises
        ------
        TypeError
            If it is not a ``torch.nn.Linear``.
        ValueError
            If the threshold is negative or not finite.
        """
        check_layer(f"{cls.__name__}.from_dense", linear, nn.Linear)
        layer = cls(linear.in_features, linear.out_features, False, threshold, "meta")
        weight = linear.weight.detach().t().clone(memory_format=torch.contiguous_format)
        layer.weight_kn = nn.Parameter(weight, linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with copies of weight and bias; the threshold is left out."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        weight = self.weight.detach().clone(memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(weight, self.weight_kn.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        return self.weight_kn.t()

    def forward(self, input: Tensor) -> Tensor:  # as torch's layer names it
        """[..., K] to [..., N]."""
        return actsparse_linear(input, self.weight_kn, self.bias, self.threshold)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.threshold, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.threshold = _threshold_of(type(self).__name__, state)

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        held = {"weight_kn": self.weight_kn, "bias": self.bias}
        check_loaded(given, held, assign)
        if "_extra_state" in given:
            _threshold_of(type(self).__name__, given["_extra_state"])

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ``torch.nn.Module``'s, also of a ``torch.nn.Linear``'s; a failing load does nothing.

        Raises
        ------
        RuntimeError
            If an entry is not valid or, when strict, if keys are missing or unexpected.
        """
        own = dict(state_dict)
        self._take_dense(own, "")
        return super().load_state_dict(own, *args, **kwargs)

    def _take_dense(self, state_dict: dict[str, Any], prefix: str) -> None:
        dense = state_dict.get(prefix + "weight")
        if isinstance(dense, Tensor) and dense.dim() == 2:  # of a torch.nn.Linear
            del state_dict[prefix + "weight"]
            state_dict[prefix + "weight_kn"] = dense.t().contiguous()
            state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._take_dense(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, threshold={self.threshold:g}"
        )


def checked_threshold(name: str, threshold: float) -> float:
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{name}: threshold is {threshold}, expected 0 or more, finite")
    return float(threshold) + 0.0  # of -0.0 makes 0.0


def _is_number(state: Any) -> bool:
    floating = isinstance(state, Tensor) and state.is_floating_point()
    return floating and state.numel() == 1 and not state.is_meta


def _threshold_of(name: str, state: Any) -> float:
    if not _is_number(state):
        raise TypeError(
            f"{name}: '_extra_state' is {state!r:.60}, expected the threshold, one "
            "floating-point number as a tensor"
        )
    return checked_threshold(name, float(state))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _squared_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


class SparseMLP(nn.Module):
    """A feed-forward block that skips what the zeros of its hidden activations make superfluous.

    With two matrices it is ``down(act(up(x)))``, whose zeros save rows of the down weight. With
    three it is ``down(act(gate(x)) * up(x))``: the zeros of the gate save rows of the up weight
    too, which are not computed. What the block computes in training it computes in inference.

    Parameters
    ----------
    up, down : nn.Linear
        [F, K] and [N, F]. ``up``, and ``gate``, become part of the block as they are; of the weight
        of ``down`` it makes a copy, input-major (``ActSparseLinear``).
    gate : nn.Linear, optional
        [F, K].
    activation : {"relu", "relu2", "silu", "gelu"} or callable
        Of one tensor; "relu2" is the squared ReLU.
    threshold : float
        Activations with an absolute value of at most this count as zero. For SiLU and GELU, which
        make no zeros of their own, it is what skips (``gossamer.calibrate_thresholds`` for the
        input of a layer). With 0 nothing is changed.

    Raises
    ------
    TypeError
        If a layer is not a ``torch.nn.Linear``, or the activation neither a name nor callable.
    ValueError
        If sizes do not fit, the activation is unknown, or the threshold is negative or not finite.

    Notes
    -----
    No gradient passes through a gate that is 0. With ReLU and its square that is the gradient of
    the dense block, where the activation's own is 0.

    References
    ----------
    Mirzadeh et al., "ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
    2023 (arXiv:2310.04564). Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in
    Large Language Models", 2024 (arXiv:2404.08763).

    Examples
    --------
    >>> import torch, gossamer
    >>> up, gate, down = torch.nn.Linear(16, 64), torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
    >>> block = gossamer.nn.SparseMLP(up, down, gate, activation="relu")
    >>> y = block(torch.randn(1, 16))
    """

    def __init__(
        self,
        up: nn.Linear,
        down: nn.Linear,
        gate: nn.Linear | None = None,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        for name, layer in {"up": up, "down": down, "gate": gate}.items():
            if layer is not None:
                check_layer("SparseMLP", layer, nn.Linear, name=name)
        sizes = (up.in_features, up.out_features)
        if up.out_features != down.in_features:
            raise ValueError(
                f"SparseMLP: up has {up.out_features} outputs, down {down.in_features} inputs"
            )
        if gate is not None and (gate.in_features, gate.out_features) != sizes:
            raise ValueError(
                f"SparseMLP: gate maps {gate.in_features} features to {gate.out_features}, up "
                f"{sizes[0]} to {sizes[1]}"
            )
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise ValueError(
                f"SparseMLP: activation {activation!r}, expected one of "
                f"{', '.join(_ACTIVATIONS)} or a callable"
            )
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(
                f"SparseMLP: activation is {type(activation).__name__}, expected a name or a "
                "callable"
            )
        self.up = up
        self.gate = gate
        self.down = ActSparseLinear.from_dense(down, threshold)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        activate = self.activation
        function = _ACTIVATIONS[activate] if isinstance(activate, str) else activate
        if self.gate is None:
            y: Tensor = self.down(function(self.up(x)))
            return y
        gate, threshold = function(self.gate(x)), self.down.threshold
        up = actsparse_outputs(x, self.up.weight, gate, self.up.bias, threshold)
        # 0 wherever the gate is inactive; a product that is merely small was not said to be zero.
        return actsparse_linear(gate * up, self.down.weight_kn, self.down.bias)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
