"""GBLR: weights that are sums of blocks of rank one, whose places and sizes are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._wide import wide
from ...conversion.selection import layer_sites, left_out
from ...nn.called import keep_called
from ...prune import count_kept
from ..allocation import share_out
from ..layers import Names, replaceable, unwrapped
from ..patterns import check_sparsity


def soft_boxcar(start: Tensor, width: Tensor, n: int, sigma: float) -> Tensor:
    """[K] starts and widths, real numbers, to [K, n]: 1 on width places from start on, else 0.

    The boxcar's Fourier series with both as real numbers, times a Gaussian, so that it is smooth in
    both and has a gradient: the Gaussian-Dirichlet kernel
    exp(-(f / sigma)^2 / 2) exp(-2 pi i f (start + (width - 1) / 2) / n) sin(pi f width / n) /
    sin(pi f / n) at frequency f = 0 .. n / 2. For whole numbers and sigma = inf it is exact.
    """
    dtype = wide(start.dtype)
    f = torch.arange(n // 2 + 1, device=start.device, dtype=dtype)
    below = (math.pi * f / n).sin()
    dirichlet = (math.pi * f / n * width[:, None].to(dtype)).sin() / below.clamp(min=1e-30)
    dirichlet = torch.where(f == 0, width[:, None].to(dtype), dirichlet)
    angle = -2 * math.pi / n * f * (start + (width - 1) / 2).to(dtype)[:, None]
    size = dirichlet * (-0.5 * (f / sigma).square()).exp()
    # Of an even n the last frequency is its own mirror image: its real part alone counts.
    return torch.fft.irfft(torch.polar(torch.ones_like(size), angle) * size, n=n)


class GBLRLinear(nn.Module):
    """y = x W^T + b, W = sum_k (m_k u_k) (n_k v_k)^T, m_k and n_k boxcars over outputs and inputs.

    Parameters
    ----------
    in_features, out_features : int
    blocks : int
        K.
    bias : bool
    device, dtype
        As for ``torch.nn.Linear``.

    Attributes
    ----------
    u, v : Parameter
        [K, out_features], [K, in_features].
    starts, widths : ParameterList
        [K] each, of rows (outputs) and of columns (inputs); what passes the end goes on at 0.
    sigma : float
        Of the Gaussian; inf makes boxcars sharp.

    Raises
    ------
    ValueError
        If a number is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, blocks) < 1:
            raise ValueError(
                f"GBLRLinear: {in_features} to {out_features} in {blocks} blocks: at least 1 each"
            )
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.sigma = math.inf

        def empty(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.u, self.v = empty(blocks, out_features), empty(blocks, in_features)
        self.starts = nn.ParameterList([empty(blocks), empty(blocks)])
        self.widths = nn.ParameterList([empty(blocks), empty(blocks)])
        self.bias = empty(out_features) if bias else None
        self.reset_parameters()
        keep_called(self)

    @property
    def sizes(self) -> tuple[int, int]:
        """How long rows' and columns' boxcars may be."""
        return self.out_features, self.in_features

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Blocks over everything from places all around, of the variance of ``nn.Linear``."""
        deviation = (1 / (3 * self.in_features * self.blocks)) ** 0.25
        for factor in (self.u, self.v):
            factor.normal_(std=deviation)
        k = torch.arange(self.blocks, dtype=torch.float64)
        # Every place is to keep as many blocks when they shrink, each pair of places about alike.
        for places, start, width, n in zip(
            (k / self.blocks, 0.6180339887498949 * k % 1),
            self.starts,
            self.widths,
            self.sizes,
            strict=True,
        ):
            start.copy_(n * places)
            width.fill_(n)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, linear: nn.Linear, blocks: int) -> GBLRLinear:
        """The best approximation of that rank; exact where blocks is as many as the rank."""
        weight = linear.weight.detach()
        made = cls(
            linear.in_features, linear.out_features, blocks, linear.bias is not None,
            weight.device, weight.dtype,
        )  # fmt: skip
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        rank = min(blocks, len(s))
        for factor, vectors in ((made.u, u.t()), (made.v, vh)):
            factor[rank:] = 0
            factor[:rank] = (s[:rank, None].sqrt() * vectors[:rank]).to(factor)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        return made.train(linear.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """m_k u_k [K, N] and n_k v_k [K, K_in]."""
        masks = [
            soft_boxcar(start, width, n, self.sigma)
            for start, width, n in zip(self.starts, self.widths, self.sizes, strict=True)
        ]
        return self.u * masks[0].to(self.u.dtype), self.v * masks[1].to(self.v.dtype)

    def forward(self, input: Tensor) -> Tensor:
        u, v = self.factors()
        y = (input @ v.t()) @ u
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_linears(self) -> nn.Sequential:
        """Two linear layers, whose weights are 0 outside of the blocks, for ``convert``."""
        u, v = self.factors()
        whole = [w.round().long() for w in (*self.starts, *self.widths)]
        for factor, start, width in ((u, *whole[0::2]), (v, *whole[1::2])):
            place = torch.arange(factor.shape[1], device=factor.device)
            past = (place - start[:, None]) % factor.shape[1] >= width[:, None]
            factor[past] = 0
        first = nn.Linear(self.in_features, self.blocks, False, v.device, v.dtype)
        second = nn.Linear(self.blocks, self.out_features, self.bias is not None, v.device, v.dtype)
        first.weight.copy_(v)
        second.weight.copy_(u.t())
        if self.bias is not None:
            second.bias.copy_(self.bias)
        return nn.Sequential(first, second).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks={self.blocks}"


class GBLR:
    """Linear layers become ``GBLRLinear``; a proximal step shrinks widths, a budget ends it.

    After each step every width becomes max(0, width - shrink * size), size the length of the
    weight's side, and a start that has left its side comes back at the other end; the Gaussian's
    sigma rises from ``sigma`` to infinity as sigma / (1 - t / end). After ``end`` steps starts and
    widths are whole and stay, the widths in proportion to what they were and with the sum
    (1 - sparsity) N K in each layer; the factors go on training. A row of x takes as many
    multiplications as the widths' sum. Make the optimizer of the model after this.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its ``torch.nn.Linear`` layers that are named.
    blocks : int
        K of each layer.
    sparsity : float
    end : int
    shrink : float
        Of the proximal step; the learning rate times the strength. Ours, as are sigma's values.
    sigma : float
        In frequencies.
    include, exclude : str or iterable of str, optional
        As for ``gossamer.convert``.

    Raises
    ------
    TypeError, ValueError
        If a number is out of its range, a name is unknown, none is of a linear layer, or the
        blocks are too few for ``sparsity``.

    References
    ----------
    Lee, Kim, "Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural
    Networks", ICLR 2024. From memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: int,
        sparsity: float,
        end: int,
        shrink: float = 1e-3,
        sigma: float = 100.0,
        include: Names | None = None,
        exclude: Names | None = None,
    ) -> None:
        self.model, self.sparsity, self.end = model, check_sparsity(sparsity), end
        if end < 1 or shrink < 0 or sigma <= 0:
            raise ValueError(
                f"GBLR: end {end}, shrink {shrink}, sigma {sigma}: expected at least 1, at least "
                "0, above 0"
            )
        self.shrink, self.sigma, self.steps = shrink, sigma, 0
        plain = unwrapped(model)
        sites = layer_sites(plain)
        out = left_out(plain, sites, include, exclude, "GBLR")
        chosen = [
            s for s in sites if s not in out and type(s.module) is nn.Linear and replaceable(s)
        ]
        if not chosen:
            raise ValueError("GBLR: the model holds no torch.nn.Linear that is named")
        for site in chosen:
            n, k = site.module.out_features, site.module.in_features
            assert isinstance(n, int)
            assert isinstance(k, int)
            if blocks < 1 or count_kept(n * k, 1 - sparsity) > blocks * (n + k):
                raise ValueError(
                    f"GBLR: {site.name}: {blocks} blocks of at most {n} + {k} are less than "
                    f"{1 - sparsity:.3g} of {n} x {k}"
                )
        self.layers: dict[str, GBLRLinear] = {}
        for site in chosen:
            assert isinstance(site.module, nn.Linear)
            self.layers[site.name] = made = GBLRLinear.from_dense(site.module, blocks)
            made.sigma = sigma
            site.replace(made)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer; call it after that."""
        self.steps += 1
        if self.steps > self.end:
            return
        for layer in self.layers.values():
            for start, width, n in zip(layer.starts, layer.widths, layer.sizes, strict=True):
                width.sub_(self.shrink * n).clamp_(0, n)
                start.remainder_(n)
            if self.steps == self.end:
                self._settle(layer)
        self._anneal()

    def _anneal(self) -> None:
        left = 1 - min(self.steps, self.end) / self.end
        for layer in self.layers.values():
            layer.sigma = self.sigma / left if left > 0 else math.inf
            for parameter in (*layer.starts, *layer.widths):
                parameter.requires_grad_(left > 0)

    def _settle(self, layer: GBLRLinear) -> None:
        sides = [n for n in layer.sizes for _ in range(layer.blocks)]
        widths = torch.cat(list(layer.widths)).tolist()
        total = count_kept(math.prod(layer.sizes), 1 - self.sparsity)
        # A share of 0 for all would leave nothing to be in proportion to.
        counts = share_out([w + 1e-6 for w in widths], sides, total, least=0)
        for i, n in enumerate(layer.sizes):
            # About the middle that it had.
            start, width = layer.starts[i], layer.widths[i]
            whole = torch.tensor(counts[i * layer.blocks :][: layer.blocks]).to(width)
            start.copy_((start + (width - whole) / 2).round().remainder(n))
            width.copy_(whole)

    @property
    def density(self) -> dict[str, float]:
        """The multiplications of each layer, as a share of the dense one's."""
        return {
            name: sum(float(w.double().sum()) for w in layer.widths) / math.prod(layer.sizes)
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def finalize(self) -> list[str]:
        """Put ``to_linears()`` in the place of each layer and give their names, for ``convert``.

        Raises
        ------
        RuntimeError
            Before the step ``end``.
        """
        if self.steps < self.end:
            raise RuntimeError(f"GBLR: step {self.steps} of {self.end}")
        plain = unwrapped(self.model)
        for name, layer in self.layers.items():
            holder, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(holder), attribute, layer.to_linears())
        return [f"{name}.{i}" for name in self.layers for i in (0, 1)]

    def state_dict(self) -> dict[str, Any]:
        """How far it is; the rest is in the model's."""
        return {"steps": self.steps, "layers": list(self.layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ValueError if it is of other layers."""
        if state["layers"] != list(self.layers):
            raise ValueError(f"GBLR: a state of {state['layers']}, the layers: {list(self.layers)}")
        self.steps = state["steps"]
        self._anneal()
