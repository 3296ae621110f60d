"""Dynamic sparse training of weights that are stored sparse: memory and time of what lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._wide import matmul
from ..conversion.selection import layer_sites, left_out
from ..formats import SparseCsr, Unstructured, random_places, update_pattern
from ..nn import SparseLinear
from ..prune import largest
from .layers import Names, unwrapped
from .schedules import DropAndGrow
from .states import check_keys

_VERSION = 1
_CHUNK = 2**22  # entries of a dense gradient that exist at a time


@dataclass(eq=False)
class _Seen:
    """What the gradient of a layer's dense weight is made of, at the last step."""

    x: Tensor | None = None
    dy: Tensor | None = None

    def record(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> None:
        if not y.requires_grad:
            return
        x = (args[0] if args else named["input"]).detach()

        def keep(dy: Tensor) -> None:  # of this call: others may come before its backward
            self.x = x.reshape(-1, x.shape[-1])
            self.dy = dy.detach().reshape(-1, dy.shape[-1])

        y.register_hook(keep)


class StoredDropGrow:
    """Drop and grow places of layers ``SparseLinear(pattern=Unstructured(density))``.

    As ``DropGrow``, but there is neither a dense weight nor a mask: forward and backward run
    through the kernels of what is stored, and a change of the pattern takes memory and time of the
    places that live. A share of each layer's places is dropped and as many are grown, so the
    Parameter ``values`` stays the one that the optimizer holds; the optimizer's state follows its
    places, and is 0 where a place is grown. Call ``step()`` after ``optimizer.step()``::

        model = nn.Sequential(SparseLinear(784, 30_000, pattern=gossamer.Unstructured(0.01)), ...)
        sparsifier = sparsify.SET.stored(model, optimizer, end=10 * epoch, every=epoch)

    An average of such a model's states (``torch.optim.swa_utils.AveragedModel``) mixes places after
    a change, since an entry of ``values`` is then of another one: begin it anew after each.

    ``SET.stored`` and ``RigL.stored`` make one. Under DistributedDataParallel
    (``gossamer.distributed.data_parallel``) every rank makes its own, with the same seed, and all
    change the same places.

    Parameters
    ----------
    model : nn.Module
        Whose layers of that kind are trained, all unless ``include`` or ``exclude`` say.
    optimizer : torch.optim.Optimizer or None
    schedule : DropAndGrow
        Its sparsity is not used: layers keep as many places as they have.
    worth : callable
        values [nnz] -> what they are worth [nnz]; the least are dropped.
    by_gradient : bool
        Grow where the gradient of the dense weight would be largest, from 0, instead of at random.
        It is made of the last batch's x and dy, some rows at a time; under
        DistributedDataParallel, of those of all ranks.
    deviation : float
        Of the normal distribution that grown places begin with.
    include, exclude : str or iterable of str, optional
        As for ``gossamer.convert``.
    seed : int

    Raises
    ------
    TypeError, ValueError
        If there is no such layer, one is frozen, or growth by gradient meets a layer that applies
        an activation itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: DropAndGrow,
        worth: Callable[[Tensor], Tensor],
        by_gradient: bool = False,
        deviation: float = 0.0,
        include: Names | None = None,
        exclude: Names | None = None,
        seed: int = 0,
    ) -> None:
        op = type(self).__name__
        inner = unwrapped(model)
        sites = layer_sites(inner)
        out = left_out(inner, sites, include, exclude, op)
        self.layers: dict[str, SparseLinear] = {
            site.name: site.module
            for site in sites
            if site not in out
            and isinstance(site.module, SparseLinear)
            and isinstance(site.module.pattern, Unstructured)
        }
        if not self.layers:
            raise ValueError(f"{op}: the model has no SparseLinear of pattern Unstructured")
        for name, layer in self.layers.items():
            if not layer.weight_requires_grad:
                raise ValueError(f"{op}: {name} is frozen: its values have requires_grad=False")
            if hasattr(layer.values, "full_tensor"):
                raise ValueError(f"{op}: {name} is sharded: its values are a DTensor")
            if by_gradient and layer.activation is not None:
                raise ValueError(f"{op}: {name} applies {layer.activation!r}, which hides dy")
        self.optimizer, self.schedule, self.worth = optimizer, schedule, worth
        self.deviation, self.steps = deviation, 0
        self._group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self._seen = {name: _Seen() for name in self.layers} if by_gradient else {}
        self._hooks = [
            self.layers[name].register_forward_hook(seen.record, with_kwargs=True)
            for name, seen in self._seen.items()
        ]

    @property
    def sparsity(self) -> float:
        """The share of all places that are not stored."""
        weights = [_stored(layer) for layer in self.layers.values()]
        live = sum(weight.values.shape[0] for weight in weights)
        return 1 - live / sum(weight.shape[0] * weight.shape[1] for weight in weights)

    def step(self) -> None:
        """Count a step, and change the pattern if it is due.

        A change by gradient waits for a step whose gradient is finite: where one is due and it is
        not, the step is not counted.
        """
        if self.schedule.due(self.steps + 1) and not self._finite():
            return
        self.steps += 1
        self.schedule.update(self)  # type: ignore[arg-type]

    def _finite(self) -> bool:
        given = [t for seen in self._seen.values() for t in (seen.x, seen.dy) if t is not None]
        finite = all(bool(t.isfinite().all()) for t in given)
        if self._group is None:
            return finite
        # Of all ranks, one that has seen nothing included: the others wait for it.
        device = next(iter(self.layers.values())).format.device
        on_all = torch.full((), float(finite), device=device)
        dist.all_reduce(on_all, dist.ReduceOp.MIN, self._group)
        return bool(on_all)

    @torch.no_grad()
    def drop_and_grow(self, fraction: float) -> None:
        """Drop this share of each layer's places, and grow as many."""
        for name, layer in self.layers.items():
            held = _stored(layer)
            count = int(fraction * held.values.shape[0])
            if count == 0:
                continue
            worth = self.worth(held.values.detach())[None]
            drop = ~largest(worth, held.values.shape[0] - count)[0]
            survived = held.keys()[~drop]
            if self._seen:
                grow = self._by_gradient(name, held.shape, survived, count)
            else:
                grow = random_places(held.shape, survived, count, self.generator)
            values = None
            if self.deviation > 0:
                numbers = torch.randn(count, generator=self.generator, device="cpu")
                values = (self.deviation * numbers).to(held.values)
            self._change(layer, *update_pattern(held, drop, grow, values))

    def _by_gradient(self, name: str, shape: tuple[int, ...], live: Tensor, count: int) -> Tensor:
        seen = self._seen[name]
        if seen.x is None or seen.dy is None:
            raise RuntimeError(f"{name}: no gradient; call step() after backward()")
        x, dy = seen.x, seen.dy.to(seen.x.dtype)
        best = x.new_empty(0, dtype=torch.float32)
        keys = live.new_empty(0)
        rows = max(1, _CHUNK // shape[1])
        for first in range(0, shape[0], rows):
            gradient = matmul(dy[:, first : first + rows].t(), x).float()
            if self._group is not None:  # the ranks' parts of one batch
                dist.all_reduce(gradient, group=self._group)
            gradient = gradient.abs().flatten()
            before = first * shape[1]
            ends = torch.tensor([before, before + gradient.numel()], device=live.device)
            begin, end = torch.searchsorted(live, ends).tolist()
            gradient[live[begin:end] - before] = -1.0
            found = gradient.topk(min(count, gradient.numel()))
            best = torch.cat([best, found.values])
            keys = torch.cat([keys, found.indices + before])
            if best.numel() > count:
                best, kept = best.topk(count)
                keys = keys[kept]
        return torch.stack([keys // shape[1], keys % shape[1]])

    def _change(self, layer: SparseLinear, made: SparseCsr, source: Tensor) -> None:
        """Take a new pattern of as many places over, in place."""
        assert layer.values is not None
        layer.values.copy_(made.values)
        layer.crow_indices.copy_(made.crow_indices)
        layer.col_indices.copy_(made.col_indices)
        state = {} if self.optimizer is None else self.optimizer.state.get(layer.values, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == source.shape:
                value.copy_(value[source.clamp(min=0)].masked_fill(source < 0, 0))

    def detach(self) -> None:
        """Remove every hook from the model."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """From which, with those of model and optimizer, training goes on to the bit."""
        return {
            "version": _VERSION,
            "steps": self.steps,
            "layers": list(self.layers),
            "by gradient": bool(self._seen),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises
        ------
        ValueError
            If a part is missing, or of another version or of a model with other layers; nothing is
            changed then.
        """
        own_state = self.state_dict()
        check_keys("StoredDropGrow", state, list(own_state))
        for key in ("version", "layers", "by gradient"):
            own = own_state[key]
            if state.get(key) != own:
                raise ValueError(
                    f"StoredDropGrow: {key} of the state is {state.get(key)}, not {own}"
                )
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]


def _stored(layer: SparseLinear) -> SparseCsr:
    weight = layer.weight
    assert isinstance(weight, SparseCsr)
    return weight
