"""The conversions of a weight on a GPU: bit for bit those of the reference, at any shape and
alignment, and inside memory whatever the indices say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SHAPES, dense_24, sparse_24
from devices import SCHEDULES, Sanitizers
from emulator import HERE, Emulator, KernelFault, KernelLibrary
from fragments import fragments, fragments_of, fragments_of_int4
from gossamer import reference
from gossamer.formats import Sparse24, sparse24_panels_shape, sparse24_shapes
from torch import Tensor

PACK = HERE / "kernels" / "pack.cu"
PACK_PANELS = HERE / "kernels" / "pack_panels.cu"

# By the order of `enum class DType`.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NARROW = {torch.float8_e4m3fn: 4, torch.int8: 5}
INT4 = torch.uint8  # in pairs
CODES = {**DTYPES, **NARROW, INT4: 6}
FRAGMENT_DTYPES = (torch.bfloat16, torch.float16, *NARROW, INT4)

WEIGHTS = [(n, k) for _, n, k in SHAPES if n * k < 60_000]
WEIGHTS += [
    (n, k)
    for n in (1, 15, 16, 17, 33)
    for k in (*range(1, 10), 31, 32, 33, 255, 256, 257, 300, 520)
]
# Enough for every path where all shapes would take long.
FEW = [(1, 1), (3, 9), (17, 32), (16, 256), (33, 300), (16, 512), (5, 520)]


@pytest.fixture(scope="module")
def pack(emulator: Emulator) -> KernelLibrary:
    return emulator.build(PACK)


@pytest.fixture(scope="module")
def pack_panels(emulator: Emulator) -> KernelLibrary:
    return emulator.build(PACK_PANELS)


def weights(sanitizers: Sanitizers) -> list[tuple[int, int]]:
    return FEW if sanitizers.on else WEIGHTS


def bits(t: Tensor) -> Tensor:
    """The elements as whole numbers, so that -0.0 and NaN are told apart."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(bits(actual), bits(expected))


def shifted(t: Tensor, elements: int = 1) -> Tensor:
    """The same tensor at an address that is a multiple of its element size and no more."""
    room = torch.empty(t.numel() + elements, dtype=t.dtype)
    room[elements:] = t.flatten()
    return room[elements:].view(t.shape)


def misfits(call: Callable[..., object], *arguments: Any) -> list[int]:
    """Count, first and byte of what a call reports."""
    with pytest.raises(KernelFault) as fault:
        call(*arguments)
    return [int(word) for word in str(fault.value).split()]


def from_dense(library: KernelLibrary, dense: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
    value_shape, index_shape = sparse24_shapes(*dense.shape)
    values = shifted(torch.empty(value_shape, dtype=dense.dtype), shift)
    indices = shifted(torch.empty(index_shape, dtype=torch.uint8), shift)
    status = torch.full((2,), -1)
    library.call("from_dense", dense, values, indices, status, *dense.shape, CODES[dense.dtype])
    return values, indices


def gather(library: KernelLibrary, dense: Tensor, indices: Tensor, shift: int = 0) -> Tensor:
    value_shape = sparse24_shapes(*dense.shape)[0]
    values = shifted(torch.empty(value_shape, dtype=dense.dtype), shift)
    library.call("gather", dense, indices, values, *dense.shape, CODES[dense.dtype])
    return values


def to_dense(
    library: KernelLibrary, values: Tensor, indices: Tensor, k: int, shift: int = 0
) -> Tensor:
    dense = shifted(torch.empty(values.shape[0], k, dtype=values.dtype), shift)
    library.call("to_dense", values, indices, dense, *dense.shape, CODES[values.dtype])
    return dense


def validate(library: KernelLibrary, values: Tensor, indices: Tensor, k: int) -> None:
    status = torch.full((2,), -1)
    library.call("validate", values, indices, status, values.shape[0], k, CODES[values.dtype])


def to_panels(library: KernelLibrary, values: Tensor, indices: Tensor, k: int) -> Tensor:
    n = values.shape[0]
    if values.dtype == torch.float32:
        panels = torch.empty(
            sparse24_panels_shape(n, k, values.dtype, values.device), dtype=torch.int32
        )
    else:
        bits_of_value = 4 if values.dtype == INT4 else 8 * values.itemsize
        words = 16 * 256 // 2 * bits_of_value // 32 + 32 * 4
        panels = torch.empty((n + 15) // 16, (k + 255) // 256, words, dtype=torch.int32)
    library.call("to_panels", values, indices, panels, n, k, CODES[values.dtype])
    return panels


def from_panels(
    library: KernelLibrary, panels: Tensor, n: int, k: int, dtype: torch.dtype, shift: int = 0
) -> tuple[Tensor, Tensor]:
    (_, slots), index_shape = sparse24_shapes(n, k)
    columns = slots // 2 if dtype == INT4 else slots
    values = shifted(torch.empty(n, columns, dtype=dtype), shift)
    indices = shifted(torch.empty(index_shape, dtype=torch.uint8), shift)
    library.call("from_panels", panels, values, indices, n, k, CODES[dtype])
    return values, indices


def special_24(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """A 2:4 weight whose kept values may be infinite, NaN or subnormal."""
    dense = dense_24(n, k, dtype)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4])
    chosen = special.to(dtype)[torch.randint(0, 4, dense.shape)]
    return torch.where((dense != 0) & (torch.rand(n, k) < 0.2), chosen, dense)


def stored(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and indices of a legal weight; all bits of narrow values occur."""
    weight = sparse_24(n, k, torch.float32)
    if dtype == INT4:
        numbers = torch.randint(-7, 8, weight.values.shape, dtype=torch.int8)
        return reference.pack_int4(numbers), weight.indices
    if dtype in NARROW:
        values = torch.randint(-128, 128, weight.values.shape, dtype=torch.int8).view(dtype)
        return values, weight.indices
    return weight.values.to(dtype), weight.indices


def expected_panels(values: Tensor, indices: Tensor, k: int) -> Tensor:
    if values.dtype == torch.float32:
        return reference.sparse24_to_panels(values, indices, k)
    if values.dtype == INT4:
        return fragments_of_int4(values, indices, k)
    return fragments_of(values, indices, k)


def hostile_indices(n: int, k: int) -> Tensor:
    """All 256 values of a byte, as far as there is room."""
    shape = sparse24_shapes(n, k)[1]
    return torch.randperm(shape[0] * shape[1]).remainder(256).to(torch.uint8).view(shape)


# ---- dense and portable --------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_and_back(
    pack: KernelLibrary, sanitizers: Sanitizers, dtype: torch.dtype, schedule: str, seed: int
) -> None:
    for n, k in weights(sanitizers):
        dense = special_24(n, k, dtype)
        expected_values, expected_indices = reference.sparse24_from_dense(dense)
        with pack.schedule(schedule, seed):
            values, indices = from_dense(pack, dense)
            again = to_dense(pack, values, indices, k)
            gathered = gather(pack, dense, indices)
            validate(pack, values, indices, k)
        assert same(values, expected_values), (n, k)
        assert torch.equal(indices, expected_indices), (n, k)
        assert same(again, reference.sparse24_to_dense(values, indices, k)), (n, k)
        assert same(gathered, reference.sparse24_gather(dense, indices)), (n, k)


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_any_alignment(pack: KernelLibrary, dtype: torch.dtype, shift: int) -> None:
    for n, k in FEW:
        dense = dense_24(n, k, dtype)
        expected = reference.sparse24_from_dense(dense)
        values, indices = from_dense(pack, shifted(dense, shift), shift)
        assert same(values, expected[0]), (n, k)
        assert torch.equal(indices, expected[1]), (n, k)
        again = to_dense(pack, values, indices, k, shift)
        assert same(again, reference.sparse24_to_dense(*expected, k)), (n, k)
        gathered = gather(pack, shifted(dense, shift), indices, shift)
        assert same(gathered, reference.sparse24_gather(dense, indices)), (n, k)
        validate(pack, values, indices, k)


def test_more_rows_than_the_grid(pack: KernelLibrary) -> None:
    # 256 rows a block of one unit, at most 1024 blocks; then wider rows.
    for n, k in ((262_145, 5), (4_100, 300)):
        dense = torch.zeros(n, k)
        dense[:, ::3] = torch.arange(n).view(-1, 1) + 1.0
        expected = reference.sparse24_from_dense(dense)
        values, indices = from_dense(pack, dense)
        assert same(values, expected[0])
        assert torch.equal(indices, expected[1])
        validate(pack, values, indices, k)
        indices[-1, -1] = 255
        groups = (k + 3) // 4
        first = n * groups - (2 - groups % 2)  # the first group of the last byte
        assert misfits(validate, pack, values, indices, k)[1:] == [first, 255]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.9])
def test_counts_what_does_not_fit(pack: KernelLibrary, dtype: torch.dtype, share: float) -> None:
    for n, k in ((1, 3), (7, 13), (33, 300)):
        dense = dense_24(n, k, dtype)
        dense[torch.rand(n, k) < share] = 1.0
        dense[n // 2, :3] = 1.0
        groups = torch.nn.functional.pad(dense != 0, (0, -k % 4)).view(n, -1, 4)
        over = (groups.sum(-1) > 2).flatten()
        value_shape, index_shape = sparse24_shapes(n, k)
        values = torch.empty(value_shape, dtype=dtype)
        indices = torch.empty(index_shape, dtype=torch.uint8)
        found = misfits(
            pack.call, "from_dense", dense, values, indices, torch.empty(2, dtype=torch.int64),
            n, k, CODES[dtype],
        )  # fmt: skip
        assert found[:2] == [int(over.sum()), int(over.nonzero()[0])]
        expected = reference.sparse24_from_dense(dense)  # keeps the first two as well
        assert same(values, expected[0])
        assert torch.equal(indices, expected[1])


def refusal(values: Tensor, indices: Tensor, k: int) -> list[int]:
    """Row, group and byte that the CPU kernels object to."""
    with pytest.raises(ValueError, match="invalid indices") as error:
        Sparse24(values, indices, (values.shape[0], k)).validate()
    found = re.search(r"row (\d+), group (\d+) \(byte (\d+)\)", str(error.value))
    assert found is not None
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 12, 13, 30, 32, 33, 64, 300])
def test_validates_as_the_cpu_does(pack: KernelLibrary, dtype: torch.dtype, k: int) -> None:
    n, groups = 4, (k + 3) // 4
    values, legal = reference.sparse24_from_dense(dense_24(n, k, dtype))
    values[values == 0] = -0.0  # is zero wherever it lies
    last = legal.shape[1] - 1
    for byte in range(k % 4, 256, 4):  # all of them, over the sizes
        for column in {0, last // 2, last}:
            for zeros in (False, True):
                indices, kept = legal.clone(), values.clone()
                indices[n // 2, column] = byte
                indices[n - 1, last] = 255  # a later one, which is not the first
                kept[n // 2, 4 * column :] = 0.0 if zeros else 1.0
                row, group, bad = refusal(kept, indices, k)
                found = misfits(validate, pack, kept, indices, k)
                assert found[1:] == [row * groups + group, bad], (byte, column, zeros)
                assert found[0] >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hostile_indices_stay_inside(pack: KernelLibrary, dtype: torch.dtype) -> None:
    for n, k in ((300, 1), (17, 31), (16, 300), (9, 520)):
        values = torch.randn(sparse24_shapes(n, k)[0]).to(dtype)
        indices, dense = hostile_indices(n, k), torch.randn(n, k).to(dtype)
        assert same(gather(pack, dense, indices), reference.sparse24_gather(dense, indices))
        # Where both slots of a group name one column, the second wins.
        columns = reference.sparse24_columns(indices, k)
        room = torch.zeros(n, (k + 3) // 4 * 4, dtype=dtype)
        for slot in range(2):
            room.scatter_(1, columns[:, slot::2], values[:, slot::2])
        assert same(to_dense(pack, values, indices, k), room[:, :k].contiguous())


# ---- panels and fragments ------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, *FRAGMENT_DTYPES], ids=str)
def test_panels_and_back(
    pack_panels: KernelLibrary, sanitizers: Sanitizers, dtype: torch.dtype, schedule: str, seed: int
) -> None:
    for n, k in weights(sanitizers):
        values, indices = stored(n, k, dtype)
        with pack_panels.schedule(schedule, seed):
            panels = to_panels(pack_panels, values, indices, k)
            again = from_panels(pack_panels, panels, n, k, dtype)
        assert torch.equal(panels, expected_panels(values, indices, k)), (n, k)
        assert same(again[0], values), (n, k)
        assert torch.equal(again[1], indices), (n, k)


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, *FRAGMENT_DTYPES], ids=str)
def test_panels_at_any_alignment(
    pack_panels: KernelLibrary, dtype: torch.dtype, shift: int
) -> None:
    for n, k in FEW:
        values, indices = stored(n, k, dtype)
        panels = to_panels(pack_panels, shifted(values, shift), shifted(indices, shift), k)
        again = from_panels(pack_panels, panels, n, k, dtype, shift)
        assert torch.equal(panels, expected_panels(values, indices, k)), (n, k)
        assert same(again[0], values), (n, k)
        assert torch.equal(again[1], indices), (n, k)


def test_more_records_than_the_grid(pack_panels: KernelLibrary) -> None:
    n, k = 16 * 8 * 2048 + 17, 4  # eight records a block, at most 2048 blocks
    values = torch.arange(2.0 * n).view(n, 2)
    indices = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)[torch.arange(n) % 6].view(n, 1)
    panels = to_panels(pack_panels, values, indices, k)
    assert torch.equal(panels, expected_panels(values, indices, k))
    again = from_panels(pack_panels, panels, n, k, torch.float32)
    assert same(again[0], values)
    assert torch.equal(again[1], indices)


@pytest.mark.parametrize("dtype", [torch.float32, *FRAGMENT_DTYPES], ids=str)
def test_hostile_indices_in_panels(pack_panels: KernelLibrary, dtype: torch.dtype) -> None:
    for n, k in ((300, 1), (17, 31), (16, 300), (9, 520)):
        values, indices = stored(n, k, dtype)[0], hostile_indices(n, k)
        panels = to_panels(pack_panels, values, indices, k)
        # Fragments hold 0 and 1 in place of what no hardware would take.
        assert torch.equal(panels, expected_panels(values, indices, k)), (n, k)
        assert same(from_panels(pack_panels, panels, n, k, dtype)[0], values), (n, k)


def test_fragments_hold_every_value_once() -> None:
    weight = sparse_24(16, 256, torch.bfloat16)
    weight = Sparse24(
        torch.arange(16 * 128, dtype=torch.int16).view(16, 128).view(torch.bfloat16),
        weight.indices,
        weight.shape,
    )
    words = fragments(weight)
    assert words.shape == (1, 1, 16 * 128 // 2 + 128)
    values = words[0, 0, : 16 * 128 // 2].contiguous().view(torch.int16)
    assert torch.equal(values.sort().values, torch.arange(16 * 128, dtype=torch.int16))
