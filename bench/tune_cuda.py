"""Times every way to cut up a 2:4 product on this GPU, beside the one that is chosen.

    python bench/tune_cuda.py OUT.json [--dtype bf16,int4] [--rows 1,16] [--shape llama8b]
    python bench/tune_cuda.py OUT.json --feature blocksparse [--shape resnet50.3x3]
    python bench/tune_cuda.py OUT.json --feature sparse24_conv [--shape resnet50.3x3]

A line a case: the chosen way, the fastest, and cuBLAS where it has the dtype. From OUT.json, which
has them all, the constants of the models in csrc/sparse24/gemm_cuda_config.h and
choose_gemm_cuda.h are set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_sparse24_cuda import pack, raw_numbers
from cuda_machine import describe_gpu, l2_bytes
from cuda_shapes import DTYPES, ROWS, SHAPES
from cuda_timing import Contender, GraphStopwatch, copies_for, first_line, graph_stopwatch
from gossamer import _C
from gossamer.formats import Sparse24QuantizedPanels
from gossamer.ops.cuda_workspace import chosen_config
from torch import Tensor
from tune_blocks_cuda import block_cases, block_line, conv24_cases, name_of, tune_block_case

Config = tuple[str, int, int, int, int, int]  # kernel, tile_n, tile_m, warps_k, split_k, blocks
CALLS = 24  # in a graph, at least one for each copy of the operands
WORKSPACE_BYTES = 32 << 20
RECORD = 256  # columns: what split_k divides
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
WGMMA_TILES = ((256, 128), (128, 256), (128, 128))


def configs(m: int, n: int, k: int, dtype: str, multiprocessors: int) -> Iterator[Config]:
    """Every way that may be worth its time; some that the kernels refuse."""
    if m <= 256 and dtype != "fp8":
        tile_m = next(t for t in (8, 16, 32, 64, m) if t >= min(m, 64))
        row_tiles = {8: 2, 16: 2, 32: 3, 64: 2}[tile_m] if dtype == "int4" else 1 + (tile_m == 64)
        for warps_k in (1, 2, 4, 8):
            tile_n = 16 * row_tiles * 8 // warps_k
            tiles = -(-n // tile_n) * -(-m // tile_m)
            for split in SPLITS:
                if split == 1 or (split * tiles <= 6 * multiprocessors and split * RECORD <= k):
                    yield "decode", tile_n, tile_m, warps_k, split, 0
    if m <= 512 or dtype == "int4":
        for tile_m in (t for t in (16, 32, 64, 128) if t < 2 * m or t == 16):
            tiles = -(-n // 128) * -(-m // tile_m)
            most = min(multiprocessors, tiles * -(-k // RECORD))
            whole = max(1, most // tiles) * tiles if tiles <= most else most
            for blocks in {most, whole, min(tiles, most)}:
                yield "stream", 128, tile_m, 1, 1, blocks
    if m < 64 or dtype == "int4":
        return
    for tile_n, tile_m in WGMMA_TILES:
        tiles = -(-n // tile_n) * -(-m // tile_m)
        rounds = -(-tiles // multiprocessors)
        for blocks in {-(-tiles // rounds), min(tiles, multiprocessors)}:
            yield "wgmma", tile_n, tile_m, 1, 1, blocks
    if dtype != "fp8" and m >= 64:
        for tile_m in (128, 256):
            yield "prefill", 128, tile_m, 1, 1, 0


class Layer:
    """A random 2:4 weight of a dtype on the GPU, and calls that multiply by it as a config says."""

    def __init__(self, n: int, k: int, dtype: str, device: torch.device) -> None:
        self.n, self.k, self.dtype, self.device = n, k, DTYPES[dtype], device
        weight = raw_numbers((n, k), self.dtype, device, seed=0, pruned=True)
        self.dense = None if self.dtype.quantised else weight
        self.weight = pack(weight, self.dtype).stored
        self.counters = torch.zeros(_C.cuda_counters, dtype=torch.int32, device=device)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    @property
    def value_dtype(self) -> torch.dtype:
        return self.weight.storage if self.is_quantized else self.dtype.dtype

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.weight, Sparse24QuantizedPanels)

    def x(self, m: int) -> Tensor:
        return raw_numbers((m, self.k), self.dtype, self.device, seed=1)

    def call(self, x: Tensor, stored: Tensor, config: Config | None) -> Callable[[], Tensor]:
        out = torch.empty(x.shape[0], self.n, dtype=self.dtype.out, device=self.device)
        place = (self.workspace, self.counters)
        if self.is_quantized:
            weight = self.weight
            ones = torch.ones(x.shape[0], device=self.device) if self.dtype.quantised else None
            run = partial(
                _C.sparse24_linear_quantized_cuda, out, x, ones, stored, str(self.value_dtype),
                weight.scales, None, weight.group, "none", *place, config,
            )  # fmt: skip
        else:
            run = partial(_C.sparse24_linear_cuda, out, x, stored, None, "none", *place, config)

        def call() -> Tensor:
            run()
            return out

        return call


def seconds(calls: list[Callable[[], Tensor]], stopwatch: GraphStopwatch, rounds: int = 3) -> float:
    """The least of a few replays, a call: a shared machine only adds."""
    repeats = max(1, round(CALLS / len(calls)))
    replay = stopwatch.prepare(Contender("", "", calls), repeats)
    taken = min(stopwatch.seconds([(replay, 1)])[0] for _ in range(rounds))
    stopwatch.drop(replay)
    return taken / replay.calls


def tune_case(layer: Layer, m: int, stopwatch: GraphStopwatch) -> dict[str, Any]:
    """Times of all configs, in microseconds."""
    x, stored = layer.x(m), layer.weight.panels
    device = torch.cuda.get_device_properties(layer.device)
    copies = copies_for(stored.nbytes + x.nbytes, l2_bytes(layer.device))
    weights = [stored, *(stored.clone() for _ in range(1, copies))]
    xs = [x, *(x.clone() for _ in range(1, copies))]

    def calls(config: Config | None) -> list[Callable[[], Tensor]]:
        return [layer.call(a, b, config) for a, b in zip(xs, weights, strict=True)]

    chosen_calls = calls(None)
    expected = chosen_calls[0]().float()
    case: dict[str, Any] = {
        "chosen": chosen_config(m, layer.n, layer.k, layer.value_dtype, layer.device.index or 0),
        "chosen_us": 1e6 * seconds(chosen_calls, stopwatch),
        "bytes": stored.nbytes + x.nbytes + 2 * m * layer.n,
        "us": [],
        "failed": {},
    }
    for config in configs(m, layer.n, layer.k, layer.dtype.name, device.multi_processor_count):
        try:
            layer.counters.zero_()  # whatever the way before has left there
            ways = calls(config)
            found = ways[0]().float()
            error = ((found - expected).norm() / expected.norm()).item()
            if not error < 1e-2:
                case["failed"][str(config)] = f"differs by {error:.2g}"
                continue
            case["us"].append([*config, 1e6 * seconds(ways, stopwatch)])
        except (ValueError, RuntimeError) as error:
            case["failed"][str(config)] = first_line(error)
    if layer.dense is not None:
        dense = [layer.dense, *(layer.dense.clone() for _ in range(1, copies))]
        ways = [partial(F.linear, a, b) for a, b in zip(xs, dense, strict=True)]
        case["dense_us"] = 1e6 * seconds(ways, stopwatch)
    return case


def line(name: str, case: dict[str, Any]) -> str:
    best = min(case["us"], key=lambda entry: entry[-1], default=None)
    fastest = f"{' '.join(map(str, best[:-1]))} {best[-1]:.1f} us" if best else "none"
    dense = f", cuBLAS {case['dense_us']:.1f} us" if "dense_us" in case else ""
    chosen = " ".join(map(str, case["chosen"]))
    rate = case["bytes"] / case["chosen_us"] * 1e-6
    wrong = f", {len(case['failed'])} failed" if case["failed"] else ""
    return (
        f"{name}: {chosen} {case['chosen_us']:.1f} us ({rate:.2f} TB/s), "
        f"fastest {fastest}{dense}{wrong}"
    )


def tune_blocks(options: argparse.Namespace, device: torch.device, begin: float) -> None:
    found: dict[str, Any] = {"gpu": describe_gpu(device), "cases": {}}
    dtype = options.dtype.split(",")[0]
    cases_of = {"blocksparse": block_cases, "sparse24_conv": conv24_cases}[options.feature]
    for case in cases_of(options.shape.split(",")):
        if perf_counter() - begin > options.seconds:
            break
        with graph_stopwatch(device) as stopwatch:
            timed = partial(seconds, stopwatch=stopwatch)
            ways = tune_block_case(case, dtype, device, l2_bytes(device), timed)
        name = name_of(case, dtype)
        found["cases"][name] = ways
        print(block_line(name, ways), flush=True)
        options.out.write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    features = ("sparse24", "blocksparse", "sparse24_conv")
    parser.add_argument("--feature", default="sparse24", choices=features)
    parser.add_argument("--dtype", default="bf16,int4,int8,fp8")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shape", default="", help="those whose name begins so, with commas")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after them")
    options = parser.parse_args()
    begin = perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {"gpu": describe_gpu(device), "cases": {}}
    wanted = tuple(options.shape.split(","))
    if options.feature != "sparse24":
        torch.backends.cudnn.benchmark = True  # dense gets the best algorithm that cuDNN has
        with torch.no_grad():
            tune_blocks(options, device, begin)
        return 0
    with torch.no_grad():
        for dtype in options.dtype.split(","):
            for shape in SHAPES:
                if not shape.name.startswith(wanted) or perf_counter() - begin > options.seconds:
                    continue
                layer = Layer(shape.out_features, shape.in_features, dtype, device)
                for m in map(int, options.rows.split(",")):
                    if perf_counter() - begin > options.seconds:
                        break
                    name = f"{dtype} {shape} x {m}"
                    with graph_stopwatch(device) as stopwatch:
                        case = tune_case(layer, m, stopwatch)
                    found["cases"][name] = case
                    print(line(name, case), flush=True)
                    options.out.write_text(json.dumps(found))
    print(f"took {perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
