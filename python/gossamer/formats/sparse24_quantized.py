"""2:4 weights with 8-bit and 4-bit values and float32 scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._wide import wide
from .sparse24 import Sparse24, check_matrix_shape, sparse24_shapes
from .state import read_header
from .stored import StoredWeight


class ValueType(NamedTuple):
    """A type of quantised values: its code in a file, what it is stored as, its largest value."""

    code: int
    storage: torch.dtype
    largest: float
    default_group: int | None  # None: one scale a row, the only choice


VALUE_TYPES = {
    "int8": ValueType(1, torch.int8, 127.0, None),
    "float8_e4m3fn": ValueType(2, torch.float8_e4m3fn, 448.0, None),
    "int4": ValueType(3, torch.uint8, 7.0, 128),
}
_NAME_OF_STORAGE = {kind.storage: name for name, kind in VALUE_TYPES.items()}
_NAME_OF_CODE = {kind.code: name for name, kind in VALUE_TYPES.items()}


def value_type_of(name: str) -> ValueType:
    """The value type by its name; ValueError where there is none."""
    if name not in VALUE_TYPES:
        raise ValueError(
            f"Sparse24Quantized: dtype {name!r}, expected 'int8', 'float8_e4m3fn' or 'int4'"
        )
    return VALUE_TYPES[name]


def resolve_group(value_type: str, in_features: int, group: int | None) -> int:
    """The columns a scale serves, where ``None`` asks for the default; K where one serves a row.

    Raises
    ------
    TypeError, ValueError
        If the type is unknown, or the group no positive multiple of 4, or shorter than a row
        where the products need one scale a row.
    """
    default = value_type_of(value_type).default_group
    if group is None:
        group = in_features if default is None else default
    if not isinstance(group, int):
        raise TypeError(f"Sparse24Quantized: group is {type(group).__name__}, expected an int")
    if group >= in_features:
        return in_features
    if default is None:
        raise ValueError(
            f"Sparse24Quantized: {value_type} values in groups of {group} of {in_features} "
            "columns: int8 and float8_e4m3fn have one scale a row (group=None), int4 has groups"
        )
    if group < 4 or group % 4 != 0:
        raise ValueError(f"Sparse24Quantized: group is {group}, expected a multiple of 4")
    return group


def sparse24_quantized_shapes(
    value_type: str, shape: tuple[int, int], group: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The shapes of values, indices and scales for a [N, K] weight."""
    values, indices = sparse24_shapes(*shape, value_type_of(value_type).storage)
    return values, indices, (shape[0], (shape[1] + group - 1) // group)


@dataclass(frozen=True, eq=False, repr=False)
class Sparse24Quantized(StoredWeight):
    """A [N, K] 2:4 weight of small numbers: W[n, k] = value * scales[n, k // group].

    With G = ceil(K / 4) groups of four a row, each stores a kept pair as in ``Sparse24``. The
    values are symmetric (there is no zero point), and their type follows from the tensor's:

    =============  ==============================  ==================  ====================
    value type     ``values``                      range               scales
    =============  ==============================  ==================  ====================
    int8           int8 [N, 2G]                    -127 to 127         one a row
    float8_e4m3fn  float8_e4m3fn [N, 2G]           -448 to 448         one a row
    int4           uint8 [N, G], a pair a byte:    -7 to 7             one a row or a group
                   slot 0 in the low four bits,                        of columns
                   two's complement
    =============  ==============================  ==================  ====================

    int8 and float8_e4m3fn are multiplied with an x of the same type and so have one scale a row,
    which leaves the sum; int4 is for weights alone, x keeps its floating-point type.

    Parameters
    ----------
    values : Tensor
        As above.
    indices : Tensor
        [N, ceil(G / 2)] uint8, as in ``Sparse24``.
    scales : Tensor
        float32 [N, ceil(K / group)], finite and positive.
    shape : tuple of int
        (N, K), both at least 1.
    group : int
        The columns of W that share a scale: K, or for int4 a multiple of 4 below K.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, group or devices disagree. Content is checked by ``validate``.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378);
    Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (arXiv:2209.05433).
    """

    version: ClassVar[int] = 1

    values: Tensor
    indices: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int

    def __post_init__(self) -> None:
        values, indices, scales = self.values, self.indices, self.scales
        storages = (values.dtype, indices.dtype, scales.dtype)
        if values.dtype not in _NAME_OF_STORAGE or storages[1:] != (torch.uint8, torch.float32):
            raise TypeError(
                f"Sparse24Quantized: values are {storages[0]}, indices {storages[1]} and scales "
                f"{storages[2]}, expected int8, float8_e4m3fn or uint8 (int4), uint8, float32"
            )
        check_matrix_shape(self.shape)
        if self.group != resolve_group(self.value_type, self.in_features, self.group):
            raise ValueError(
                f"Sparse24Quantized: group is {self.group} for a {list(self.shape)} weight, "
                f"expected at most {self.in_features}"
            )
        shapes = sparse24_quantized_shapes(self.value_type, self.shape, self.group)
        if (values.shape, indices.shape, scales.shape) != shapes:
            raise ValueError(
                f"Sparse24Quantized: values have shape {list(values.shape)}, indices "
                f"{list(indices.shape)} and scales {list(scales.shape)}, a {list(self.shape)} "
                f"{self.value_type} weight in groups of {self.group} needs "
                f"{', '.join(str(list(s)) for s in shapes)}"
            )
        if not values.device == indices.device == scales.device:
            raise ValueError(
                f"Sparse24Quantized: values are on {values.device}, indices on {indices.device} "
                f"and scales on {scales.device}"
            )

    @classmethod
    def from_sparse24(
        cls, weight: Sparse24, dtype: str = "int8", group: int | None = None
    ) -> Sparse24Quantized:
        """Round a weight to the nearest that the format holds, by its largest magnitudes.

        A scale is the largest magnitude it serves over the type's largest value (127, 448 or 7),
        and at least the smallest normal float32; it is 1 where all the weights are 0. Values are
        rounded to nearest even. A weight is then off by at most half a scale (int8, int4), or by
        the larger of 2^-4 of itself and 2^-10 scales (float8_e4m3fn).

        Parameters
        ----------
        weight : Sparse24
            Of any dtype; its pattern is kept.
        dtype : {"int8", "float8_e4m3fn", "int4"}
            The value type.
        group : int, optional
            Columns a scale, a multiple of 4; from K on, one scale a row. By default 128 for int4;
            the 8-bit types have one scale a row only.

        Raises
        ------
        TypeError
            If ``weight`` is not a ``Sparse24``.
        ValueError
            If the type is unknown, the group does not fit it, or a weight is not finite: where
            the first one is.
        """
        if not isinstance(weight, Sparse24):
            raise TypeError(
                f"Sparse24Quantized.from_sparse24: weight is {type(weight).__name__}, expected "
                "Sparse24"
            )
        kind = value_type_of(dtype)
        group = resolve_group(dtype, weight.in_features, group)
        weights = weight.values.detach()
        rows, slots = weights.shape
        # Two slots for four columns; a group of K columns need not end with a group of four.
        slots_per_scale = slots if group == weight.in_features else group // 2
        padded = F.pad(weights, (0, -slots % slots_per_scale)).view(rows, -1, slots_per_scale)
        scales = reference.absmax_scales(padded, kind.largest)
        if not scales.is_meta and not bool(scales.isfinite().all()):
            _refuse_non_finite(weight)
        storage = kind.storage if kind.storage.is_floating_point else torch.int8
        numbers = reference.round_scaled(padded, scales, kind.largest, storage)
        numbers = numbers.view(rows, -1)[:, :slots].contiguous()
        values = reference.pack_int4(numbers) if dtype == "int4" else numbers
        return cls(values, weight.indices, scales, weight.shape, group)

    def numbers(self) -> Tensor:
        """The stored values without their scales, one a slot: [N, 2G] int8 or float8_e4m3fn."""
        return reference.unpack_int4(self.values) if self.value_type == "int4" else self.values

    def to_sparse24(self, dtype: torch.dtype = torch.float32) -> Sparse24:
        """The weight that this stands for: value times scale, rounded to ``dtype``."""
        numbers = self.numbers().to(wide(dtype))
        slot_scales = reference.sparse24_slot_scales(self.scales, numbers.shape[1], self.group)
        return Sparse24((numbers * slot_scales).to(dtype), self.indices, self.shape)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for as a dense [N, K] tensor."""
        return self.to_sparse24(dtype).to_dense()

    def validate(self) -> Sparse24Quantized:
        """Check indices, values and scales, and return self.

        Raises
        ------
        ValueError
            With the first row and position of an index that ``Sparse24.validate`` would refuse,
            a value out of range (-128 of int8, -8 of int4, NaN) or a scale that is not finite
            and positive.
        """
        if self.values.is_meta:
            return self
        numbers = self.numbers().to(torch.bfloat16)  # which holds all of them exactly
        largest = VALUE_TYPES[self.value_type].largest
        _refuse_first("value", numbers, numbers.abs() <= largest, f"in [-{largest}, {largest}]")
        good = self.scales.isfinite() & (self.scales > 0)
        _refuse_first("scale", self.scales, good, "finite and positive")
        Sparse24(numbers, self.indices, self.shape).validate()
        return self

    def to(self, device: torch.device | str | int) -> Sparse24Quantized:
        """The same weight on another device; ``from_sparse24`` makes one of another type."""
        moved = (self.values.to(device), self.indices.to(device), self.scales.to(device))
        return Sparse24Quantized(*moved, self.shape, self.group)

    def state(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight in a file: values, indices, scales and format.

        ``format`` is an int64 tensor (version, N, K, group, type), with type 1 for int8, 2 for
        float8_e4m3fn and 3 for int4.
        """
        code = VALUE_TYPES[self.value_type].code
        return self._state(*self.shape, self.group, code)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Sparse24Quantized:
        """Rebuild and validate a weight from what ``state`` gave.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing or not what the format, version 1, asks for.
        """
        keys = ("values", "indices", "scales", "format")
        out_features, in_features, group, code = read_header(
            "Sparse24Quantized", state, keys, "version, N, K, group, type", cls.version
        )
        if code not in _NAME_OF_CODE:
            raise ValueError(f"Sparse24Quantized: unknown value type {code}, expected 1, 2 or 3")
        expected = VALUE_TYPES[_NAME_OF_CODE[code]].storage
        if state["values"].dtype != expected:
            raise TypeError(
                f"Sparse24Quantized: values are {state['values'].dtype}, the format says "
                f"{_NAME_OF_CODE[code]}, stored as {expected}"
            )
        tensors = (state["values"], state["indices"], state["scales"])
        return cls(*tensors, (out_features, in_features), group).validate()

    def __getstate__(self) -> dict[str, Any]:
        # As bytes: pickle.loads cannot read what pickle.dumps makes of a float8 tensor.
        bits = self.values.view(torch.uint8)
        return {**self.__dict__, "values": bits, "value_type": self.value_type}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        storage = value_type_of(state.pop("value_type")).storage
        self.__dict__.update(state, values=state["values"].view(storage))
        self.__post_init__()
        self.validate()

    @property
    def value_type(self) -> str:
        """ "int8", "float8_e4m3fn" or "int4"."""
        return _NAME_OF_STORAGE[self.values.dtype]

    def __repr__(self) -> str:
        return (
            f"Sparse24Quantized(shape={list(self.shape)}, value_type={self.value_type}, "
            f"group={self.group}, device={self.device})"
        )


def _refuse_non_finite(weight: Sparse24) -> None:
    values = weight.values.detach().double()
    # Without one that is not finite, a float64 was too large for a float32 scale: the largest.
    magnitude = values.abs().nan_to_num(nan=torch.inf)
    row, slot = divmod(int(magnitude.argmax()), values.shape[1])
    column = int(reference.sparse24_columns(weight.indices, weight.in_features)[row, slot])
    raise ValueError(
        f"Sparse24Quantized.from_sparse24: the weight at row {row}, column {column} is "
        f"{float(values[row, slot])}, it must be finite and have a float32 scale"
    )


def _refuse_first(what: str, given: Tensor, good: Tensor, expected: str) -> None:
    bad = (~good).nonzero()
    if len(bad) > 0:
        row, column = bad[0].tolist()
        raise ValueError(
            f"Sparse24Quantized: {what} {float(given[row, column])} at row {row}, position "
            f"{column}, expected {expected}"
        )
