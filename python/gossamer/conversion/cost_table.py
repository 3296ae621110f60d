"""Whether a swap pays when there is no sample to measure it with."""

from __future__ import annotations

# (target, dtype) -> the smallest weight, in elements, from which the packed layer was at least
# 1.05 times as fast as F.linear at every number of rows tried: 1, 4, 16, 32, 64, 128 and 512,
# since without a sample nobody knows which it will be. What is not listed lost at some number of
# rows, or was not measured on a machine of its own. Two Zen 5 cores, square weights and long ones:
_SMALLEST_WEIGHT = {
    ("avx2", "float32"): 512 * 512,
    ("avx2", "float16"): 1024 * 1024,
    ("avx512", "float32"): 512 * 512,
    ("avx512", "float16"): 512 * 512,
    ("avx512_bf16", "float32"): 512 * 512,
    ("avx512_bf16", "float16"): 512 * 512,
}
# Two Intel cores (Emerald Rapids), the layers of the bench and up to 1024 rows:
_SMALLEST_WEIGHT_INTEL = {
    ("avx512", "float32"): 1024 * 1024,
    ("avx512_bf16", "float32"): 1024 * 1024,
    ("amx_bf16", "float32"): 1024 * 1024,
}
# Two Zen 3 cores, where torch multiplies the dtype number by number:
_SMALLEST_WEIGHT_LOOPS = {("avx2", "bfloat16"): 512 * 512}
# Of weights this large those with 16, 24 or 32 outputs or inputs still lost at some number of rows.
_SMALLEST_SIDE = 64
NO_FIGURES = "cost table: no figures for {}; with a sample_input it is measured"


def worth_swapping(
    out_features: int,
    in_features: int,
    dtype: str,
    target: str,
    intel: bool = False,
    loops: bool = False,
) -> tuple[bool, str]:
    """The verdict of the cost table, and the reason for it.

    A pure function of the weight, of the target in force (``gossamer.info().target``), or "cuda"
    for a layer on a GPU, of whether the cores are Intel's, and whether torch has only loops for
    the dtype there.
    """
    if target == "cuda":
        return False, NO_FIGURES.format("GPUs")
    table = _SMALLEST_WEIGHT_INTEL if intel else _SMALLEST_WEIGHT
    smallest = (table | _SMALLEST_WEIGHT_LOOPS if loops and not intel else table).get(
        (target, dtype)
    )
    if smallest is None:
        return False, f"cost table: {dtype} on {target} does not gain at every number of rows"
    if min(out_features, in_features) < _SMALLEST_SIDE:
        return False, f"cost table: a side below {_SMALLEST_SIDE}"
    elements = out_features * in_features
    if elements < smallest:
        return False, f"cost table: {elements} weights, below {smallest}"
    return True, "cost table"
