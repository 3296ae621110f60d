"""How the lanes of a warp hold the operands of mma and mma.sp, written anew in torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

LEGAL_PAIRS = torch.tensor(list(itertools.combinations(range(4), 2)))


def int_bits(t: Tensor) -> Tensor:
    """The registers that hold ``t`` [..., elements of one register or more], as int32."""
    return t.contiguous().view(torch.int32)


def random_operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers, so that every order of summation gives the same result."""
    return torch.randint(-8, 9, (rows, columns)).to(dtype)


def fragment_a(a: Tensor) -> Tensor:
    """[32 lanes, 4] registers of a [16, S] operand (PTX: mma.m16n8k*, multiplicand A).

    A warp's lanes are eight groups of four. Registers 0 and 2 hold row `group`, 1 and 3 row
    `group + 8`; 0 and 1 the first half of the columns, 2 and 3 the second; a lane's place in its
    group says which 4 bytes of that half.
    """
    halves = a.view(2, 8, 2, 4, a.shape[1] // 8)  # row half, group, column half, lane, elements
    registers = int_bits(halves)[..., 0].permute(1, 3, 2, 0)  # group, lane, column half, row half
    return registers.reshape(32, 4)


def fragment_b(b: Tensor) -> Tensor:
    """[32 lanes, R] registers of a [K, 8] operand: column `group`, 4 bytes of K for each lane."""
    per_register = 4 // b.itemsize
    k = b.shape[0] // (4 * per_register)
    columns = b.t().contiguous().view(8, k, 4, per_register)  # group, register, lane, elements
    return int_bits(columns)[..., 0].permute(0, 2, 1).reshape(32, k)


def matrix_d(d: Tensor) -> Tensor:
    """The [16, 8] result of [32 lanes, 4] registers; its own inverse is ``fragment_d``."""
    return d.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)


def fragment_d(d: Tensor) -> Tensor:
    return d.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)


def metadata(pairs: Tensor, selector: int, bits: int) -> Tensor:
    """[32] registers for the kept columns ``pairs`` [16, groups, 2] of a 16-row sparse operand.

    16-bit types: the two lanes of a group of four that `selector` names share the K columns; each
    holds 16 of them for row `group` in the low half and for row `group + 8` in the high half. The
    other two lanes hold garbage. 8-bit types: all four lanes, each 32 columns of one row.
    """
    nibbles = (pairs[..., 0] + 4 * pairs[..., 1]).to(torch.int64)
    if bits == 16:
        words = torch.randint(0, 2**32, (8, 4))
        for group, half in itertools.product(range(8), range(2)):
            sixteen = [
                sum(int(nibbles[row, 4 * half + q]) << (4 * q) for q in range(4))
                for row in (group, group + 8)
            ]
            words[group, 2 * selector + half] = sixteen[0] | sixteen[1] << 16
    else:
        words = torch.empty(8, 4, dtype=torch.int64)
        for group, lower, half in itertools.product(range(8), range(2), range(2)):
            row = nibbles[group + 8 * lower, 8 * half : 8 * half + 8]
            words[group, lower + 2 * half] = sum(int(row[q]) << (4 * q) for q in range(8))
    return words.view(32).to(torch.uint32).view(torch.int32)
