"""The kernels of a GPU that skip zero activations, emulated, in float64's terms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from actsparse_cases import ActiveCase
from cases import integers
from devices import SCHEDULES, Sanitizers
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES
from gossamer import _C, pack_spikes, reference
from torch import Tensor

ACTSPARSE = HERE / "kernels" / "actsparse.cu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COUNTERS = 64

# By mechanism: (case, tokens of a block, split_k); 0 leaves the choice.
CASES = {
    "one token, several rounds and blocks": (ActiveCase(1, 512, 5003, "few"), 1, 2),
    "one token, slots refilled": (ActiveCase(1, 264, 1200, "some"), 1, 3),
    "one token, a list that is full": (ActiveCase(1, 16, 4100, "all"), 1, 1),
    "one token, odd columns": (ActiveCase(1, 301, 150, "some"), 1, 2),
    "more blocks than active inputs": (ActiveCase(1, 8, 300, "one"), 1, 5),
    "four tokens": (ActiveCase(4, 520, 700, "some"), 4, 3),
    "three tokens, odd columns": (ActiveCase(3, 77, 333, "few"), 1, 2),
    "eight tokens, several tiles and rounds": (ActiveCase(19, 136, 2100, "few"), 8, 1),
    "whole columns": (ActiveCase(8, 64, 515, "whole columns"), 8, 4),
    "nothing active": (ActiveCase(5, 40, 90, "none"), 0, 0),
    "one of everything": (ActiveCase(1, 1, 1, "all"), 0, 0),
}


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    more = (CSRC / "actsparse" / f"{name}_cuda.cu" for name in ("linear", "outputs"))
    return emulator.build(ACTSPARSE, *more)


@dataclass
class ActiveLinear:
    """A product with its operands, of whole numbers, so that every sum is exact."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    threshold: float = 0.0
    activation: str | None = None

    @classmethod
    def of(cls, case: ActiveCase, dtype: torch.dtype, bias: bool = True) -> ActiveLinear:
        x, _, _ = case.operands(dtype)
        x = torch.where(x == 0, x, integers(*x.shape, limit=3, dtype=dtype))
        weight = integers(case.k, case.n, limit=3, dtype=dtype)
        return cls(x, weight, integers(case.n, limit=9, dtype=dtype) if bias else None)

    def expected(self) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        rest = (bias, self.threshold, self.activation)
        return reference.actsparse_linear(self.x.double(), self.weight.double(), *rest)

    def run(
        self,
        library: KernelLibrary,
        tokens: int = 0,
        split_k: int = 0,
        margin: int = 16,
        packed: bool = False,
    ) -> Tensor:
        """The kernel's result. Around rows of x and of the weight lie NaNs."""
        dtype, (m, k), n = self.x.dtype, self.x.shape, self.weight.shape[1]
        x, x_stride = _among_nans(self.x, margin)
        if packed:
            x = pack_spikes(self.x)
            x[:, -1:] |= 0xFF << (k - 1) % 8 + 1 & 0xFF  # bits past the last input are ignored
            x_stride = x.shape[1]
        weight, stride = _among_nans(self.weight, margin)
        out = torch.full((m * n + 8,), 77.0, dtype=dtype)
        partial = torch.full((1 << 17,), torch.nan)
        counters = torch.zeros(COUNTERS, dtype=torch.int32)
        sizes = [m, n, k, x_stride, stride, int(packed), tokens, split_k]
        library.call(
            *("linear", DTYPE_CODES[dtype], sizes, x, weight),
            *(0 if self.bias is None else self.bias, torch.tensor([self.threshold])),
            *(ACTIVATION_CODES[self.activation], out, partial, counters),
        )
        assert not counters.any()
        assert bool((out[m * n :] == 77).all())
        return out[: m * n].view(m, n)


def _among_nans(t: Tensor, margin: int) -> tuple[Tensor, int]:
    """The same rows, further apart and to the end of their memory, and by how many elements."""
    memory = torch.full((len(t), t.shape[1] + margin), torch.nan).to(t.dtype)
    memory[:, margin:] = t
    return memory.flatten()[margin:], memory.shape[1]


@pytest.mark.parametrize("name", CASES)
def test_matches_plain_torch(kernels: KernelLibrary, sanitizers: Sanitizers, name: str) -> None:
    case, tokens, split_k = CASES[name]
    for seed, dtype in enumerate(DTYPES[1:] if sanitizers.on else DTYPES):
        linear = ActiveLinear.of(case, dtype, bias=seed != 1)
        linear.threshold = float(seed)
        expected = linear.expected().to(dtype)
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, seed):
                assert torch.equal(linear.run(kernels, tokens, split_k), expected), dtype


@pytest.mark.parametrize("margin", [1, 3, 4, 8])
def test_memory_of_any_alignment(kernels: KernelLibrary, margin: int) -> None:
    for dtype in DTYPES:
        for m in (1, 4):
            linear = ActiveLinear.of(ActiveCase(m, 72, 90, "some"), dtype)
            y = linear.run(kernels, split_k=2, margin=margin)
            assert torch.equal(y, linear.expected().to(dtype))


def test_in_any_order(kernels: KernelLibrary) -> None:
    """And the same bits in each, of numbers whose sums are not exact."""
    for case, tokens, split_k in list(CASES.values())[:6]:
        linear = ActiveLinear.of(case, torch.bfloat16)
        linear.x = torch.where(linear.x == 0, linear.x, torch.randn(linear.x.shape).bfloat16())
        y = linear.run(kernels, tokens, split_k)
        for schedule, seed in SCHEDULES[1::2]:
            with kernels.schedule(schedule, seed):
                assert torch.equal(linear.run(kernels, tokens, split_k), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_inactive_input_adds_nothing(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    """Even times what is not finite, where another token has it active; NaN and Inf are active."""
    for m, bad in ((1, torch.nan), (4, torch.inf), (8, torch.nan)):
        linear = ActiveLinear.of(ActiveCase(m, 40, 200, "some"), dtype)
        linear.threshold = 1.0
        clean = linear.run(kernels, split_k=2)
        token = m - 1
        inactive = linear.x[token].abs() <= 1
        linear.weight[inactive] = bad
        y = linear.run(kernels, split_k=2)
        assert torch.equal(y[token], clean[token])
        assert m == 1 or not y[0].isfinite().any()
        linear.x[token, inactive.nonzero()[3]] = bad
        assert linear.run(kernels, split_k=2)[token].isfinite().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    for case, tokens, split_k in list(CASES.values())[:9]:
        linear = ActiveLinear.of(case, dtype)
        linear.x = (linear.x != 0).to(dtype)
        y = linear.run(kernels, tokens, split_k, packed=True)
        assert torch.equal(y, linear.expected().to(dtype)), case


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations(kernels: KernelLibrary, activation: str) -> None:
    roundoff = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for dtype in DTYPES:
        linear = ActiveLinear.of(ActiveCase(3, 40, 100, "few"), dtype)
        linear.weight, linear.activation = linear.weight / 16, activation
        y = linear.run(kernels).double()
        torch.testing.assert_close(y, linear.expected(), rtol=roundoff[dtype], atol=2.0**-21)


# Tokens and outputs of tiles, rounds and blocks; steps of K; rows of any alignment.
OUTPUTS = [(1, 700, 40, 1), (1, 90, 2100, 3), (4, 33, 520, 2), (7, 300, 96, 5), (3, 17, 35, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanted_outputs(kernels: KernelLibrary, dtype: torch.dtype) -> None:
    for i, (m, n, k, blocks) in enumerate(OUTPUTS):
        x, weight, bias = (integers(*s, limit=3, dtype=dtype) for s in ((m, k), (n, k), (n,)))
        wanted = torch.rand(m, n) < (0.5, 0.1, 0.9)[i % 3]
        weight[~wanted.any(0)] = torch.nan
        given = None if i == 1 else bias.double()
        zeroed = weight.double().nan_to_num(nan=0.0)
        expected = reference.actsparse_outputs(x.double(), zeroed, wanted, given).to(dtype)
        for margin, schedule in ((16, "late"), (8, "early"), (3, "early")):
            (rows, x_stride), (memory, stride) = (_among_nans(t, margin) for t in (x, weight))
            out = torch.full((m * n + 8,), 77.0, dtype=dtype)
            with kernels.schedule(schedule, i):
                kernels.call(
                    *("outputs", DTYPE_CODES[dtype], [m, n, k, x_stride, stride, blocks], rows),
                    *(memory, 0 if i == 1 else bias, wanted.view(torch.uint8), 0, out),
                )
            assert torch.equal(out[: m * n].view(m, n), expected), (i, margin)
            assert bool((out[m * n :] == 77).all())


# ---- the choice ---------------------------------------------------------------------------------

H200 = {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 << 10, "l2_bytes": 50 << 20}


def test_choice() -> None:
    def choose(m: int, n: int, k: int, dtype: str = "bfloat16") -> tuple[int, int]:
        chosen = _C.actsparse_choose_cuda(m, n, k, dtype, True, H200)
        tokens, split = chosen["tile_tokens"], chosen["split_k"]
        columns = 256 if dtype != "float32" else 128
        tiles = -(-m // tokens) * -(-n // columns)
        assert (chosen["tile_outputs"], chosen["blocks"]) == (columns, tiles * split)
        wanted = tiles * split * tokens * columns * 4 if split > 1 else 0
        assert chosen["workspace_bytes"] == wanted
        return tokens, split

    # As many blocks as run at once.
    assert choose(1, 4096, 14336) == (1, 16)
    assert choose(1, 14336, 4096) == (1, 4)
    assert choose(4, 4096, 14336) == choose(2, 4096, 14336) == (4, 16)
    assert choose(5, 4096, 14336) == (8, 16)
    assert choose(16, 4096, 14336) == (8, 8)
    assert choose(1, 4096, 14336, "float32") == (1, 8)
    assert choose(1, 256000, 4096)[1] == choose(1, 8, 16)[1] == 1
    with pytest.raises(TypeError, match="float64"):
        choose(1, 8, 8, "float64")
