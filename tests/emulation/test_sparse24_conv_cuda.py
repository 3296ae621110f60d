"""The 2:4 convolutions of a GPU, against torch's dense one in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conv_cases import CASES, typical
from devices import SCHEDULES, Sanitizers
from emulator import Emulator, KernelLibrary
from gossamer.ops.sparse24_conv_product import Way
from sparse24_conv import Conv24, build
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
HALVES = (torch.bfloat16, torch.float16)
FLAT = {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 1), "channels_last": True}
ONE_AXIS = {"kernel": (5,), "stride": (1,), "padding": (2,), "dilation": (1,)}
THREE_AXES = {"kernel": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 0), "dilation": (1, 1, 1)}

# One for each mechanism. Hopper's kernels take one group of a multiple of 64 channels.
CASES_24 = {
    "3x3": typical(**FLAT, group_in=64, group_out=64, extents=(8, 9)),
    "several records": typical(**FLAT, group_in=128, group_out=144, extents=(11, 7)),
    "several tiles": typical(**FLAT, batch=3, group_in=64, group_out=300, extents=(13, 12)),
    "outputs without alignment": typical(**FLAT, group_in=64, group_out=37, extents=(5, 6)),
    "one channel block": typical(**FLAT, group_in=8, group_out=21),
    "channels that end in a step": typical(**FLAT, group_in=40, group_out=70),
    "stride and dilation": typical(
        group_in=64, group_out=48, stride=(2, 3), dilation=(3, 1), padding=(3, 2), extents=(12, 14)
    ),
    "far beyond x": typical(
        group_in=64, group_out=33, kernel=(2, 2), stride=(5, 8), dilation=(4, 9), padding=(9, 20),
        extents=(3, 2),
    ),
    "a single pixel": typical(
        **{**FLAT, "padding": (0, 0)}, batch=1, group_in=192, group_out=24, extents=(3, 3)
    ),
    "pointwise": typical(
        **{**FLAT, "padding": (0, 0)}, kernel=(1, 1), group_in=64, group_out=80, extents=(9, 5)
    ),
    "every other pixel": typical(
        **{**FLAT, "padding": (0, 0), "stride": (2, 2)}, kernel=(1, 1), group_in=128, group_out=64,
        extents=(9, 10),
    ),
    "groups": typical(**FLAT, groups=3, group_in=24, group_out=80, extents=(7, 7)),
    "groups of few outputs": typical(**FLAT, groups=5, group_in=8, group_out=16, extents=(6, 4)),
    "one axis": typical(**ONE_AXIS, group_in=64, group_out=30, extents=(150,)),
    "three axes": typical(**THREE_AXES, group_in=64, group_out=20, extents=(4, 5, 3)),
    "images in depth": typical(
        kernel=(1, 3, 3), stride=(1, 1, 2), padding=(0, 1, 1), dilation=(1, 1, 1), group_in=64,
        group_out=20, extents=(4, 5, 6),
    ),
}  # fmt: skip
# Blocks that share a tile along K.
SPLIT = {"several records": {1, 2}, "a single pixel": {1, 4, 7}, "several tiles": {1}}
NOT_ON_HOPPER = (
    "one channel block", "channels that end in a step", "groups", "groups of few outputs",
    "three axes",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels(emulator: Emulator) -> KernelLibrary:
    return build(emulator)


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """Every sum is exact, so the result is the true one, rounded once."""
    assert torch.equal(actual.to(expected.dtype), expected)


def rounded(conv: Conv24) -> Tensor:
    return conv.expected().to(conv.case.dtype).double()


@pytest.mark.parametrize("name", CASES_24)
def test_tiles_match_dense(kernels: KernelLibrary, sanitizers: Sanitizers, name: str) -> None:
    conv = Conv24.of(replace(CASES_24[name], dtype=torch.bfloat16))
    ways, expected = conv.ways(80), rounded(conv)
    tiles = {("prefill", 128, 128), ("prefill", 64, 256), ("prefill", 64, 128)}
    assert {way[:3] for way in ways} == tiles
    assert {way[4] for way in ways} >= SPLIT.get(name, {1})
    for way in ways[-2:] if sanitizers.on else ways:
        for schedule in ("late", "early"):
            with kernels.schedule(schedule, 3):
                check_exact(conv.run(kernels, way), expected)


def hopper_ways(conv: Conv24) -> list[Way]:
    return [way for way in conv.ways(90) if way[0] in ("wgmma", "stream")]


@pytest.mark.parametrize("name", CASES_24)
def test_hopper_tiles_match_dense(
    kernels: KernelLibrary, sanitizers: Sanitizers, name: str
) -> None:
    conv = Conv24.of(replace(CASES_24[name], dtype=torch.float16))
    ways, expected = hopper_ways(conv), rounded(conv)
    assert bool(ways) == (name not in NOT_ON_HOPPER)
    for i, way in enumerate(ways):
        if sanitizers.on and i not in (0, len(ways) - 1):
            continue
        schedule, seed = SCHEDULES[i % len(SCHEDULES)]
        with kernels.schedule(schedule, seed):
            check_exact(conv.run(kernels, way), expected)


# Above the kernels, padding by name is numbers.
@pytest.mark.parametrize(
    "number", [n for n in range(0, 300, 4) if not isinstance(CASES[n].padding, str)]
)
def test_any_convolution_matches_dense(kernels: KernelLibrary, number: int) -> None:
    drawn = CASES[number]
    case = replace(
        drawn,
        batch=max(drawn.batch, 1),
        group_in=(8, 64, 24, 64)[number // 4 % 4],
        groups=1 if number // 4 % 2 else drawn.groups,
        group_out=16 * drawn.group_out if drawn.groups > 1 else drawn.group_out,
        dtype=HALVES[number // 8 % 2],
    )
    conv = Conv24.of(case)
    ways, expected = [*conv.ways(80), *hopper_ways(conv)], rounded(conv)
    for way in (ways[number % len(ways)], ways[-1]):
        check_exact(conv.run(kernels, way), expected)


@pytest.mark.parametrize("name", ["several records", "several tiles"])
def test_passes_in_any_order(kernels: KernelLibrary, sanitizers: Sanitizers, name: str) -> None:
    conv = Conv24.of(replace(CASES_24[name], dtype=torch.bfloat16))
    expected = rounded(conv)
    hopper = {(way[0], way[2]): way for way in hopper_ways(conv)}
    for way in (conv.ways(80)[0], conv.ways(80)[-1], hopper["wgmma", 256], hopper["stream", 32]):
        for schedule, seed in SCHEDULES[::3] if sanitizers.on else SCHEDULES:
            with kernels.schedule(schedule, seed):
                check_exact(conv.run(kernels, way), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("capability", [80, 90])
def test_bias_and_activation(kernels: KernelLibrary, capability: int, activation: str) -> None:
    case = typical(**FLAT, group_in=64, group_out=40, dtype=torch.float16, extents=(4, 5))
    conv = Conv24.of(case)
    conv.x *= 0.03
    expected = getattr(torch.nn.functional, activation)(conv.expected())
    for way in conv.ways(capability)[:: 2 if capability == 80 else 3]:
        actual = conv.run(kernels, way, activation)
        torch.testing.assert_close(actual, expected, rtol=2**-9, atol=2**-10)


@pytest.mark.parametrize("capability", [80, 90])
def test_nan_goes_through_stored_weights_alone(kernels: KernelLibrary, capability: int) -> None:
    conv = Conv24.of(typical(**FLAT, batch=1, group_in=64, group_out=24, dtype=torch.bfloat16))
    conv.x[0, 5, 4, 3] = torch.nan
    slots = replace(conv.weight, values=torch.ones_like(conv.weight.values)).to_dense()
    expected = conv.case.dense(conv.x.isnan().double(), slots.double(), None) > 0
    assert 0 < int(expected.sum()) < 24 * 9
    found = conv.run(kernels, conv.ways(capability)[-1])
    assert torch.equal(found.isnan(), expected)
