"""Every recipe, made ready to train the network of a task: the table ``RECIPES``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gossamer import Block
from gossamer import sparsify as s
from recipe_tasks import EPOCH, HIDDEN, LAST, STEPS, Run, zeros
from torch import Tensor, nn

Builder = Callable[[nn.Module, torch.optim.Optimizer, Callable[[], float]], Any]


def simple(build: Builder) -> Callable[[Run], None]:
    def prepare(run: Run) -> None:
        made = run.made = build(run.model, run.optimizer, run.evaluate)
        if isinstance(made, s.STE):
            run.finish = lambda: made.to_dense(project=True)
        if isinstance(made, s.TSCNC):
            run.backward = lambda x, y: (run.loss(x, y) + made.penalty()).backward()

    return prepare


# fmt: off
SIMPLE: dict[str, Builder] = {
    "dense": lambda m, o, e: None,
    "GMP 90 %": lambda m, o, e: s.GMP(m, 0.9, 50, STEPS // 2, 20, optimizer=o, exclude=LAST),
    "GMP 2:4": lambda m, o, e: s.GMP(m, 0.5, 50, STEPS // 2, 20, "2:4", optimizer=o, exclude=LAST),
    "GMP 8x8 blocks 75 %": lambda m, o, e: s.GMP(
        m, 0.75, 50, STEPS // 2, 20, Block(8, 8), optimizer=o, exclude=LAST),
    "MIRL 10 rounds (89 %)": lambda m, o, e: s.MIRL(
        m, STEPS // 11, 10, optimizer=o, exclude=LAST),
    "SET 90 %": lambda m, o, e: s.SET(m, 0.9, STEPS, EPOCH, optimizer=o, exclude=LAST),
    "RigL 90 %": lambda m, o, e: s.RigL(m, 0.9, 3 * STEPS // 4, 20, optimizer=o, exclude=LAST),
    "RigL fan-in 90 %": lambda m, o, e: s.RigL(
        m, 0.9, 3 * STEPS // 4, 20, pattern=s.ConstantFanIn(), optimizer=o, exclude=LAST),
    "DSTEE 90 %": lambda m, o, e: s.DSTEE(m, 0.9, 3 * STEPS // 4, 20, optimizer=o, exclude=LAST),
    "SparseMomentum 90 %": lambda m, o, e: s.SparseMomentum(
        m, STEPS, EPOCH, 0.9, optimizer=o, exclude=LAST),
    "GSM 90 %": lambda m, o, e: s.GSM(m, o, 0.9, STEPS // 2, exclude=LAST),
    "LOBSTER up to 90 %": lambda m, o, e: s.LOBSTER(
        m, 0.9, e, every=EPOCH, tolerance=0.05, optimizer=o, exclude=LAST),
    "STE 2:4": lambda m, o, e: s.STE(m, o, exclude=LAST),
    "SRSTE 2:4": lambda m, o, e: s.SRSTE(m, o, exclude=LAST),
    "SSTE 2:4": lambda m, o, e: s.SSTE(m, o, exclude=LAST),
    "MaskedDecay 2:4": lambda m, o, e: s.MaskedDecay(m, o, exclude=LAST),
    "WGSEF filters 50 %": lambda m, o, e: s.WGSEF(m, o, 0.5, STEPS // 2, exclude=LAST),
    "TSCNC 90 %": lambda m, o, e: s.TSCNC(m, 0.9, 50, STEPS // 2, 20, optimizer=o, exclude=LAST),
    "HESSO filters 50 %": lambda m, o, e: s.HESSO(m, 0.5, 50, STEPS // 2, 2, exclude=LAST),
}
# fmt: on


def autosparse(run: Run) -> None:
    run.made = s.AutoSparse(run.model, STEPS // 2, -4.0, exclude=LAST)
    run.optimizer.add_param_group({"params": list(run.made.parameters())})


def dress(run: Run) -> None:
    made = run.made = s.DRESS(run.model, (0.9, 0.5), exclude=LAST)
    run.optimizer = run.sgd(run.model)

    def backward(x: Tensor, y: Tensor) -> None:
        for i in range(2):
            with made.subnet(i):
                (run.loss(x, y) / 2).backward()

    run.backward = backward
    run.finish = lambda: made.finalize_at(0)


def sparse_ift(run: Run) -> None:
    ift = s.SparseIFT(0.75)
    run.model = run.task.network(round(ift.width * HIDDEN))
    run.optimizer = run.sgd(run.model)
    run.made = s.RigL(run.model, 0.75, 3 * STEPS // 4, 20, optimizer=run.optimizer, exclude=LAST)


def fish(run: Run) -> None:
    run.train()  # a dense network first; then another task: what goes in is reversed
    run.x, run.test_x = torch.flip(run.x, (1,)), torch.flip(run.test_x, (1,))
    made = run.made = s.FISHMask(run.model, 0.1, 200, exclude=LAST)
    before = [run.model[i].weight.detach().clone() for i in (0, 2)]
    run.learns = lambda step: step >= 200

    def unchanged() -> float:
        same = [(run.model[i].weight == w).flatten() for i, w in zip((0, 2), before, strict=True)]
        return torch.cat(same).float().mean().item()

    run.zeros = unchanged
    assert made.samples == 200


def mask_sparsity(run: Run) -> None:
    first, act, second, _, last = run.model
    norms = [nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN)]
    run.model = nn.Sequential(first, norms[0], act, second, norms[1], nn.ReLU(), last)
    run.optimizer = run.sgd(run.model)
    run.made = s.MaskSparsity(run.model, run.optimizer, STEPS // 4, 0.5, strength=5e-3)

    def prune(step: int) -> None:
        if step >= STEPS // 2:  # pruned, and what is left is trained on
            run.made.finalize()

    run.before, run.finish = prune, run.made.finalize
    run.zeros = lambda: zeros(*norms)


def adasap(run: Run) -> None:
    made = run.made = s.AdaSAP(
        run.model, 0.5, STEPS // 2, rho_max=run.task.rho, optimizer=run.optimizer, exclude=LAST
    )

    def backward(x: Tensor, y: Tensor) -> None:
        run.loss(x, y).backward()
        with made.perturbed():
            run.loss(x, y).backward()

    run.backward = backward


def dass(run: Run) -> None:
    made = run.made = s.DASS(run.model, 0.9, exclude=LAST)
    run.optimizer = run.sgd(run.model)

    def phases(step: int) -> None:
        for at, begin in ((STEPS // 4, made.train_scores), (STEPS // 2, made.train_weights)):
            if step == at:
                begin()

    run.before, run.finish = phases, made.finalize_at


def eau_de_qn(run: Run) -> None:
    made = run.made = s.EauDeQN(
        run.model, lambda p: torch.optim.SGD(p, run.task.rate, 0.9), exclude=LAST
    )
    losses: list[float] = []

    def backward(x: Tensor, y: Tensor) -> None:
        losses.clear()
        for network, optimizer in made.copies():
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        made.step(losses)

    def follow(step: int) -> None:
        if step and step % EPOCH == 0:
            made.update_target()

    def finish() -> None:
        made.update_target()
        run.model = made.target

    run.made, run.backward, run.before, run.finish = None, backward, follow, finish


def fed_tiny(run: Run) -> None:
    first, act, second, _, last = run.model
    norms = [nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN)]
    run.model = nn.Sequential(first, norms[0], act, second, norms[1], nn.ReLU(), last)
    run.optimizer = run.sgd(run.model)
    parts = zip(run.x[:1437].split(480), run.y[:1437].split(480), strict=True)
    clients = [list(zip(x.split(64), y.split(64), strict=True)) for x, y in parts]
    masks = s.candidate_masks(run.model, 0.9, 10, exclude="6")
    best = masks[s.select_mask(run.model, masks, clients, F.cross_entropy)]
    run.made = s.FedTiny(run.model, best, 3 * STEPS // 4, 10, optimizer=run.optimizer, exclude="6")
    run.zeros = lambda: zeros(first, second)


def mad(run: Run) -> None:
    run.train(STEPS // 2)
    run.made = s.MAD(run.model, 0.9, 32, optimizer=run.optimizer, exclude=LAST)
    run.learns = lambda step: step >= 32
    run.backward = lambda x, y: run.loss(
        s.pgd_attack(run.model, F.cross_entropy, x, y, steps=3), y
    ).backward()


def gblr(run: Run) -> None:
    made = run.made = s.GBLR(run.model, 32, 0.75, STEPS // 2, shrink=1.5e-3, exclude=LAST)
    run.optimizer = run.sgd(run.model)
    run.zeros = lambda: 1 - sum(made.density[n] * c for n, c in (("0", 1), ("2", 2))) / 3


def growing(run: Run) -> None:
    made = run.made = s.ContinuousSparsification(run.model, 0.5, STEPS // 2, exclude=LAST)
    run.optimizer = run.sgd(run.model)
    run.backward = lambda x, y: (run.loss(x, y) + made.penalty()).backward()
    run.finish = made.finalize_at


def at_initialization(run: Run) -> None:
    run.made = s.RobustAtInitialization(run.model, 0.9, 10, optimizer=run.optimizer, exclude=LAST)
    run.learns = lambda step: step >= 10


def neural_dynamics(run: Run) -> None:
    made = run.made = s.SparseNeuralDynamics(run.model, 32, 50, STEPS // 2, 20)
    run.optimizer = run.sgd(run.model)
    run.backward = lambda x, y: (run.loss(x, y) + made.penalty()).backward()
    run.finish, run.zeros = made.finalize, lambda: 1 - made.relus / made.total


def activation_penalty(run: Run) -> None:
    made = s.ActivationPenalty(run.model, ["1", "3"], strength=0.3)
    run.backward = lambda x, y: (run.loss(x, y) + made.penalty()).backward()

    def seen() -> float:
        with torch.no_grad():
            run.model(run.test_x)
        return statistics.mean(made.zeros.values())

    run.zeros = seen


def upcycled(run: Run) -> None:
    run.train(STEPS // 2)
    run.model = nn.Sequential(nn.Sequential(*run.model[:3]), nn.ReLU(), run.model[4])
    run.optimizer = run.sgd(run.model)
    s.sparse_upcycling(run.model, "0", run.optimizer, experts=8, choose="tokens")
    run.zeros = lambda: 1 - 2 / 8


def after_training(method: str, pattern: Any, sparsity: float | None) -> Callable[[Run], None]:
    def prepare(run: Run) -> None:
        def finish() -> None:
            batches = list(run.x[:512].split(64))
            options = {"exclude": LAST, "progress": False}
            s.prune_after_training(run.model, batches, pattern, method, sparsity, **options)

        run.finish = finish

    return prepare


RECIPES: dict[str, Callable[[Run], None]] = {
    **{name: simple(build) for name, build in SIMPLE.items()},
    "AutoSparse, learned": autosparse,
    "DRESS, the 90 % subnet": dress,
    "SparseIFT wide 75 %, RigL": sparse_ift,
    "AdaSAP filters 50 %": adasap,
    "MaskSparsity channels 50 %": mask_sparsity,
    "ContinuousSparsification filters 50 %": growing,
    "GBLR 75 %": gblr,
    "DASS 90 %": dass,
    "EauDeQN, 5 copies": eau_de_qn,
    "FedTiny 90 %, 3 clients": fed_tiny,
    "MAD 90 %, adversarial": mad,
    "RobustAtInitialization 90 %": at_initialization,
    "SparseNeuralDynamics, 32 of 256 ReLUs": neural_dynamics,
    "ActivationPenalty l1": activation_penalty,
    "sparse_upcycling, 2 of 8 experts": upcycled,
    "FISHMask 10 %, another task": fish,
    **{
        f"{method} after training, {name}": after_training(method, pattern, sparsity)
        for method in ("magnitude", "wanda", "sparsegpt", "nettrim")
        for name, pattern, sparsity in (("2:4", "2:4", None), ("80 %", s.Unstructured(), 0.8))
    },
}
