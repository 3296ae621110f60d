"""The quantised format: exact bytes, bounded rounding, and nothing invalid accepted."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import VALUE_TYPES, bits, dense_24, quantized_24, sparse_24
from gossamer import reference
from gossamer.formats import Sparse24, Sparse24Quantized, Sparse24QuantizedPanels
from gossamer.prune import magnitude_24
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = {"int8": 127, "float8_e4m3fn": 448, "int4": 7}
GROUPS = [(value_type, None) for value_type in VALUE_TYPES] + [("int4", 4), ("int4", 32)]


def as_bytes(t: Tensor) -> list[Any]:
    return t.contiguous().view(torch.uint8).tolist()


def test_bytes_of_a_known_weight() -> None:
    weight = Sparse24.from_dense(torch.tensor([[0, 127, 0, -64.0, 2.5, 0, -1, 0], [0] * 8]))
    expected = {
        "int8": [[127, 256 - 64, 2, 255], [0] * 4],  # 2.5 goes to the even neighbour
        # 448 and -225.76, which is nearest to -224; 8.8 to 9, -3.53 to -3.5
        "float8_e4m3fn": [[0x7E, 0xF6, 0x51, 0xC6], [0] * 4],
        "int4": [[7 | (16 - 4) << 4, 0], [0] * 2],  # -3.53, 0.14 and -0.06
    }
    for value_type, values in expected.items():
        quantized = Sparse24Quantized.from_sparse24(weight, value_type)
        assert as_bytes(quantized.values) == values
        assert torch.equal(quantized.indices, weight.indices)
        assert quantized.scales.tolist() == [
            [float(torch.tensor(127.0) / LARGEST[value_type])],
            [1.0],
        ]
    codes = {"int8": 1, "float8_e4m3fn": 2, "int4": 3}
    for value_type, code in codes.items():
        quantized = Sparse24Quantized.from_sparse24(weight, value_type)
        assert quantized.state()["format"].tolist() == [1, 2, 8, 8, code]
    in_groups = Sparse24Quantized.from_sparse24(weight, "int4", 4)
    assert in_groups.numbers().tolist() == [[7, -4, 7, -3], [0] * 4]
    assert in_groups.scales.shape == (2, 2)
    assert in_groups.state()["format"].tolist() == [1, 2, 8, 4, 3]


def test_whole_numbers_survive_and_ties_go_to_even() -> None:
    row = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5, 3.0])
    dense = torch.zeros(1, 12)
    dense[0, ::2] = row
    quantized = Sparse24Quantized.from_sparse24(Sparse24.from_dense(dense), "int8")
    assert quantized.to_dense()[0, ::2].tolist() == [127, 0, 2, -2, -126, 3]
    dense = torch.arange(-7.0, 8)[:, None] * torch.tensor([[0, 0.25, 0, 0]])
    dense[:, 3] = 1.75
    quantized = Sparse24Quantized.from_sparse24(Sparse24.from_dense(dense), "int4")
    assert torch.equal(quantized.to_dense(), dense)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 31), (7, 130), (40, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("value_type", "group"), GROUPS)
def test_every_weight_is_as_near_as_the_scale_allows(
    value_type: str, group: int | None, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = sparse_24(*shape, dtype)
    quantized = Sparse24Quantized.from_sparse24(weight, value_type, group).validate()
    assert quantized.value_type == value_type
    numbers = quantized.numbers().double()
    scales = reference.sparse24_slot_scales(
        quantized.scales.double(), numbers.shape[1], quantized.group
    )
    exact = weight.values.double()
    error = (exact - numbers * scales).abs()
    limit = scales / 2
    if value_type == "float8_e4m3fn":
        limit = torch.maximum(exact.abs() * 2**-4, scales * 2**-10)
    # A quotient of at most 448 in float32 is off by as much as 448 * 2^-24.
    assert bool((error <= limit + scales * 2.0**-15).all())
    # The largest of each scale is kept to the scale's own rounding.
    for n in range(shape[0]):
        for s in range(quantized.scales.shape[1]):
            mine = scales[n] == quantized.scales[n, s].double()
            largest = exact[n][mine].abs().max()
            assert largest <= LARGEST[value_type] * quantized.scales[n, s].double() * (1 + 2**-22)
    back = quantized.to_sparse24(torch.float64)
    assert torch.equal(back.values, numbers * scales)
    assert torch.equal(back.to_dense(), quantized.to_dense(torch.float64))
    back.validate()


def test_error_on_gaussian_weights() -> None:
    weight = Sparse24.from_dense(magnitude_24(torch.randn(256, 1024) / 32))
    relative = {}
    for value_type, group in GROUPS:
        rounded = Sparse24Quantized.from_sparse24(weight, value_type, group).to_sparse24().values
        relative[value_type, group] = float((rounded - weight.values).norm() / weight.values.norm())
    # Steps of size s are off by s / sqrt(12) in the root mean square: for int8, 3.5 sigma / 127.
    assert 0.004 < relative["int8", None] < 0.008
    # A mantissa of three bits: 2^-4 at the worst, a few times less in the mean.
    assert 0.02 < relative["float8_e4m3fn", None] < 0.035
    assert 0.05 < relative["int4", 32] < relative["int4", None] < 0.11


def test_extreme_magnitudes() -> None:
    tiny, large = 2.0**-149, torch.finfo(torch.float32).max / 2
    dense = torch.zeros(3, 4)
    dense[:, 1] = torch.tensor([tiny, large, 2.0**-120])
    for value_type in VALUE_TYPES:
        quantized = Sparse24Quantized.from_sparse24(Sparse24.from_dense(dense), value_type)
        quantized.validate()
        scales = quantized.scales[:, 0]
        assert bool((scales >= torch.finfo(torch.float32).tiny).all())
        error = (quantized.to_dense(torch.float64) - dense.double()).abs()[:, 1]
        assert bool((error <= scales.double() / 2).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_named(dtype: torch.dtype, bad: float) -> None:
    dense = dense_24(5, 13, dtype)
    dense[3, 8:12] = torch.tensor([0, 0, bad, 0])
    for value_type in VALUE_TYPES:
        with pytest.raises(ValueError, match=rf"row 3, column 10 is {bad}"):
            Sparse24Quantized.from_sparse24(Sparse24.from_dense(dense), value_type)


def test_weights_beyond_the_scales_are_named() -> None:
    dense = torch.zeros(2, 4, dtype=torch.float64)
    dense[1, 2] = -1e300
    with pytest.raises(ValueError, match=r"row 1, column 2 is -1e\+300"):
        Sparse24Quantized.from_sparse24(Sparse24.from_dense(dense))


def test_all_pairs_of_four_bits() -> None:
    pairs = torch.arange(256).to(torch.uint8).view(16, 16)
    numbers = reference.unpack_int4(pairs)
    assert torch.equal(reference.pack_int4(numbers), pairs)
    low_then_high = [[b & 15, b >> 4] for b in range(256)]
    expected = [n - 16 if n > 7 else n for pair in low_then_high for n in pair]
    assert numbers.flatten().tolist() == expected


WRONG_GROUPS = {
    "type": (ValueError, "'int3'", ("int3", None)),
    "8 bit in groups": (ValueError, "int8 values in groups of 4 of 12", ("int8", 4)),
    "zero": (ValueError, "group is 0", ("int4", 0)),
    "negative": (ValueError, "group is -4", ("int4", -4)),
    "no multiple of 4": (ValueError, "group is 6", ("int4", 6)),
    "no whole number": (TypeError, "float", ("int4", 8.0)),
}


@pytest.mark.parametrize("case", WRONG_GROUPS)
def test_wrong_groups_are_errors(case: str) -> None:
    error, text, (value_type, group) = WRONG_GROUPS[case]
    with pytest.raises(error, match=text):
        Sparse24Quantized.from_sparse24(sparse_24(6, 12), value_type, group)


def test_only_sparse_weights_are_quantised() -> None:
    with pytest.raises(TypeError, match=r"Tensor.*Sparse24"):
        Sparse24Quantized.from_sparse24(torch.ones(4, 4))  # type: ignore[arg-type]


def test_groups_beyond_a_row_are_one_scale_a_row() -> None:
    weight = sparse_24(6, 13)
    for value_type in VALUE_TYPES:
        for group in (13, 16, 1000):
            quantized = Sparse24Quantized.from_sparse24(weight, value_type, group)
            assert quantized.group == 13
            assert quantized.scales.shape == (6, 1)
    assert Sparse24Quantized.from_sparse24(weight, "int4", 12).scales.shape == (6, 2)


def test_properties() -> None:
    quantized = quantized_24(5, 10, "int4", 8)
    assert (quantized.out_features, quantized.in_features) == quantized.shape == (5, 10)
    assert quantized.device.type == "cpu"
    assert quantized.nbytes == 5 * 3 + 5 * 2 + 5 * 2 * 4
    assert quantized_24(5, 10, "int8").nbytes == 5 * 6 + 5 * 2 + 5 * 4
    assert (
        repr(quantized) == "Sparse24Quantized(shape=[5, 10], value_type=int4, group=8, device=cpu)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.group = 4  # type: ignore[misc]
    assert quantized == quantized
    assert quantized != copy.copy(quantized)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_moves_to_another_device(value_type: str) -> None:
    quantized = quantized_24(5, 10, value_type)
    meta = quantized.to("meta").validate()
    assert meta.device.type == "meta"
    assert meta.to_dense().shape == (5, 10)
    assert meta.value_type == value_type
    again = Sparse24Quantized.from_sparse24(sparse_24(5, 10).to("meta"), value_type)
    assert again.scales.is_meta
    with pytest.raises(TypeError, match="float64"):
        quantized.to(torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_survives_pickle_copy_and_files(tmp_path: Path, value_type: str) -> None:
    quantized = quantized_24(5, 140, value_type)
    torch.save(quantized.state(), tmp_path / "weight.pt")
    save_file(quantized.state(), tmp_path / "weight.safetensors")
    copies = [
        pickle.loads(pickle.dumps(quantized)),
        copy.deepcopy(quantized),
        Sparse24Quantized.from_state(torch.load(tmp_path / "weight.pt", weights_only=True)),
        Sparse24Quantized.from_state(load_file(tmp_path / "weight.safetensors")),
    ]
    for other in copies:
        assert (other.shape, other.group, other.value_type) == (
            (5, 140),
            quantized.group,
            value_type,
        )
        assert as_bytes(other.values) == as_bytes(quantized.values)
        assert torch.equal(other.indices, quantized.indices)
        assert torch.equal(other.scales, quantized.scales)


def corrupted(value_type: str, tensor: str, at: tuple[int, int], to: float) -> Sparse24Quantized:
    quantized = quantized_24(6, 12, value_type)
    held = getattr(quantized, tensor)
    held[at] = torch.tensor(to).to(held.dtype) if tensor != "values" else 0
    if tensor == "values":
        held.view(torch.uint8)[at] = int(to)
    return quantized


CORRUPTIONS = {
    "indices": ("row 2, group 0", ("int8", "indices", (2, 0), 0)),
    "-128": ("value -128.0 at row 4, position 3", ("int8", "values", (4, 3), 128)),
    "NaN": ("value nan at row 4, position 3", ("float8_e4m3fn", "values", (4, 3), 0x7F)),
    "-NaN": ("value nan at row 4, position 3", ("float8_e4m3fn", "values", (4, 3), 0xFF)),
    "-8": ("value -8.0 at row 4, position 2", ("int4", "values", (4, 1), 0x18)),
    "-8, slot 1": ("value -8.0 at row 4, position 3", ("int4", "values", (4, 1), 0x81)),
    "scale 0": ("scale 0.0 at row 5, position 0", ("int8", "scales", (5, 0), 0.0)),
    "negative scale": ("scale -1.0 at row 5", ("int8", "scales", (5, 0), -1.0)),
    "infinite scale": ("scale inf at row 5", ("int4", "scales", (5, 0), torch.inf)),
    "NaN scale": ("scale nan at row 5", ("float8_e4m3fn", "scales", (5, 0), torch.nan)),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_validate_names_the_first_bad_position(case: str) -> None:
    text, how = CORRUPTIONS[case]
    quantized = corrupted(*how)
    with pytest.raises(ValueError, match=text):
        quantized.validate()
    with pytest.raises(ValueError, match=text):
        Sparse24Quantized.from_state(quantized.state())
    with pytest.raises(ValueError, match=text):
        pickle.loads(pickle.dumps(quantized))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_an_index_past_the_last_column_carries_0(value_type: str) -> None:
    quantized = quantized_24(3, 5, value_type)
    quantized.indices[1, 0] = quantized.indices[1, 0] & 15 | (1 | 3 << 2) << 4
    quantized.values.view(torch.uint8)[1, -2:] = 0
    quantized.validate()
    quantized.values.view(torch.uint8)[1, -1] = 0x11
    with pytest.raises(ValueError, match="row 1, group 1"):
        quantized.validate()


def header(*numbers: int) -> dict[str, Tensor]:
    return {"format": torch.tensor(numbers)}


WRONG_STATE: dict[str, tuple[type[Exception], str, Any]] = {
    "newer version": (ValueError, "version 2", header(2, 6, 12, 8, 3, 0)),
    "unquantised format": (ValueError, r"\[3\].*\[5\]", header(1, 6, 12)),
    "other shape": (ValueError, r"\[6, 17\]", header(1, 6, 17, 8, 3)),
    "negative shape": (ValueError, "-6", header(1, -6, 12, 8, 3)),
    "huge shape": (ValueError, "values have shape", header(1, 2**62, 2**62, 8, 3)),
    "group 0": (ValueError, "group is 0", header(1, 6, 12, 0, 3)),
    "negative group": (ValueError, "group is -8", header(1, 6, 12, -8, 3)),
    "odd group": (ValueError, "group is 7", header(1, 6, 12, 7, 3)),
    "group past a row": (ValueError, "at most 12", header(1, 6, 12, 16, 3)),
    "other group": (ValueError, "groups of 4", header(1, 6, 12, 4, 3)),
    "unknown type": (ValueError, "value type 4", header(1, 6, 12, 8, 4)),
    "type of others": (TypeError, "uint8, the format says int8", header(1, 6, 12, 12, 1)),
    "no scales": (ValueError, "'scales' is missing", {"scales": None}),
    "scales in a list": (TypeError, "list", {"scales": [[1.0]]}),
    "scales of another dtype": (TypeError, "float64", {"scales": torch.ones(6, 2).double()}),
    "scales of another shape": (ValueError, r"\[2, 6\]", {"scales": torch.ones(2, 6)}),
    "scales elsewhere": (ValueError, "meta", {"scales": torch.ones(6, 2, device="meta")}),
    "floating values": (TypeError, "float32", {"values": torch.ones(6, 3)}),
    "wide indices": (TypeError, "int64", {"indices": torch.ones(6, 2).long()}),
    "values of another shape": (ValueError, r"\[6, 6\]", {"values": torch.zeros(6, 6).byte()}),
    "all indices 255": (ValueError, "row 0, group 0", {"indices": torch.full((6, 2), 255).byte()}),
}


@pytest.mark.parametrize("case", WRONG_STATE)
def test_from_state_refuses(case: str) -> None:
    error, text, change = WRONG_STATE[case]
    state = {**quantized_24(6, 12, "int4", 8).state(), **change}
    with pytest.raises(error, match=text):
        Sparse24Quantized.from_state({k: v for k, v in state.items() if v is not None})


def test_constructor_refuses_8_bit_groups() -> None:
    quantized = quantized_24(6, 12, "int8")
    scales = torch.ones(6, 3)
    with pytest.raises(ValueError, match="int8 values in groups of 4"):
        Sparse24Quantized(quantized.values, quantized.indices, scales, (6, 12), 4)


WORDS = torch.zeros(2, 1, 5, 16, dtype=torch.int32)
WRONG_PANELS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "dtype of panels": (TypeError, "panels are torch.int64", {"panels": WORDS.long()}),
    "dtype of scales": (TypeError, "scales torch.float64", {"scales": torch.ones(20, 1).double()}),
    "words of int4": (ValueError, r"\[2, 1, 5, 16\].*\[2, 1, 3, 16\]", {"value_type": "int4"}),
    "shape of panels": (ValueError, r"\[1, 1, 5, 16\]", {"panels": WORDS[:1]}),
    "shape of scales": (ValueError, r"\[20, 2\]", {"scales": torch.ones(20, 2)}),
    "value type": (ValueError, "'int2'", {"value_type": "int2"}),
    "group": (ValueError, "groups of 4 of 12", {"group": 4}),
    "large group": (ValueError, "group is 16", {"group": 16}),
    "shape": (ValueError, "at least 1", {"shape": (0, 12)}),
    "devices": (ValueError, "meta", {"scales": torch.ones(20, 1, device="meta")}),
}


@pytest.mark.parametrize("case", WRONG_PANELS)
def test_panels_refuse_what_does_not_fit(case: str) -> None:
    error, text, change = WRONG_PANELS[case]
    given: dict[str, Any] = {"panels": WORDS, "scales": torch.ones(20, 1), "shape": (20, 12)}
    given |= {"group": 12, "value_type": "int8"}
    panels = Sparse24QuantizedPanels(**given)
    assert (panels.storage, panels.device.type) == (torch.int8, "cpu")
    with pytest.raises(error, match=text):
        Sparse24QuantizedPanels(**{**given, **change})


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_panels_hold_the_weight_exactly(value_type: str) -> None:
    for n, k in ((1, 1), (16, 32), (20, 12), (33, 75)):
        weight = quantized_24(n, k, value_type)
        panels = Sparse24QuantizedPanels.from_quantized(weight)
        back = panels.to_quantized()
        assert torch.equal(bits(back.values), bits(weight.values))
        assert torch.equal(back.indices, weight.indices)
        assert (back.shape, back.group, panels.value_type) == (
            weight.shape,
            weight.group,
            value_type,
        )
        assert torch.equal(panels.to_dense(), weight.to_dense())


@pytest.mark.parametrize("shape", [(6,), (6, 16, 1), (6.0, 16.0)], ids=str)
def test_shape_is_two_whole_numbers(shape: tuple[int, ...]) -> None:
    weight = Sparse24Quantized.from_sparse24(sparse_24(6, 16))
    with pytest.raises(TypeError, match="expected two whole numbers"):
        Sparse24Quantized(weight.values, weight.indices, weight.scales, shape, 16)  # type: ignore[arg-type]
