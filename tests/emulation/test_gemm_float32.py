"""The exact float32 GEMM of a GPU against float64 torch: every cut of the work, under every
schedule."""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass

import pytest
import torch
from cases import SHAPES, Oracle, integers, sparse_24
from devices import SCHEDULES, Sanitizers
from emulator import HERE, Emulator, KernelLibrary
from gossamer import reference
from gossamer.formats import Sparse24
from torch import Tensor

GEMM_FLOAT32 = HERE / "kernels" / "gemm_float32.cu"

ACTIVATIONS = (None, "relu", "gelu", "silu")  # by the order of `enum class Activation`
COUNTERS = 1024

# A fibre for every thread: shapes of SHAPES whose emulation is not for minutes.
GEMMS = [shape for shape in SHAPES if shape[0] * shape[1] * shape[2] < 2_000_000]
FEW = [(1, 1, 1), (3, 33, 33), (5, 17, 300), (17, 40, 96)]
EDGES = list(itertools.product((3,), (1, 15, 16, 17, 33), (4, 7, 30, 31, 32, 33, 257, 520)))


@pytest.fixture(scope="module")
def library(emulator: Emulator) -> KernelLibrary:
    return emulator.build(GEMM_FLOAT32)


@dataclass(frozen=True)
class Config:
    tile_n: int = 32
    tile_m: int = 16
    warps_k: int = 1
    split_k: int = 1

    def workspace_floats(self, m: int, n: int) -> int:
        tiles = -(-m // self.tile_m) * -(-n // self.tile_n)
        return tiles * self.split_k * self.tile_m * self.tile_n if self.split_k > 1 else 0


def chosen(library: KernelLibrary, m: int, n: int, k: int, multiprocessors: int) -> Config:
    found = torch.zeros(5, dtype=torch.int64)
    library.call("choose", found, m, n, k, multiprocessors)
    config = Config(*found[:4].tolist())
    assert int(found[4]) == 4 * config.workspace_floats(m, n)
    return config


CONFIGS = [
    *(Config(tile_m=tile_m, warps_k=8) for tile_m in (1, 2, 4, 8, 16)),
    Config(64, 4, 4, 3),
    Config(128, 16, 2, 2),
    Config(128, 8, 2, 5),
    Config(32, 1, 8, 4),
    Config(256, 2, 1, 1),
]


def run(
    library: KernelLibrary,
    x: Tensor,
    panels: Tensor,
    n: int,
    config: Config,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One call, with NaN in every byte that the kernel has no business with."""
    m, k = x.shape
    stride = -(-k // 4) * 4 + 4  # in elements: rows begin at 16-byte multiples
    rows = torch.full((m + 1, stride), torch.nan)
    rows[:m, :k] = x
    # Neither a row nor a column more is there for the sanitizers to allow.
    storage = rows.flatten()[: (m - 1) * stride + k].clone()
    out, counters = torch.full((m, n), torch.nan), torch.zeros(COUNTERS, dtype=torch.int32)
    workspace = torch.full((config.workspace_floats(m, n),), torch.nan)
    library.call(
        "gemm", out, storage, stride, panels, 0 if bias is None else bias,
        ACTIVATIONS.index(activation), m, n, k, *astuple(config), workspace, counters,
    )  # fmt: skip
    assert int(counters.abs().sum()) == 0
    return out


def panels_of(weight: Sparse24) -> Tensor:
    return reference.sparse24_to_panels(weight.values, weight.indices, weight.in_features)


def whole_numbers(m: int, n: int, k: int) -> tuple[Tensor, Sparse24, Tensor, Tensor]:
    """x, weight, bias and the exact result: every order of summation gives the same float32."""
    weight = sparse_24(n, k)
    values = integers(*weight.values.shape, limit=4, dtype=torch.float32)
    weight = Sparse24(torch.where(weight.values == 0, 0.0, values), weight.indices, (n, k))
    x = integers(m, k, limit=4, dtype=torch.float32)
    bias = integers(n, limit=9, dtype=torch.float32)
    expected = x.double() @ weight.to_dense().double().t() + bias.double()
    return x, weight, bias, expected.float()


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_whole_numbers_are_exact(
    library: KernelLibrary, sanitizers: Sanitizers, config: Config, schedule: str, seed: int
) -> None:
    for m, n, k in FEW if sanitizers.on else [*FEW, *EDGES]:
        x, weight, bias, expected = whole_numbers(m, n, k)
        with library.schedule(schedule, seed):
            y = run(library, x, panels_of(weight), n, config, bias)
        assert torch.equal(y, expected), (m, n, k)


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_matches_reference(
    library: KernelLibrary, sanitizers: Sanitizers, multiprocessors: int
) -> None:
    for m, n, k in FEW if sanitizers.on else GEMMS:
        x, weight, bias = torch.randn(m, k), sparse_24(n, k), torch.randn(n)
        config = chosen(library, m, n, k, multiprocessors)
        with library.schedule("late", 1):
            Oracle(x, weight, bias).check(run(library, x, panels_of(weight), n, config, bias))
            Oracle(x, weight).check(run(library, x, panels_of(weight), n, config))


# Several times what shared memory holds of x, for each number of tokens; the last with splits.
@pytest.mark.parametrize(
    ("m", "k", "config"),
    [
        (1, 20_000, Config(32, 1, 4)),
        (2, 9_001, Config(32, 2, 2)),
        (4, 5_000, Config(64, 4, 4)),
        (8, 3_333, Config(32, 8, 8)),
        (16, 2_500, Config(32, 16, 2)),
        (16, 2_500, Config(64, 16, 1, 2)),
    ],
)
def test_more_columns_than_are_staged(
    library: KernelLibrary, m: int, k: int, config: Config
) -> None:
    x, weight, bias, expected = whole_numbers(m, 20, k)
    for schedule, seed in SCHEDULES:
        with library.schedule(schedule, seed):
            assert torch.equal(run(library, x, panels_of(weight), 20, config, bias), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("split_k", [1, 2])
def test_activation(library: KernelLibrary, activation: str, split_k: int) -> None:
    x, weight, bias = torch.randn(5, 140), sparse_24(37, 140), torch.linspace(-40, 40, 37)
    config = Config(tile_m=4, split_k=split_k)
    y = run(library, x, panels_of(weight), 37, config, bias, activation)
    Oracle(x, weight, bias, activation).check(y)


def test_same_bits_in_every_schedule(library: KernelLibrary) -> None:
    x, panels = torch.randn(7, 1000), panels_of(sparse_24(70, 1000))
    results = []
    for schedule, seed in SCHEDULES:
        with library.schedule(schedule, seed):
            results.append(run(library, x, panels, 70, Config(64, 8, 4, 3)))
    assert all(torch.equal(results[0], result) for result in results)


def test_no_finite_value_leaks(library: KernelLibrary) -> None:
    """NaN and infinity go through kept positions, zeros included, and no others."""
    dense = torch.zeros(20, 40)
    dense[3, 5], dense[4, 6], dense[5, 7] = 1.0, torch.inf, torch.nan
    weight, x = Sparse24.from_dense(dense), torch.randn(3, 40)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    for config in CONFIGS:
        Oracle(x, weight).check(run(library, x, panels_of(weight), 20, config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_hostile_indices_stay_inside(library: KernelLibrary, config: Config) -> None:
    n = 18
    for k in (69, 70, 71):  # every byte occurs, also where K ends in a group
        weight = sparse_24(n, k)
        indices = (torch.arange(weight.indices.numel()) * 37).to(torch.uint8)
        indices = indices.view_as(weight.indices)
        indices[:, -1] = torch.arange(n) * 14 + 3
        panels = reference.sparse24_to_panels(weight.values, indices, k)
        # x past K is NaN, and no NaN is read.
        assert bool(run(library, torch.randn(5, k), panels, n, config).isfinite().all())


def test_config_fits_kernel_and_counters(library: KernelLibrary) -> None:
    for m, n, k in itertools.product(
        (1, 2, 3, 5, 16, 17, 1000, 100_000), (1, 100, 4096, 200_000), (1, 64, 4096, 100_000)
    ):
        for multiprocessors in (1, 108, 132):
            c = chosen(library, m, n, k, multiprocessors)
            assert c.tile_m in (1, 2, 4, 8, 16)
            assert c.tile_n % 32 == 0
            assert c.tile_n // 32 * c.warps_k == 8
            tiles = -(-m // c.tile_m) * -(-n // c.tile_n)
            assert tiles * c.split_k < 2**31  # blocks
            if c.split_k > 1:
                assert tiles <= COUNTERS
                assert (k + 31) // 32 >= c.split_k * c.warps_k
                assert tiles * c.split_k <= 4 * multiprocessors
