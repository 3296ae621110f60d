"""A small language model with ReLU, trained here: dense against skipping its zero activations.

It learns the bytes of the documentation that comes with Python, in less than a minute, while a
small penalty on the hidden activations makes most of them zero (as the recipes for large models
do). ``gossamer.convert`` then skips those zeros; nothing is approximated. What is timed is
decoding, one token after the other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pydoc_data import topics

import gossamer
import torch
import torch.nn.functional as F
from gossamer.conversion.report import ConversionReport
from models import ModelResult, Speed, differences
from record import OURS
from rivals import DEFAULT, pack_linears
from shapes import DTYPES
from timing import Contender, Effort, measure
from torch import Tensor, nn
from tqdm import trange

NAME = "ReLU language model"
DECODED = 64  # tokens a round
PROMPT = 32


@dataclass(frozen=True)
class Sizes:
    """Of a model and its training; those of ``TINY`` take no time."""

    width: int = 256
    hidden: int = 4096
    layers: int = 3
    heads: int = 4
    context: int = 96
    batch: int = 12
    steps: int = 80
    penalty: float = 1.0  # times the mean hidden activation, averaged over the layers


TINY = Sizes(width=16, hidden=64, layers=2, heads=2, context=24, batch=2, steps=4)
Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class Block(nn.Module):
    """Causal attention, then two matrices with a ReLU between them; each on a normed copy."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.up = nn.Linear(sizes.width, sizes.hidden)
        self.down = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        hidden = self.up(self.norm2(x)).relu()
        return x + self.down(hidden), hidden, k, v


class ReLULM(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, sizes.width)
        self.positions = nn.Embedding(max(sizes.context, PROMPT + DECODED), sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256)

    def forward(
        self, tokens: Tensor, past: Past | None = None
    ) -> tuple[Tensor, Past, list[Tensor]]:
        """[B, T] to logits [B, T, 256], the keys and values, and the hidden activations."""
        seen = 0 if past is None else past[0][0].shape[2]
        places = torch.arange(seen, seen + tokens.shape[1])
        x = self.tokens(tokens) + self.positions(places)
        now, hidden = [], []
        for i, block in enumerate(self.blocks):
            x, h, k, v = block(x, None if past is None else past[i])
            now.append((k, v))
            hidden.append(h)
        return self.head(self.norm(x)), now, hidden


def read_text() -> Tensor:
    """Python's documentation of its own keywords and syntax, as bytes."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.tensor(list(text.encode()))


def windows(text: Tensor, sizes: Sizes, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - sizes.context - 1, (sizes.batch,), generator=generator)
    return torch.stack([text[i : i + sizes.context + 1] for i in starts.tolist()])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())


def train(text: Tensor, sizes: Sizes) -> ReLULM:
    """In float32, the same at every call on one machine."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = ReLULM(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in trange(sizes.steps, desc="training", unit="step", leave=False, disable=None):
            batch = windows(text, sizes, generator)
            logits, _, hidden = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            sparse = torch.stack([h.mean() for h in hidden]).mean()
            optimizer.zero_grad()
            (loss + sizes.penalty * sparse).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def decode(model: nn.Module, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The logits of one token after the other, as in generation: [tokens, 256]."""
    _, past, _ = model(prompt[None])
    logits = []
    for token in tokens.split(1):
        y, past, _ = model(token[None], past)
        logits.append(y[0])
    return torch.cat(logits)


def share_of_zeros(model: nn.Module, batch: Tensor) -> list[float]:
    return [float((h == 0).float().mean()) for h in model(batch[:, :-1])[2]]


def convert(model: ReLULM, text: Tensor, force: bool = False) -> ConversionReport:
    """Measured as it decodes: one token, with what came before it."""
    past = model(text[None, :PROMPT])[1]
    return gossamer.convert(
        model, "activation", sample_input=(text[None, PROMPT : PROMPT + 1], past), force=force
    )


def run(dtype: str, effort: Effort, sizes: Sizes = Sizes()) -> ModelResult:
    """Train the model, convert it, compare the answers, and time decoding."""
    text = read_text()
    held_out, text = text[: 1 << 14], text[1 << 14 :]
    original = train(text, sizes).to(DTYPES[dtype])
    with torch.no_grad():
        prompt, tokens = held_out[:PROMPT], held_out[PROMPT : PROMPT + DECODED]
        report = convert(copy.deepcopy(original), held_out)
        sparse = report.model
        exact = decode(copy.deepcopy(original).double(), prompt, tokens)
        dense_logits, logits = (decode(m, prompt, tokens).double() for m in (original, sparse))
        answers = differences(logits, dense_logits, exact)
        batch = windows(held_out, sizes, torch.Generator().manual_seed(1))
        zeros = share_of_zeros(original, batch)
        losses = [float(loss_of(m, batch)) for m in (original, sparse)]
        contenders = [
            Contender(OURS, lambda: decode(sparse, prompt, tokens)),
            Contender(DEFAULT, lambda: decode(original, prompt, tokens)),
        ]
        packed = pack_linears(copy.deepcopy(original))
        if packed is not None:
            contenders.append(Contender("oneDNN packed", lambda: decode(packed, prompt, tokens)))
        speed = Speed(1, DECODED, measure(contenders, effort))
    pattern = f"skipping zeros ({sum(zeros) / len(zeros):.0%} of the hidden activations)"
    data = f"text that comes with Python; loss {losses[0]:.4f} dense, {losses[1]:.4f} sparse"
    return ModelResult(NAME, dtype, report.rows(), answers, [speed], pattern, "tokens", data)
