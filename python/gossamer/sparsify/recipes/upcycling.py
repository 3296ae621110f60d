"""Sparse upcycling: a trained MLP becomes many experts that begin as copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import GroupedLinear

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class UpcycledMLP(nn.Module):
    """An MLP of E experts behind a router, y_t = sum_e p_te MLP_e(x_t) over the chosen (t, e).

    p = softmax(x R^T). Either each expert chooses the capacity T / E tokens that want it most, or
    each token the ``capacity`` experts that it wants most, of which none is ever full. The experts'
    linear layers are ``gossamer.nn.GroupedLinear``.

    Parameters
    ----------
    mlp : nn.Module
        ``nn.Sequential`` of a Linear, functions of single elements, and a Linear; or a gated one,
        down_proj(act_fn(gate_proj(x)) * up_proj(x)), under these names.
    experts : int
        E.
    capacity : int
    choose : {"experts", "tokens"}
        Who does.
    normalize : bool
        Whether the p of each token's experts are divided by their sum: then the MLP of copies is
        the dense one, for tokens that any expert has.
    deviation : float
        Of the normal distribution that R begins with.

    Raises
    ------
    TypeError, ValueError
        Of another kind of MLP; a number out of its range.
    """

    def __init__(
        self,
        mlp: nn.Module,
        experts: int = 32,
        capacity: int = 2,
        choose: str = "experts",
        normalize: bool = True,
        deviation: float = 0.02,
    ) -> None:
        super().__init__()
        if experts < 1 or not 1 <= capacity <= experts or choose not in ("experts", "tokens"):
            raise ValueError(
                f"UpcycledMLP: {experts} experts of capacity {capacity}, chosen by {choose!r}: "
                "expected from 1 on, from 1 to the number of experts, 'experts' or 'tokens'"
            )
        first, activation, last = parts_of(mlp)
        self.experts, self.capacity = experts, capacity
        self.choose, self.normalize = choose, normalize
        self.first = nn.ModuleList(GroupedLinear.from_linears([m] * experts) for m in first)
        self.activation = activation
        self.last = GroupedLinear.from_linears([last] * experts)
        weight = last.weight
        self.router = nn.Linear(
            first[0].in_features, experts, False, device=weight.device, dtype=weight.dtype
        )
        nn.init.normal_(self.router.weight, std=deviation)
        self.train(mlp.training)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [T, K] tokens: those of all experts in turn, their weights, where each expert ends."""
        share = self.router(tokens).float().softmax(-1)
        count = len(tokens)
        if self.choose == "experts":
            each = min(count, math.ceil(self.capacity * count / self.experts))
            weights, chosen = share.t().topk(each)
            token, weight = chosen.flatten(), weights.flatten()
            ends = torch.arange(1, self.experts + 1, device=tokens.device) * each
        else:
            weights, chosen = share.topk(self.capacity)
            order = chosen.flatten().argsort(stable=True)
            token, weight = order // self.capacity, weights.flatten()[order]
            ends = chosen.flatten().bincount(minlength=self.experts).cumsum(0)
        if self.normalize:
            total = torch.zeros_like(share[:, 0]).index_add(0, token, weight)
            weight = weight / total[token]
        return token, weight, ends

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        token, weight, ends = self.route(tokens)
        chosen = tokens[token]
        y = self.activation(self.first[0](chosen, ends))
        if len(self.first) == 2:
            y = y * self.first[1](chosen, ends)
        y = self.last(y, ends)
        sums = y.new_zeros(len(tokens), y.shape[1])
        sums = sums.index_add(0, token, y * weight.to(y.dtype)[:, None])
        return sums.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, capacity={self.capacity}, choose={self.choose!r}"


def parts_of(mlp: nn.Module) -> tuple[list[nn.Linear], nn.Module, nn.Linear]:
    """One or two first linear layers, what follows them, and the last."""
    gate: list[Any]
    last: Any
    activation: nn.Module
    if isinstance(mlp, nn.Sequential) and len(mlp) >= 2:
        first, *between, last = mlp
        gate, activation = [first], nn.Sequential(*between)
    elif all(hasattr(mlp, name) for name in _GATED):
        gating, up, last, act = (getattr(mlp, name) for name in _GATED)
        gate = [gating, up]
        activation = act if isinstance(act, nn.Module) else _Called(act)
    else:
        raise TypeError(
            f"sparse_upcycling: {type(mlp).__name__} is neither a Sequential of linear layers nor "
            f"has it {', '.join(_GATED)}"
        )
    for layer in (*gate, last):
        if type(layer) is not nn.Linear:
            raise TypeError(f"sparse_upcycling: expected a torch.nn.Linear, got {layer}")
    if any(p is not None for p in activation.parameters()):
        raise TypeError(f"sparse_upcycling: between the linear layers is {activation}")
    return gate, activation, last


class _Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sparse_upcycling(
    model: nn.Module,
    include: str | Iterable[str],
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> dict[str, UpcycledMLP]:
    """Replace MLPs of a trained model by experts, which begin as copies, behind new routers.

    Half of the MLPs in the paper, every second one; all else stays as it is.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    include : str or iterable of str
        fnmatch patterns of the names of MLPs.
    optimizer : torch.optim.Optimizer, optional
        Whose parameters become those of the experts, with the state of what they are copies of; the
        router joins the group of these.
    **options
        Of ``UpcycledMLP``: 32 experts of capacity 2, which choose their tokens, by default (as in
        the paper's encoders, from memory).

    Returns
    -------
    dict of str to UpcycledMLP

    Raises
    ------
    TypeError, ValueError
        If a pattern names no module, or one that is no such MLP; nothing is changed then.

    References
    ----------
    Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    ICLR 2023.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = [include] if isinstance(include, str) else list(include)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"sparse_upcycling: {pattern!r} names no module of the model")
    chosen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in wanted)]
    dense = {name: model.get_submodule(name) for name in chosen}
    made = {name: UpcycledMLP(mlp, **options) for name, mlp in dense.items()}
    for name, upcycled in made.items():
        holder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(holder), attribute, upcycled)
        if optimizer is not None:
            _hand_over(optimizer, dense[name], upcycled)
    return made


@torch.no_grad()
def _hand_over(optimizer: torch.optim.Optimizer, mlp: nn.Module, made: UpcycledMLP) -> None:
    """Let the optimizer have the experts' parameters in the place of the MLP's."""
    first, _, last = parts_of(mlp)
    replaced: dict[Tensor, Tensor] = {}
    for linear, grouped in zip((*first, last), (*made.first, made.last), strict=True):
        for of_dense, of_experts in zip(linear.parameters(), grouped.parameters(), strict=True):
            replaced[of_dense] = of_experts
    for group in optimizer.param_groups:
        if any(p is first[0].weight for p in group["params"]):
            group["params"].append(made.router.weight)
        group["params"] = [replaced.get(p, p) for p in group["params"]]
    for old, new in replaced.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                key: value.expand_as(new).clone()
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in optimizer.state.pop(old).items()
            }
