"""Which kernel block-sparse products run on each target, and what they say of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BLOCKSPARSE_TARGETS
from conv_cases import CASES, DTYPES, ConvCase, block_sparse, typical
from gossamer import _C, Block, blocksparse_conv
from gossamer.formats import BlockSparsePanels
from gossamer.ops.blocksparse_choice import blocksparse_choice
from gossamer.ops.conv_operands import is_channels_last


def chosen_target(dtype: torch.dtype = torch.float32) -> str:
    weight = block_sparse((16, 32), Block(4, 4), dtype=dtype)
    return str(blocksparse_choice((3, 32), weight)["target"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_with_kernels_of_their_own(cpu_target: str, dtype: torch.dtype) -> None:
    names = _C.targets_built()
    below = [name for name in names[: names.index(cpu_target) + 1] if name in BLOCKSPARSE_TARGETS]
    if dtype != torch.bfloat16 and below[-1] == "amx_bf16":
        below.pop()
    assert chosen_target(dtype) == below[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_targets_compute_what_the_best_below_does(
    cpu_target: str, dtype: torch.dtype
) -> None:
    case = typical(dtype=dtype)
    weight, x = case.weight(), case.x()
    y = blocksparse_conv(x, weight, **case.geometry)
    _C.force_target(chosen_target(dtype))
    assert torch.equal(blocksparse_conv(x, weight, **case.geometry), y)


def test_panels_give_what_values_give(blocksparse_target: str) -> None:
    for case in CASES[100:180]:
        weight, x = case.weight(), case.x()
        panels = BlockSparsePanels.from_blocksparse(weight)
        back = panels.to_blocksparse()
        assert torch.equal(back.values, weight.values)
        y = blocksparse_conv(x, weight, **case.geometry)
        assert torch.equal(blocksparse_conv(x, panels, **case.geometry), y)


def test_mistakes_in_panels() -> None:
    weight = block_sparse((6, 10), Block(4, 3), dtype=torch.bfloat16)
    panels = BlockSparsePanels.from_blocksparse(weight)
    assert panels.panels.shape == (weight.values.shape[0], 2, 4, 2)
    with pytest.raises(ValueError, match=r"need \[nnz, 2, 4, 2\]"):
        replace(panels, panels=panels.panels[:, :1])
    with pytest.raises(ValueError, match="crow_indices have shape"):
        replace(panels, panels=panels.panels[1:])
    with pytest.raises(TypeError, match="float64"):
        replace(panels, panels=panels.panels.double())
    with pytest.raises(ValueError, match="for blocks of 5 columns of bfloat16"):
        torch.ops.gossamer.blocksparse_product(
            torch.randn(2, 10).bfloat16(), panels.panels, panels.crow_indices,
            panels.col_indices, None, None, (6, 10), 1, (), (), (), 5, "none",
        )  # fmt: skip


def test_choice_says_how_the_outputs_are_cut(blocksparse_target: str) -> None:
    lanes = {"serial": 0, "avx2": 8, "avx512": 16, "amx_bf16": 16}[blocksparse_target]
    for case in CASES[:60]:
        weight, shape = case.weight(), case.x().shape
        chosen = blocksparse_choice(
            shape, weight, **case.geometry, channels_last=case.channels_last
        )
        tiles = chosen["target"] == "amx_bf16"
        if tiles or blocksparse_target != "amx_bf16":
            assert chosen["target"] == blocksparse_target
        assert chosen["threads"] >= 1
        vectors = blocksparse_target != "serial"
        rows, cols = case.block.rows, case.block.cols
        whole = cols in (1, 2, 4, 8) or cols % 16 == 0
        fill = vectors and is_channels_last(case.x()) and rows % lanes == 0 and whole
        fill = fill and (case.groups == 1 or case.group_in % 16 == 0)
        kernel = "output_lanes" if fill else "pixel_lanes" if vectors else "serial"
        assert chosen["kernel"] == ("tiles" if tiles else kernel)
        assert vectors == ("strip_rows" in chosen)
        assert all(chosen[key] >= 0 for key in ("strip_rows", "strip_width") if vectors)


@pytest.mark.parametrize("threads", [1, 4, 32])
def test_narrow_strips_do_not_read_the_weights_again(blocksparse_target: str, threads: int) -> None:
    if blocksparse_target == "serial":
        pytest.skip("cuts nothing into strips")
    for rows, features in ((64, 2048), (512, 28672), (256, 1 << 17)):
        x, y = (rows, 1, 1, 1, features), (rows, 1, 1, 1, 512)
        ones = (1, 1, 1)
        chosen = _C.blocksparse_choose(
            x, y, "float32", 16, 16, features // 4, 1, ones, ones, (0, 0, 0), ones, True, threads
        )
        assert chosen["kernel"] == "output_lanes"
        assert chosen["strip_width"] >= 28


def test_x_is_read_in_place(blocksparse_target: str, threads: int) -> None:
    if blocksparse_target == "serial":
        pytest.skip("packs nothing")
    ones, zeros, in_place = (1, 1), (0, 0), []
    for width, channels, groups, rows, cols in (
        (29, 24, 1, 16, 16), (57, 40, 1, 32, 8), (85, 32, 2, 16, 8), (30, 20, 1, 16, 16),
        (2, 64, 1, 64, 32), (1, 512, 1, 16, 16), (113, 18, 1, 16, 2), (9, 64, 1, 16, 16),
    ):  # fmt: skip
        case = ConvCase(
            3, groups, channels // groups, 2 * rows + 5, ones, (1, width), ones, zeros, ones,
            Block(rows, cols), 0.25, channels_last=True,
        )  # fmt: skip
        weight, x, bias = case.weight(), case.x(), torch.randn(case.shape[0])
        chosen = blocksparse_choice(x.shape, weight, channels_last=True)
        in_place.append(chosen["in_place"])
        y = blocksparse_conv(x, weight, bias)
        case.oracle(x, weight, bias).check(y)
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(blocksparse_conv(x, weight, bias), y), case
    assert sum(in_place) >= 6, in_place


def test_float64_is_serial(cpu_target: str) -> None:
    assert chosen_target(torch.float64) == "serial"


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        ((1, 3, 9, 9), {}, r"\[1, 3, 9, 9\].*4 channels"),
        ((1, 4, 9, 9), {"stride": 0}, "stride 0"),
        ((1, 4, 2, 9), {}, r"extents \[2, 9\]"),
    ],
)
def test_choice_has_the_errors_of_the_product(
    shape: tuple[int, ...], arguments: dict[str, int], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        blocksparse_choice(shape, block_sparse((6, 4, 3, 3), Block(2, 4)), **arguments)


def test_mistakes_at_the_border() -> None:
    pixels, ones, zeros = (1, 1, 9, 9, 8), (1, 1, 1), (0, 0, 0)
    rest = (ones, ones, zeros, ones, True, 2)
    with pytest.raises(ValueError, match="5 live blocks of 4"):
        _C.blocksparse_choose(pixels, pixels, "float32", 4, 4, 5, 1, *rest)
    with pytest.raises(ValueError, match="batch of 1, out of 2"):
        _C.blocksparse_choose(pixels, (2, *pixels[1:]), "float32", 4, 4, 1, 1, *rest)
    with pytest.raises(TypeError, match="int32"):
        _C.blocksparse_choose(pixels, pixels, "int32", 4, 4, 1, 1, *rest)
