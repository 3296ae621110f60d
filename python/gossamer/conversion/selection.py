"""The candidates of a model, with all their names, and those that include/exclude leave out."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from .kinds import is_candidate


@dataclass(frozen=True, eq=False)
class LayerSite:
    """One layer, every name it goes by and every module that holds it."""

    module: nn.Module
    names: tuple[str, ...]
    holders: tuple[tuple[nn.Module, str], ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.names[0]

    def replace(self, layer: nn.Module) -> None:
        """Put another layer into every place of this one."""
        for holder, attribute in self.holders:
            setattr(holder, attribute, layer)


def layer_sites(model: nn.Module) -> list[LayerSite]:
    """Every linear layer and convolution of whatever make, once, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_candidate(module):
            names.setdefault(module, []).append(name)
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for holder in model.modules():
        for attribute, child in holder._modules.items():
            if child in names:
                holders[child].append((holder, attribute))
    return [LayerSite(m, tuple(n), tuple(holders[m])) for m, n in names.items()]


def left_out(
    model: nn.Module,
    sites: Iterable[LayerSite],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    op: str = "convert",
) -> dict[LayerSite, str]:
    """The sites that ``include`` does not name (if given) or ``exclude`` names, and which of both.

    An entry is the name of a module, which stands for everything beneath it, or an fnmatch
    pattern of such names.

    Raises
    ------
    TypeError
        An entry is not a string.
    ValueError
        An entry names no module of the model, or an included one holds no candidate.
    """
    sites = list(sites)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    included = _entries(op, "include", include, modules)
    excluded = _entries(op, "exclude", exclude, modules)
    for entry in included:
        if not any(_picks([entry], site) for site in sites):
            raise ValueError(
                f"{op}: include names {entry!r}, which holds no linear layer and no convolution"
            )
    reasons: dict[LayerSite, str] = {}
    for site in sites:
        if include is not None and not _picks(included, site):
            reasons[site] = "not included"
        elif _picks(excluded, site):
            reasons[site] = "excluded"
    return reasons


def _entries(
    op: str, argument: str, given: str | Iterable[str] | None, modules: list[str]
) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, Iterable):
        raise TypeError(f"{op}: {argument} is {given!r}, expected names of modules")
    entries = [given] if isinstance(given, str) else list(given)
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{op}: {argument} holds {entry!r}, expected names of modules")
        if not any(_matches(name, entry) for name in modules):
            hint = ", ".join(_close_matches(entry, modules))
            raise ValueError(
                f"{op}: {argument} names {entry!r}, but the model has no such module"
                + (f"; close matches: {hint}" if hint else "")
            )
    return entries


def _close_matches(entry: str, modules: list[str]) -> list[str]:
    by_ending = [name for name in modules if name.endswith("." + entry)]
    by_spelling = difflib.get_close_matches(entry, modules, n=3, cutoff=0.5)
    return list(dict.fromkeys(by_ending[:3] + by_spelling))


def _picks(entries: list[str], site: LayerSite) -> bool:
    return any(
        _matches(part, entry)
        for name in site.names
        for part in _self_and_ancestors(name)
        for entry in entries
    )


def _matches(name: str, entry: str) -> bool:
    return name == entry or fnmatchcase(name, entry)


def _self_and_ancestors(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
