"""A pretrained sentence encoder made 2:4: in one shot, then by distilling its own embeddings.

all-MiniLM-L6-v2 is pruned by magnitude, Wanda and SparseGPT, and trained from the last of these
with the dense encoder as its teacher, on sentences from Python's own documentation. Quality is the
mean cosine similarity to the dense encoder's embeddings, on ``sentences.txt``, of which nothing is
trained or calibrated on, and on documentation that was held out. ``--minutes`` counts time of the
CPU, over all threads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gossamer
import torch
import torch.nn.functional as F
from documentation import docstrings
from gossamer.sparsify import STE, prune_after_training
from models import Batch, encode, load_model, make_batches, read_sentences
from torch import Tensor, nn

SEED = 0
BATCH = 32
HELD_OUT = 256


def documentation_sentences() -> list[str]:
    """Sentences of the standard library's docstrings and of the language reference, shuffled."""
    import pydoc_data.topics

    texts = [*pydoc_data.topics.topics.values(), *docstrings()]
    sentences = set()
    for text in texts:
        for paragraph in re.split(r"\n\s*\n|::", text):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                words = re.findall(r"[A-Za-z]{2,}", sentence)
                if 4 <= len(words) <= 40 and len(" ".join(words)) > 0.7 * len(sentence):
                    sentences.add(sentence)
    ordered = sorted(sentences)
    random.Random(SEED).shuffle(ordered)
    return ordered


def with_other_words(batches: Sequence[Batch], tokenizer: Any, share: float) -> list[Batch]:
    """The same batches with a share of the tokens replaced, so that all words are met."""
    words = [i for t, i in tokenizer.get_vocab().items() if t.isalpha() and len(t) > 2]
    vocabulary = torch.tensor(sorted(words))
    g = torch.Generator().manual_seed(SEED)
    changed = []
    for batch in batches:
        ids = batch["input_ids"]
        other = vocabulary[torch.randint(len(vocabulary), ids.shape, generator=g)]
        special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
        swap = (torch.rand(ids.shape, generator=g) < share) & ~special
        swap &= batch["attention_mask"].bool()
        changed.append({**batch, "input_ids": torch.where(swap, other, ids)})
    return changed


def similarity(model: nn.Module, teacher: Tensor, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean and least cosine of sentence embeddings to the teacher's."""
    with torch.no_grad():
        cosines = (encode(model.eval(), batches)[1] * teacher).sum(-1)
    return cosines.mean().item(), cosines.min().item()


def distance(model: nn.Module, batch: Batch, targets: Sequence[Tensor]) -> Tensor:
    """1 - cosine of the sentences' embeddings, and of the tokens' after each layer."""
    mask = batch["attention_mask"].bool()
    states = model(**batch, output_hidden_states=True).hidden_states[1:]
    tokens = [
        1 - F.cosine_similarity(state[mask], target[mask], dim=-1).mean()
        for state, target in zip(states, targets, strict=True)
    ]

    def pooled(state: Tensor) -> Tensor:
        return (state * mask[..., None]).sum(1)

    sentences = F.cosine_similarity(pooled(states[-1]), pooled(targets[-1]), dim=-1)
    return (1 - sentences).mean() + torch.stack(tokens).mean()


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    cpu_seconds: float,
    rate: float,
    told: Callable[[str], None],
) -> STE:
    """Train the student by the 2:4 kernels until the time is spent; the teacher's counts, too."""
    student.embeddings.requires_grad_(False)  # half of all parameters: they stay the teacher's
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], rate)
    sparsifier = STE(student, optimizer, refresh=4, include="encoder")
    order, step, begin = random.Random(SEED), 0, time.process_time()
    queue: list[int] = []
    while (spent := (time.process_time() - begin) / cpu_seconds) < 1:
        if not queue:
            queue = list(range(len(batches)))
            order.shuffle(queue)
        batch = batches[queue.pop()]
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 30)
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * spent))
        with torch.no_grad():
            targets = teacher(**batch, output_hidden_states=True).hidden_states[1:]
        loss = distance(student, batch, targets)
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            told(f"step {step}, {spent:.0%} of the time, loss {loss.item():.4f}")
    told(f"{step} steps of {BATCH} sentences")
    return sparsifier


def seconds_of(
    models: dict[str, nn.Module], batches: Sequence[Batch], rounds: int
) -> dict[str, float]:
    """The median time of all batches, the models interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in models.items():
                begin = time.perf_counter()
                for batch in batches:
                    model(**batch)
                taken[name].append(time.perf_counter() - begin)
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of the CPU, for the training")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--save", type=Path, help="where to leave the trained weights")
    parser.add_argument("--load", type=Path, help="weights to time instead of training")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    teacher, tokenizer = load_model()
    everyday = make_batches(tokenizer, read_sentences(), BATCH)
    if options.load:
        student = copy.deepcopy(teacher)
        student.load_state_dict(torch.load(options.load, weights_only=True))
        time_it(teacher, student, everyday)
        return
    sentences = documentation_sentences()
    print(f"{len(sentences)} sentences of documentation, {HELD_OUT} of them held out")
    technical = make_batches(tokenizer, sentences[:HELD_OUT], BATCH)
    plain = make_batches(tokenizer, sentences[HELD_OUT:], BATCH)
    random.Random(SEED).shuffle(plain)
    with torch.no_grad():
        expected = [encode(teacher, batches)[1] for batches in (everyday, technical)]
    table: dict[str, Any] = {}

    def measure(name: str, model: nn.Module) -> None:
        row = [
            similarity(model, e, b) for e, b in zip(expected, (everyday, technical), strict=True)
        ]
        table[name] = row
        print(f"{name:32} " + "   ".join(f"{mean:.4f} (least {low:.4f})" for mean, low in row))

    print(f"{'mean cosine to the dense model':32} sentences.txt            documentation")
    student = teacher
    for method in ("magnitude", "wanda", "sparsegpt"):
        student = copy.deepcopy(teacher)
        prune_after_training(student, plain[:12], "2:4", method, include="encoder", progress=False)
        measure(f"{method}, one shot", student)
    mixed = plain + with_other_words(plain, tokenizer, 0.4)
    begin = time.process_time()
    made = distil(
        student, teacher, mixed, 60 * options.minutes, options.rate, lambda line: print("  " + line)
    )
    spent = time.process_time() - begin
    made.to_dense(project=True)
    measure(f"distilled, {spent / 60:.1f} CPU minutes", student)
    if options.save:
        torch.save(student.state_dict(), options.save)
    print(json.dumps(table))


def time_it(teacher: nn.Module, student: nn.Module, batches: Sequence[Batch]) -> None:
    sparse = copy.deepcopy(student)
    report = gossamer.convert(sparse, include="encoder", sample_input=batches[len(batches) // 2])
    print(f"{sum(layer.swapped for layer in report)} of {len(report.layers)} layers swapped")
    with torch.no_grad():
        expected = encode(teacher, batches)[1]
    print(f"mean cosine through the kernels {similarity(sparse, expected, batches)[0]:.4f}")
    seconds = seconds_of({"dense": teacher, "2:4": sparse}, batches, 9)
    print(f"{seconds} s for {sum(len(b['input_ids']) for b in batches)} sentences")
    print(f"{seconds['dense'] / seconds['2:4']:.2f}x")


if __name__ == "__main__":
    main()
