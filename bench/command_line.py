"""The options of ``run.py``, and what each of them means where the command line says nothing."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import (
    CODE_SHAPES,
    CODE_TOKENS,
    CONV_SHAPES,
    DTYPES,
    EXPERT_SHAPES,
    EXPERT_TOKENS,
    QUICK_ROWS,
    ROWS,
    SHAPES,
    CodeShape,
    ConvShape,
    ExpertShape,
    LinearShape,
    find_shapes,
)

FEATURES = (
    *("sparse24", "quantized", "blocksparse", "csr", "grouped", "actsparse", "codes"),
    "pointcloud",
    *("model", "relu-lm", "resnet50"),
)
QUICK_FEATURES = FEATURES[:-2]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Choices:
    """What a device's bench offers, and what it runs where the command line says nothing."""

    features: tuple[str, ...]
    quick_features: tuple[str, ...]
    shapes: tuple[LinearShape, ...]
    conv_shapes: tuple[ConvShape, ...]
    expert_shapes: tuple[ExpertShape, ...]
    rows: tuple[int, ...]
    quick_rows: tuple[int, ...]
    known_dtypes: tuple[str, ...]
    dtypes: tuple[str, ...]
    quick_dtypes: tuple[str, ...]
    every_block: tuple[tuple[int, int] | str, ...] = ((16, 16), "2:4")
    quick_blocks: tuple[tuple[int, int] | str, ...] = ((16, 16),)
    code_shapes: tuple[CodeShape, ...] = ()

    def blocks(self, quick: bool) -> tuple[tuple[int, int] | str, ...]:
        return self.quick_blocks if quick else self.every_block


def choices_of(device: str) -> Choices:
    if device == "cpu":
        every = tuple(DTYPES)
        layers, rows = (SHAPES, CONV_SHAPES, EXPERT_SHAPES), (ROWS, QUICK_ROWS)
        quick_dtypes = ("float32", "bfloat16")
        names = (every, every, quick_dtypes)
        return Choices(FEATURES, QUICK_FEATURES, *layers, *rows, *names, code_shapes=CODE_SHAPES)
    import cuda_shapes as gpu

    quick, default = ("sparse24", "blocksparse"), gpu.DEFAULT_DTYPES
    layers, rows = (gpu.SHAPES, CONV_SHAPES, EXPERT_SHAPES), (gpu.ROWS, gpu.QUICK_ROWS)
    names, blocks = (tuple(gpu.DTYPES), default, default), (gpu.BLOCKS, gpu.QUICK_BLOCKS)
    features = (*quick, "grouped", "pointcloud", "codes", "actsparse")
    return Choices(features, quick, *layers, *rows, *names, *blocks)


@dataclass(frozen=True)
class Options:
    """The command line, with its defaults worked out."""

    quick: bool
    features: tuple[str, ...]
    dtypes: tuple[str, ...]
    model_dtypes: tuple[str, ...]
    shapes: tuple[LinearShape, ...]
    conv_shapes: tuple[ConvShape, ...]
    expert_shapes: tuple[ExpertShape, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]  # an expert
    code_shapes: tuple[CodeShape, ...]
    code_tokens: tuple[int, ...]
    blocks: tuple[tuple[int, int] | str, ...]  # or "2:4"
    threads: int
    cold: bool
    json: Path | None
    plot: Path | None
    device: str = "cpu"
    commit: str | None = None
    shapes_given: bool = False  # not a default
    rows_given: bool = False
    seconds: float | None = None
    scan: Path | None = None  # of a point cloud; a synthetic street if None

    def rows_or(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows that were given, otherwise these."""
        return self.rows if self.rows_given else rows


def _comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(text: str) -> tuple[int, ...]:
    rows = tuple(int(part) for part in _comma_list(text))
    if not rows or min(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: rows are whole numbers from 1 on")
    return rows


def _blocks(text: str) -> tuple[tuple[int, int] | str, ...]:
    from gossamer.formats.block import MAX_BLOCK  # not for --help alone

    found: list[tuple[int, int] | str] = []
    for part in _comma_list(text):
        size = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", part)
        if size is None and part != "2:4":
            raise argparse.ArgumentTypeError(f"{text!r}: blocks are given as 16x16,4x4,2:4")
        if size is not None and max(int(size[1]), int(size[2])) > MAX_BLOCK:
            raise argparse.ArgumentTypeError(f"{text!r}: blocks are at most {MAX_BLOCK} wide")
        found.append((int(size[1]), int(size[2])) if size else part)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: blocks are given as 16x16,4x4,2:4")
    return tuple(found)


def _threads(text: str) -> int:
    if (threads := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least one thread")
    return threads


def _parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rows and rounds: three to seven minutes")
    add("--feature", type=_comma_list, metavar="A,B", help=f"of {', '.join(FEATURES)}; default all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    on_gpu = "on a GPU bf16, fp16, fp8, int8, int4, fp32"
    add("--dtype", type=_comma_list, metavar="A,B", help=f"of {', '.join(DTYPES)}; {on_gpu}")
    add("--shapes", type=_comma_list, metavar="A,B", help="names, models (llama) or NxK")
    add("--m", type=_rows, metavar="1,16,...", help="rows of input; tokens an expert; codes")
    add("--block", type=_blocks, metavar="16x16,2:4",
        help="patterns of blocksparse; 2:4 is for its convolutions")  # fmt: skip
    add("--threads", type=_threads, help="default: what torch would use")
    add("--cold", action="store_true", help="weights from memory: copies larger than the caches")
    add("--seconds", type=float, help="on a GPU: begin no case after so long, and say which")
    add("--scan", type=Path, metavar="FILE",
        help="a point cloud of KITTI or nuScenes instead of the synthetic one")  # fmt: skip
    add("--commit", help="for the record, where git does not tell it")
    for kind in ("json", "plot"):
        add(
            f"--{kind}",
            type=Path,
            nargs="?",
            const=RESULTS,
            metavar="PATH",
            help=("write the record" if kind == "json" else "draw a PNG")
            + "; without PATH under bench/results, by date, device and commit",
        )
    return parser


def _check_names(
    parser: argparse.ArgumentParser, option: str, given: list[str], known: Sequence[str]
) -> None:
    for name in given:
        if name not in known:
            parser.error(f"argument {option}: {name!r} is none of {', '.join(known)}")


def parse(arguments: Sequence[str], description: str | None = None) -> Options:
    """The command line as options; argparse's own exit (status 2) on a mistake."""
    parser = _parser(description)
    given = parser.parse_args(arguments)
    choices = choices_of(given.device)
    features = given.feature or (choices.quick_features if given.quick else choices.features)
    defaults = choices.quick_dtypes if given.quick else choices.dtypes
    dtypes = given.dtype or list(defaults)
    _check_names(parser, "--feature", features, choices.features)
    _check_names(parser, "--dtype", dtypes, choices.known_dtypes)
    if given.scan is not None and not given.scan.is_file():
        parser.error(f"argument --scan: there is no file {given.scan}")
    try:
        layers = find_shapes(
            given.shapes,
            (
                *choices.shapes,
                *choices.conv_shapes,
                *choices.expert_shapes,
                *choices.code_shapes,
            ),
        )
    except ValueError as error:
        parser.error(f"argument --shapes: {error}")
    model_dtypes = (
        dtypes if given.dtype else ["float32"] if given.quick else ["float32", "bfloat16"]
    )
    return Options(
        quick=given.quick,
        features=tuple(features),
        dtypes=tuple(dtypes),
        model_dtypes=tuple(model_dtypes),
        shapes=tuple(shape for shape in layers if isinstance(shape, LinearShape)),
        conv_shapes=tuple(shape for shape in layers if isinstance(shape, ConvShape)),
        expert_shapes=tuple(shape for shape in layers if isinstance(shape, ExpertShape)),
        rows=given.m or (choices.quick_rows if given.quick else choices.rows),
        tokens=given.m or EXPERT_TOKENS,
        code_shapes=tuple(shape for shape in layers if isinstance(shape, CodeShape)),
        code_tokens=given.m or CODE_TOKENS,
        blocks=given.block or choices.blocks(given.quick),
        threads=given.threads or torch.get_num_threads(),
        cold=given.cold,
        json=given.json,
        plot=given.plot,
        device=given.device,
        commit=given.commit,
        shapes_given=bool(given.shapes),
        rows_given=bool(given.m),
        seconds=given.seconds,
        scan=given.scan,
    )
