"""``Sparsifier``: masks of a model's layers, by a pattern, a score and a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..conversion.report import ConversionReport
from ..formats import Block
from .allocation import DISTRIBUTIONS, allocate, select_globally
from .kernels import Through, has_kernels
from .layers import Layer, Names, find_layers, to_kernels, unwrapped
from .patterns import Pattern, as_pattern
from .report import MaskChange, SparsityReport
from .schedules import Schedule
from .scores import Score
from .states import check_keys, check_masks

_VERSION = 1
_KEYS = (
    *("version", "recipe", "pattern", "score", "schedule of", "steps", "masks", "scores"),
    *("schedule", "generator", "initial", "history"),
)


class Sparsifier:
    """Keeps the weights of a model under masks, which a schedule changes by a score.

    The training loop calls ``step()`` after ``optimizer.step()`` and before ``zero_grad()``, once
    for each step of the optimizer, however many batches its gradient was accumulated over::

        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()

    Masked entries are 0 in the weight, and their gradient stays that of the dense weight, for the
    scores that grow by it. A tie of scores keeps the entry of the lower index. A deep copy of the
    model, such as an average of it, is dense and has no sparsifier.

    Under DistributedDataParallel every rank makes its own sparsifier; all take the masks of rank 0
    at each change. Under autocast with a GradScaler ``scaler.step(optimizer)`` takes the
    place of ``optimizer.step()``; as the scaler leaves out a step whose gradients are not finite,
    so does a sparsifier with a score that reads gradients.

    Parameters
    ----------
    model : nn.Module
        Changed in place; also a DistributedDataParallel one.
    pattern : Pattern, Block or str
        Which entries live and die together; "2:4" stands for ``NM(2, 4)``, ``gossamer.Block`` for
        ``Blocks``.
    score : Score
        What an entry is worth.
    schedule : Schedule
        When the masks change.
    include, exclude : str or iterable of str, optional
        As for ``gossamer.convert``. All linear layers and convolutions by default.
    optimizer : torch.optim.Optimizer, optional
        Its state (momentum, second moments) is kept 0 at masked entries, so that what grows starts
        without a past.
    distribution : {"uniform", "erk", "global"}
        Whether each layer has the sparsity, or all together: in the proportion of Erdős-Rényi
        kernels, or by the score alone. Exact for the whole in either way.
    seed : int
        Of random masks and random growth; the same on every rank.
    kernels : bool
        Whether layers are computed by the kernels of their pattern (2:4 and unstructured linear
        layers, blocks) while they are trained; masked by default. Then masked entries get no
        gradient, but at the steps whose gradient a score reads: these are computed dense. It pays
        where much is masked: ``gossamer.convert`` with a sample measures it.

    Raises
    ------
    TypeError, ValueError
        A layer that is frozen, tied, computed or of a shape that has no such pattern; a sparsity
        that the pattern cannot have; an unknown name or distribution.
    """

    grows: ClassVar[bool] = False
    computes: ClassVar[bool] = False  # the weight that is used, from the dense one
    one_lane_only: ClassVar[bool] = False  # units of a layer have to compete

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | Block | str,
        score: Score,
        schedule: Schedule,
        include: Names | None = None,
        exclude: Names | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        distribution: str = "uniform",
        seed: int = 0,
        kernels: bool = False,
    ) -> None:
        op = type(self).__name__
        self.pattern = as_pattern(pattern)
        if not isinstance(score, Score) or not isinstance(schedule, Schedule):
            raise TypeError(f"{op}: expected a Score and a Schedule, got {score!r}, {schedule!r}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"{op}: distribution {distribution!r}, expected {DISTRIBUTIONS}")
        if not self.pattern.one_lane and (self.one_lane_only or distribution != "uniform"):
            raise ValueError(
                f"{op}: {self.pattern} has as much in each part of a layer"
                + ("" if self.one_lane_only else ": 'uniform' only")
            )
        if schedule.grows and not self.grows:
            raise TypeError(f"{op}: a schedule that grows needs a recipe that does, as DropGrow")
        self.model, self.score, self.schedule = model, score, schedule
        self.optimizer, self.distribution = optimizer, distribution
        self.layers = find_layers(op, model, self.pattern, include, exclude)
        self.steps = 0
        self.history: list[MaskChange] = []
        self._synchronised = isinstance(model, DistributedDataParallel)
        self._initial: dict[str, Tensor] = {}
        self.generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.layers:
            try:
                layer.keep(schedule.sparsity)
            except ValueError as error:
                raise ValueError(f"{op}: {layer.name}: {error}") from None
        for each in self._scores():
            each.attach(self.layers)
        schedule.start(self)
        if kernels:
            self._go_through_kernels()

    def _go_through_kernels(self) -> None:
        for layer in self.layers:
            self._check_kernels(layer, not self.computes)
        for layer in self.layers:
            layer.module.forward = Through(layer, self._needs_dense)

    def _check_kernels(self, layer: Layer, may: bool, straight: bool = False) -> None:
        if not may or not has_kernels(self.pattern, layer.module, straight):
            kind = type(layer.module).__name__
            raise ValueError(
                f"{type(self).__name__}: {layer.name}: no kernels to train {self.pattern} of a "
                f"{kind} with here; exclude={layer.name!r} or kernels=False"
            )

    def _needs_dense(self) -> bool:
        """Whether a score reads the gradient of masked entries that this step computes."""
        reads = [score.masked_gradients for score in self._scores() if score.sees_gradients]
        return "all" in reads or ("due" in reads and self.schedule.due(self.steps + 1))

    def _scores(self) -> list[Score]:
        return [self.score]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The bool mask of each layer's weight, by the layer's name."""
        return {layer.name: layer.mask for layer in self.layers}

    @property
    def sparsity(self) -> float:
        """The share of all entries that is masked."""
        kept = sum(int(layer.mask.sum()) for layer in self.layers)
        return 1 - kept / sum(layer.mask.numel() for layer in self.layers)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step, let the scores see its gradients, change the masks if due, apply them."""
        reads = any(score.sees_gradients for score in self._scores())
        if not reads or self._finite():
            self.steps += 1
            for score in self._scores():
                score.observe(self.layers)
            self.schedule.update(self)
        self.apply()

    def _finite(self) -> bool:
        return all(bool(layer.gradient.isfinite().all()) for layer in self.layers)

    @torch.no_grad()
    def apply(self) -> None:
        """Make 0 what is masked, in the weights and in the optimizer's state of them."""
        for layer in self.layers:
            dropped = ~layer.mask
            layer.weight.masked_fill_(dropped, 0)
            self._forget(layer, dropped)

    def _forget(self, layer: Layer, where: Tensor) -> None:
        """Make the optimizer's state of some entries of a weight 0."""
        state = {} if self.optimizer is None else self.optimizer.state.get(layer.weight, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == where.shape:
                value.masked_fill_(where, 0)

    # What schedules do.

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Keep what the score holds for the best, of all entries: masked ones may return."""
        self._take(self._selected(sparsity))
        self.apply()

    def _selected(self, sparsity: float) -> list[Tensor]:
        units = [self.scored(layer, self.score) for layer in self.layers]
        if self.distribution == "global":
            return select_globally(units, sparsity)
        keeps = allocate(self.layers, sparsity, self.distribution)
        return [self.pattern.select(u, k) for u, k in zip(units, keeps, strict=True)]

    @torch.no_grad()
    def prune_randomly(self, sparsity: float) -> None:
        """Keep a random choice."""
        keeps = allocate(self.layers, sparsity, self.distribution)
        kept = [
            self.pattern.select(self.random(layer), keep)
            for layer, keep in zip(self.layers, keeps, strict=True)
        ]
        self._take(kept)
        self.apply()

    def drop_and_grow(self, fraction: float) -> None:
        """Drop a share of what lives and grow as much."""
        raise NotImplementedError

    @contextmanager
    def tried(self, sparsity: float) -> Iterator[None]:
        """The model as ``prune_to`` would leave it, for the time of a block."""
        with torch.no_grad():
            saved = [layer.weight.detach().clone() for layer in self.layers]
            for layer, kept in zip(self.layers, self._selected(sparsity), strict=True):
                mask = self.pattern.cover(kept, layer.shape, layer.groups)
                layer.weight.masked_fill_(~mask, 0)
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, weight in zip(self.layers, saved, strict=True):
                    layer.weight.copy_(weight)

    @torch.no_grad()
    def remember(self) -> None:
        """Keep a copy of all parameters, for ``rewind``."""
        parameters = unwrapped(self.model).named_parameters()
        self._initial = {name: p.detach().clone() for name, p in parameters}

    @torch.no_grad()
    def rewind(self) -> None:
        """Put all parameters back to what was remembered, under the masks of now."""
        for name, parameter in unwrapped(self.model).named_parameters():
            parameter.copy_(self._initial[name])
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.apply()

    def scored(self, layer: Layer, score: Score) -> Tensor:
        """The score of a layer's units: [lanes, units]."""
        return layer.units(score(layer), score.norm)

    def random(self, layer: Layer) -> Tensor:
        """A random number in [0, 1) for each of a layer's units, the same on any device."""
        numbers = torch.rand(
            layer.kept.shape, generator=self.generator, dtype=torch.float64, device="cpu"
        )
        filled = layer.units(torch.ones(layer.shape, device="cpu"), "l2") > -torch.inf
        return numbers.masked_fill(~filled, -torch.inf).to(layer.weight.device)

    def _take(self, kept: list[Tensor], noted: bool = True) -> None:
        """Take over new masks, those of rank 0, and note what they change."""
        changed = {}
        for layer, units in zip(self.layers, kept, strict=True):
            changed[layer.name] = layer.take(self.of_rank_0(units))
        if noted:
            self.history.append(MaskChange.of(self.steps, self.layers, changed))

    def of_rank_0(self, units: Tensor) -> Tensor:
        """What the first rank has for these bools."""
        if not self._synchronised:
            return units
        shared = units.to(torch.uint8)
        dist.broadcast(shared, 0)
        return shared.bool()

    def report(self) -> SparsityReport:
        """What each layer has become, and how; prints as a table, ``plot()`` draws it."""
        return SparsityReport.of(str(self.pattern), self.layers, self.history)

    def finalize(self, **options: Any) -> ConversionReport:
        """Apply the masks for good and hand the layers to ``gossamer.convert``.

        Parameters
        ----------
        **options
            Of ``gossamer.convert``: ``sample_input``, ``force``.

        Returns
        -------
        ConversionReport

        Raises
        ------
        ValueError
            If no kernel runs the pattern; the weights are masked all the same.
        """
        self.detach()
        self.apply()
        return to_kernels(type(self).__name__, self.model, self.layers, **options)

    def detach(self) -> None:
        """Remove every hook from model and optimizer."""
        for layer in self.layers:
            if isinstance(vars(layer.module).get("forward"), Through):
                del layer.module.forward
        for score in self._scores():
            score.detach()

    def _score_names(self) -> list[str]:
        return [type(score).__name__ for score in self._scores()]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and containers, from which training goes on to the bit."""
        return {
            "version": _VERSION,
            "recipe": type(self).__name__,
            "pattern": repr(self.pattern),
            "score": self._score_names(),
            "schedule of": type(self.schedule).__name__,
            "steps": self.steps,
            "masks": {layer.name: layer.kept.clone() for layer in self.layers},
            "scores": [score.state_dict() for score in self._scores()],
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "initial": {name: value.clone() for name, value in self._initial.items()},
            "history": [change.state() for change in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, and apply its masks.

        Raises
        ------
        ValueError
            If a part is missing or of another recipe, pattern, score, schedule or model; nothing
            is changed then. What scores and schedules hold in their parts is not looked into.
        """
        op = type(self).__name__
        check_keys(op, state, _KEYS)
        for key, own in (
            ("version", _VERSION),
            ("recipe", op),
            ("pattern", repr(self.pattern)),
            ("score", self._score_names()),
            ("schedule of", type(self.schedule).__name__),
        ):
            if state.get(key) != own:
                raise ValueError(f"{op}: {key} of the state is {state.get(key)!r}, not {own!r}")
        check_masks(op, {layer.name: layer.kept for layer in self.layers}, state["masks"])
        history = [MaskChange.from_state(change) for change in state["history"]]
        scores = list(zip(self._scores(), state["scores"], strict=True))
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        for layer in self.layers:
            layer.take(state["masks"][layer.name].to(layer.weight.device))
        for score, saved in scores:
            score.load_state_dict(saved)
        self.schedule.load_state_dict(state["schedule"])
        self._initial = {name: value.clone() for name, value in state["initial"].items()}
        self.history = history
        self.apply()
