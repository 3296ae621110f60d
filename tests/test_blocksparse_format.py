"""BlockSparse: exact bytes, exact round trips, and nothing invalid accepted."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, bits
from conv_cases import block_sparse
from gossamer import Block, reference
from gossamer.formats import BlockSparse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

ops = torch.ops.gossamer

# (weight, groups, block): tails on either side, several groups and taps, blocks larger than all.
LAYOUTS = [
    ((1, 1), 1, Block(1, 1)),
    ((7, 10), 1, Block(2, 4)),
    ((8, 12), 1, Block(4, 4)),
    ((5, 3), 1, Block(64, 64)),
    ((6, 5, 3), 2, Block(2, 2)),
    ((10, 3, 3, 2), 2, Block(4, 2)),
    ((9, 4, 1, 1), 3, Block(1, 16)),
    ((4, 6, 2, 1, 3), 1, Block(3, 4)),
]


def test_blocks_of_a_known_weight() -> None:
    """The picture in csrc/blocksparse/blocksparse.h."""
    weight = torch.zeros(5, 3, 2)
    weight[0, :, 0] = torch.tensor([1.0, 2, 3])  # a b c
    weight[1, :, 0] = torch.tensor([4.0, 5, 6])  # d e f
    weight[4, :, 1] = torch.tensor([7.0, 8, 9])  # g h i
    sparse = BlockSparse.from_dense(weight, Block(2, 2))
    assert sparse.crow_indices.tolist() == [0, 2, 2, 4]
    assert sparse.col_indices.tolist() == [0, 1, 2, 3]
    assert sparse.values.tolist() == [
        [[1, 2], [4, 5]],
        [[3, 0], [6, 0]],
        [[7, 8], [0, 0]],
        [[9, 0], [0, 0]],
    ]
    assert sparse.state()["format"].tolist() == [1, 2, 2, 1, 1, 5, 3, 1, 1, 2]
    assert (sparse.block, sparse.grid, sparse.density) == (Block(2, 2), (3, 4), 4 / 12)


@pytest.mark.parametrize(("shape", "groups", "block"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dense_round_trip(
    dtype: torch.dtype, shape: tuple[int, ...], groups: int, block: Block
) -> None:
    sparse = block_sparse(shape, block, 0.5, groups, dtype)
    sparse.validate()
    dense = sparse.to_dense()
    assert (dense.shape, dense.is_contiguous()) == (shape, True)
    parts = (sparse.values, sparse.crow_indices, sparse.col_indices)
    assert torch.equal(bits(dense), bits(reference.blocksparse_to_dense(*parts, shape, groups)))
    found = BlockSparse.from_dense(dense, block, groups=groups)
    assert torch.equal(found.to_dense(), dense)
    live = found.values.flatten(1).ne(0).any(1)
    assert bool(live.all())  # without a mask, a block of zeros is not stored


@pytest.mark.parametrize(("shape", "groups", "block"), LAYOUTS, ids=str)
def test_gather_is_what_the_reference_takes(
    shape: tuple[int, ...], groups: int, block: Block
) -> None:
    sparse, dense = block_sparse(shape, block, 0.5, groups), torch.randn(shape)
    indices = (sparse.crow_indices, sparse.col_indices)
    seen = dense.reshape(*shape[:2], -1).transpose(1, 2)
    got = ops.blocksparse_gather(seen, *indices, block.rows, block.cols, groups)
    assert torch.equal(got, reference.blocksparse_gather(dense, *indices, block, groups))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_any_weight_survives(
    seed: int, groups: int, group_out: int, group_in: int, taps: int, rows: int, cols: int
) -> None:
    torch.manual_seed(seed)
    shape = (groups * group_out, group_in, taps)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.1)
    sparse = BlockSparse.from_dense(weight, Block(rows, cols), groups=groups).validate()
    assert torch.equal(sparse.to_dense(), weight)
    blocks = reference.to_blocks(weight, Block(rows, cols), groups)
    mask = reference.blocksparse_mask(sparse.crow_indices, sparse.col_indices, blocks.shape[1])
    assert torch.equal(mask, blocks.ne(0).any(-1).any(-1))
    assert torch.equal(sparse.values, blocks[mask])


def test_special_numbers() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[0, 3], weight[2, 2], weight[3, 0] = torch.nan, -0.0, torch.inf, -0.0
    sparse = BlockSparse.from_dense(weight, Block(2, 2))
    assert sparse.col_indices.tolist() == [0, 1]  # -0.0 makes no block live
    assert sparse.to_dense()[0, 0].isnan()
    assert not torch.signbit(sparse.to_dense()[0, 3])
    kept = BlockSparse.from_dense(weight, Block(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert torch.equal(bits(kept.to_dense()), bits(weight))


def test_from_dense_names_what_lies_outside_of_the_mask() -> None:
    weight = torch.zeros(4, 6, 3)
    weight[1, 4, 2] = weight[3, 0, 1] = torch.nan
    weight[0, 0, 0] = 1
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match=r"2 of 3 non-zeros.*first at \[1, 4, 2\]"):
        BlockSparse.from_dense(weight, Block(2, 2), mask)
    mask[0, 8] = mask[1, 3] = True
    assert BlockSparse.from_dense(weight, Block(2, 2), mask).values.shape[0] == 3


def test_from_dense_takes_any_strides_and_no_gradient() -> None:
    weight = block_sparse((6, 4, 3, 2), Block(2, 2)).to_dense()
    for view in (
        weight.to(memory_format=torch.channels_last),
        weight.repeat(2, 1, 1, 1)[::2],
        weight.requires_grad_(),
    ):
        sparse = BlockSparse.from_dense(view, Block(2, 2))
        assert torch.equal(sparse.to_dense(), view)
        assert not sparse.values.requires_grad


WEIGHT = torch.ones(4, 6)
MASK = torch.ones(2, 3, dtype=torch.bool)
WRONG_DENSE = {
    "1-d": (ValueError, r"\[4\]", lambda: make(torch.ones(4))),
    "6-d": (ValueError, r"\[1, 1, 1, 1, 1, 1\]", lambda: make(torch.ones(1, 1, 1, 1, 1, 1))),
    "no rows": (ValueError, r"\[0, 4\]", lambda: make(torch.ones(0, 4))),
    "no taps": (ValueError, r"\[4, 4, 0\]", lambda: make(torch.ones(4, 4, 0))),
    "whole numbers": (TypeError, "int64", lambda: make(torch.ones(4, 4).long())),
    "sparse": (TypeError, "sparse_coo", lambda: make(torch.ones(4, 4).to_sparse())),
    "not a tensor": (TypeError, "list", lambda: make([[1.0]])),
    "meta": (ValueError, "meta", lambda: make(torch.ones(4, 4, device="meta"))),
    "no block": (TypeError, r"\(2, 2\)", lambda: BlockSparse.from_dense(WEIGHT, (2, 2))),
    "mask of numbers": (TypeError, "float32", lambda: make(mask=MASK.float())),
    "mask of another shape": (ValueError, r"\[3, 2\].*\[2, 3\]", lambda: make(mask=MASK.t())),
    "groups": (ValueError, "4 groups|3 groups", lambda: make(torch.ones(4, 1, 1), groups=3)),
    "no groups": (ValueError, "0 groups", lambda: make(torch.ones(4, 1, 1), groups=0)),
    "groups of a linear layer": (ValueError, "2 groups", lambda: make(groups=2)),
    "block of 0": (ValueError, "0 x 4", lambda: Block(0, 4)),
    "block too large": (ValueError, "4 x 65", lambda: Block(4, 65)),
    "block of floats": (TypeError, "4.0", lambda: Block(4.0, 4)),
}


def make(weight: Any = WEIGHT, **arguments: Any) -> BlockSparse:
    return BlockSparse.from_dense(weight, Block(2, 2), **arguments)


@pytest.mark.parametrize("case", WRONG_DENSE)
def test_from_dense_refuses(case: str) -> None:
    error, text, mistake = WRONG_DENSE[case]
    with pytest.raises(error, match=text):
        mistake()


def test_is_frozen_and_compares_by_identity() -> None:
    sparse = block_sparse((4, 8), Block(2, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.shape = (8, 4)  # type: ignore[misc]
    assert sparse == sparse
    assert sparse != copy.copy(sparse)
    assert repr(block_sparse((4, 8), Block(2, 4), 1.0)) == (
        "BlockSparse(shape=[4, 8], groups=1, block=2x4, density=1, dtype=torch.float32, device=cpu)"
    )
    assert str(Block(16, 4)) == "16x4"
    assert {Block(16, 4): 1}[Block(16, 4)] == 1


def test_moves_to_other_dtypes_and_devices() -> None:
    sparse = block_sparse((5, 10, 3), Block(2, 4))
    half = sparse.to(torch.bfloat16)
    assert torch.equal(half.to_dense(), sparse.to_dense().bfloat16())
    assert half.nbytes == 2 * half.values.numel() + 4 * (4 + half.values.shape[0])
    meta = sparse.to("meta").validate()
    assert meta.device.type == "meta"
    assert meta.to_dense().shape == (5, 10, 3)
    with pytest.raises(TypeError, match="int32"):
        sparse.to(torch.int32)


def test_survives_pickle_copy_and_files(tmp_path: Path) -> None:
    sparse = block_sparse((6, 5, 3), Block(2, 4), 0.5, 2, torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    torch.save(sparse.state(), tmp_path / "weight.pt")
    save_file(sparse.state(), tmp_path / "weight.safetensors")
    copies = [
        pickle.loads(pickle.dumps(sparse)),
        copy.deepcopy(sparse),
        torch.load(buffer, weights_only=False),
        BlockSparse.from_state(torch.load(tmp_path / "weight.pt", weights_only=True)),
        BlockSparse.from_state(load_file(tmp_path / "weight.safetensors")),
    ]
    for other in copies:
        assert (other.shape, other.groups, other.block) == (sparse.shape, 2, Block(2, 4))
        assert torch.equal(other.to_dense(), sparse.to_dense())


def test_pickle_is_validated() -> None:
    sparse = block_sparse((8, 8), Block(2, 4), 1.0)
    sparse.col_indices[3] = 7
    with pytest.raises(ValueError, match="column 7 of block 3 in block row 1"):
        pickle.loads(pickle.dumps(sparse))


def test_padding_has_to_be_zero() -> None:
    sparse = block_sparse((5, 3, 2), Block(4, 2), 1.0)
    for at, text in (((1, 0, 1), "block 1.*row 0, column 1"), ((4, 1, 0), "block 4.*row 1")):
        values = sparse.values.clone()
        values[at] = torch.nan
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(sparse, values=values).validate()
        values[at] = -0.0
        dataclasses.replace(sparse, values=values).validate()


def is_valid(crow: list[int], col: list[int], block_columns: int) -> bool:
    """What ``validate`` promises of indices."""
    if crow[0] != 0 or crow[-1] != len(col) or any(a > b for a, b in pairwise(crow)):
        return False
    rows = [col[begin:end] for begin, end in pairwise(crow)]
    return all(sorted(set(row)) == row and all(0 <= c < block_columns for c in row) for row in rows)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(0, 99), st.integers(-2, 8)), max_size=3),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([-1, 0, 1, 2, 2**31 - 1])), max_size=2),
)
def test_validate_accepts_exactly_the_valid(
    seed: int, columns: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    torch.manual_seed(seed)
    sparse = block_sparse((6, 4, 2), Block(2, 2), 0.5)
    for changes, indices in ((columns, sparse.col_indices), (rows, sparse.crow_indices)):
        for at, value in changes:
            if len(indices) > 0:
                indices[at % len(indices)] = value
    if is_valid(sparse.crow_indices.tolist(), sparse.col_indices.tolist(), 4):
        sparse.validate()
    else:
        with pytest.raises(ValueError, match=r"BlockSparse: (crow_indices|column)"):
            sparse.validate()


HEADER = [1, 2, 4, 2, 1, 6, 5, 1, 1, 3]


def header(**changes: int) -> dict[str, torch.Tensor]:
    """The header with other numbers at some places, named by the letter before their index."""
    numbers = list(HEADER)
    for at, number in changes.items():
        numbers[int(at[1:])] = number
    return {"format": torch.tensor(numbers)}


META = torch.zeros(24, device="meta").int()
WRONG_STATE: dict[str, tuple[type[Exception], str, Any]] = {
    "newer version": (ValueError, "version 2", header(_0=2)),
    "other block": (ValueError, "blocks of 4x2", header(_1=4, _2=2)),
    "other channels": (ValueError, r"\[10, 5, 3\]", header(_5=10)),
    "negative shape": (ValueError, "-6", header(_5=-6)),
    "huge channels": (ValueError, "too large", header(_5=2**62)),
    "huge kernel": (ValueError, "too large", header(_4=3, _7=2**62, _8=2**62, _9=2**62)),
    "no groups": (ValueError, "0 groups", header(_3=0)),
    "four axes": (ValueError, "axes", header(_4=4)),
    "less than no axis": (ValueError, "axes", header(_4=-1)),
    "an axis too many": (ValueError, "axes", header(_7=2)),
    "format of floats": (ValueError, "float32", {"format": torch.ones(10)}),
    "format of another length": (ValueError, r"\[3\]", {"format": torch.tensor([1, 6, 5])}),
    "no format": (ValueError, "'format' is missing", {"format": None}),
    "no columns": (ValueError, "'col_indices' is missing", {"col_indices": None}),
    "a list": (TypeError, "list", {"crow_indices": [0, 1]}),
    "values of whole numbers": (TypeError, "int32", {"values": torch.ones(8, 2, 4).int()}),
    "flat values": (ValueError, r"\[64\]", {"values": torch.ones(64)}),
    "wide indices": (TypeError, "int64", {"col_indices": torch.zeros(12).long()}),
    "fewer rows": (ValueError, r"\[4\].*\[5\]", {"crow_indices": torch.zeros(4).int()}),
    "fewer columns": (ValueError, r"\[3\].*\[24\]", {"col_indices": torch.zeros(3).int()}),
    "columns elsewhere": (ValueError, "meta", {"col_indices": META}),
    "all columns 0": (ValueError, "must increase", {"col_indices": torch.zeros(24).int()}),
    "all rows 0": (ValueError, "end with 0, there are 24", {"crow_indices": torch.zeros(5).int()}),
}


@pytest.mark.parametrize("case", WRONG_STATE)
def test_from_state_refuses(case: str) -> None:
    error, text, change = WRONG_STATE[case]
    sparse = block_sparse((6, 5, 3), Block(2, 4), 1.0, 2)
    assert sparse.state()["format"].tolist() == HEADER
    state = {k: v for k, v in {**sparse.state(), **change}.items() if v is not None}
    with pytest.raises(error, match=text):
        BlockSparse.from_state(state)
