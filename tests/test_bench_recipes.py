"""The script that tries every recipe: its tasks, and two of its recipes on one of them."""

from __future__ import annotations

import dataclasses

import pytest
import recipe_builders
import recipe_tasks
import small_recipes
import torch
from recipe_tasks import LAST, TASKS, text


def test_recipes_learn_text_and_reach_their_sparsity(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    whole = text()
    assert whole.x.shape == (24_000, 8 * whole.classes)
    assert int(whole.y.max()) < whole.classes
    assert torch.equal(whole.x.view(24_000, 8, -1).sum(-1), torch.ones(24_000, 8))
    little = dataclasses.replace(whole, x=whole.x[:4096], y=whole.y[:4096], batch=64)
    monkeypatch.setitem(TASKS, "text", lambda: little)
    for module in (recipe_tasks, recipe_builders):
        monkeypatch.setattr(module, "STEPS", 160)
    torch.set_num_threads(1)
    assert str(len(whole.network()) - 1) == LAST
    guess = float(torch.bincount(whole.test_y).max()) / len(whole.test_y)
    for name, sparsity in (("GMP 90 %", 0.9), ("SRSTE 2:4", 0.5)):
        zeros, accuracy = small_recipes.measure(name, "text", seed=0)
        assert zeros == pytest.approx(sparsity, abs=1e-4), name
        assert accuracy > guess + 0.03, name
