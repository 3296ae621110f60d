"""sparse24_linear against its plain-torch meaning: every target, dtype and kind of shape."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SHAPES, Oracle, dense_24, integers, sparse_24
from gossamer import _C, sparse24_linear
from gossamer.formats import Sparse24, Sparse24Panels
from torch import Tensor

ACTIVATIONS = (None, "relu", "gelu", "silu")
# A batch for each kind of kernel.
BATCHES = (1, 5, 40)


def both_layouts(weight: Sparse24) -> tuple[Sparse24, Sparse24Panels]:
    return weight, Sparse24Panels.from_sparse24(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(target: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    sparse = sparse_24(n, k, dtype)
    with_bias, without = Oracle(x, sparse, bias), Oracle(x, sparse)
    for weight in both_layouts(sparse):
        with_bias.check(sparse24_linear(x, weight, bias))
        without.check(sparse24_linear(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(
    target: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    dense = integers(n, k, limit=3, dtype=torch.float32)
    dense[:, 2::4] = dense[:, 1::4][:, : dense[:, 2::4].shape[1]] = 0
    dense = dense[torch.randperm(n)]
    sparse = Sparse24.from_dense(dense.to(dtype))
    x, bias = integers(m, k, limit=3, dtype=dtype), integers(n, limit=9, dtype=dtype)
    expected = (x.double() @ dense.double().t() + bias.double()).to(dtype)
    for weight in both_layouts(sparse):
        assert torch.equal(sparse24_linear(x, weight, bias), expected)


def test_float64_matches_reference(serial_target: str) -> None:
    sparse = sparse_24(9, 13, torch.float64)
    x, bias = torch.randn(6, 13, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    Oracle(x, sparse, bias).check(sparse24_linear(x, sparse, bias))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_matches_reference(
    target: str, dtype: torch.dtype, activation: str, batch: int
) -> None:
    sparse = sparse_24(37, 70, dtype)
    # From deep in the negative tail to where the activations are the identity.
    x, bias = torch.randn(batch, 70).to(dtype), torch.linspace(-40, 40, 37).to(dtype)
    oracle = Oracle(x, sparse, bias, activation)
    for weight in both_layouts(sparse):
        oracle.check(sparse24_linear(x, weight, bias, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_of_extremes(
    target: str, dtype: torch.dtype, activation: str | None, batch: int
) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 8
    extremes = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, largest, -largest, -0.0, tiny, -tiny], dtype=dtype
    )
    weight, x = Sparse24.from_dense(torch.zeros(8, 4, dtype=dtype)), torch.zeros(batch, 4)
    y = sparse24_linear(x.to(dtype), weight, extremes, activation)
    Oracle(x, weight, extremes, activation).check(y)


def test_non_finite_weights_stay_in_their_row(target: str) -> None:
    dense = dense_24(20, 40)
    dense[3, 4:8] = torch.tensor([0, torch.nan, 0, 1])
    dense[17, 36:] = torch.tensor([torch.inf, 0, -torch.inf, 0])
    sparse = Sparse24.from_dense(dense)
    for batch in BATCHES:
        x = torch.randn(batch, 40)
        x[0, 36] = 0
        oracle = Oracle(x, sparse)
        for weight in both_layouts(sparse):
            oracle.check(sparse24_linear(x, weight))


@pytest.mark.parametrize("shape", [(3, 2, 300_003), (30_001, 5, 9)], ids=str)
def test_many_features_or_rows(target: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    sparse, x = sparse_24(n, k), torch.randn(m, k)
    oracle = Oracle(x, sparse)
    for weight in both_layouts(sparse):
        oracle.check(sparse24_linear(x, weight))


def test_weight_larger_than_what_is_converted_at_once() -> None:
    # On the best target: 9 MB of panels against the 8 MiB that many rows convert together.
    sparse, x, bias = sparse_24(531, 8200), torch.randn(70, 8200), torch.randn(531)
    oracle = Oracle(x, sparse, bias)
    results = [sparse24_linear(x, weight, bias) for weight in both_layouts(sparse)]
    oracle.check(results[0])
    assert torch.equal(*results)


def test_many_outputs(target: str) -> None:
    dense = torch.zeros(20_001, 6)
    dense[:, 1], dense[:, 5] = 2.0, torch.arange(20_001) % 7
    x = integers(2, 6, limit=3, dtype=torch.float32)
    for weight in both_layouts(Sparse24.from_dense(dense)):
        assert torch.equal(sparse24_linear(x, weight), x @ dense.t())


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3), (2, 1, 3, 1, 2, 1, 2, 1)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    sparse = sparse_24(7, 10)
    x, bias = torch.randn(*leading, 10), torch.randn(7)
    oracle = Oracle(x, sparse, bias)
    for weight in both_layouts(sparse):
        y = sparse24_linear(x, weight, bias)
        assert y.shape == (*leading, 7)
        assert y.is_contiguous()
        oracle.check(y)


def strided(kind: str, m: int, k: int) -> Tensor:
    if kind == "transposed":
        return torch.randn(k, m).t()
    if kind == "every other column":
        return torch.randn(m, 2 * k)[:, ::2]
    if kind == "every other row":
        return torch.randn(2 * m, k)[::2]
    if kind == "one row repeated":
        return torch.randn(1, k).expand(m, k)
    if kind == "one number repeated":
        return torch.randn(m, 1).expand(m, k)
    if kind == "overlapping windows":
        return torch.randn(m + k).as_strided((m, k), (1, 1))
    if kind == "batch not foldable":
        return torch.randn(3, m, k).transpose(0, 1)
    if kind == "features not last in memory":
        return torch.randn(2, k, m).transpose(1, 2)
    if kind == "negated view":
        return torch._neg_view(torch.randn(m, k))
    return torch.randn(m * k + 1)[1:].view(m, k)  # off any alignment


def with_strides_kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another dtype with the same strides, which ``Tensor.to`` may change."""
    if x.is_neg():
        return torch._neg_view(x.neg().to(dtype))
    storage = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "every other column",
        "every other row",
        "one row repeated",
        "one number repeated",
        "overlapping windows",
        "batch not foldable",
        "features not last in memory",
        "negated view",
        "off alignment",
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(target: str, dtype: torch.dtype, kind: str, batch: int) -> None:
    sparse = sparse_24(20, 45, dtype)
    x = with_strides_kept(strided(kind, batch, 45), dtype)
    oracle = Oracle(x, sparse)
    for weight in both_layouts(sparse):
        y = sparse24_linear(x, weight)
        assert y.is_contiguous()
        oracle.check(y)


@pytest.mark.parametrize("batch", BATCHES)
def test_strides_of_one_column_or_no_row(target: str, batch: int) -> None:
    """torch calls these contiguous, whatever the stride of a column is."""
    column, no_rows = torch.randn(1, batch).t(), torch.randn(8, batch + 1)[:, :0].t()
    assert column.stride(1) == batch
    assert no_rows.stride(1) == batch + 1
    for x in (column, no_rows):
        sparse = sparse_24(20, x.shape[1])
        oracle = Oracle(x, sparse)
        for weight in both_layouts(sparse):
            oracle.check(sparse24_linear(x, weight))


def test_strided_columns_are_refused_at_the_border() -> None:
    sparse, out = sparse_24(6, 12), torch.full((3, 6), 7.0)
    with pytest.raises(ValueError, match=r"x has strides \[1, 3\]"):
        _C.sparse24_linear(
            out, torch.randn(12, 3).t(), sparse.values, sparse.indices, None, "none", 1
        )
    assert out.eq(7.0).all()


@pytest.mark.parametrize("tiny", ["x", "one entry of x", "weight", "one weight"])
@pytest.mark.parametrize("batch", [3, 40])
def test_floats_near_the_smallest_keep_their_bits(target: str, batch: int, tiny: str) -> None:
    """No kernel may take for zero what is far above the subnormals, nor lose a part of it."""
    x, dense = torch.randn(batch, 4), dense_24(20, 4)
    scale = 2.0**-110
    if tiny == "x":
        x *= scale
    elif tiny == "weight":
        dense *= scale
    elif tiny == "one entry of x":  # and the others meet zeros
        x[1, 2] *= scale
        dense[5:9] = torch.tensor([0.0, 0.0, 1.2345678, 0.0])
    else:
        dense[5] = torch.tensor([0.0, 1.2345678 * scale, 0.0, 0.0])
    weight = Sparse24.from_dense(dense)
    Oracle(x, weight).check(sparse24_linear(x, weight))


@pytest.mark.parametrize("batch", [3, 40])
def test_floats_near_the_largest_do_not_overflow_on_the_way(target: str, batch: int) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.full((batch, 4), largest)
    x[0] = torch.tensor([largest, -largest, 1.0, 0.0])
    weight = Sparse24.from_dense(
        torch.tensor([[0.5, 0, 0, 0.25], [-0.5, 0.25, 0, 0], [0, 0, 0.25, 0.5]])
    )
    Oracle(x, weight).check(sparse24_linear(x, weight))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("in_features", [1, 2, 3, 5, 30, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_x_goes_through_stored_positions_only(
    target: str, dtype: torch.dtype, in_features: int, batch: int, poison: float
) -> None:
    sparse = sparse_24(19, in_features, dtype)
    for column in range(0, in_features, max(1, in_features // 7)):
        x = torch.randn(batch, in_features).to(dtype)
        x[batch // 2, column] = poison
        oracle = Oracle(x, sparse)
        for weight in both_layouts(sparse):
            oracle.check(sparse24_linear(x, weight))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("in_features", [1, 3, 5, 31, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_x_is_read(
    target: str, dtype: torch.dtype, in_features: int, batch: int
) -> None:
    around = torch.full((batch + 2, in_features + 70), torch.nan, dtype=dtype)
    x = around[1:-1, 35:-35]
    x.copy_(torch.randn(batch, in_features))
    groups = (in_features + 3) // 4
    # Indices that no validation has seen: the raw op must not stray from x either.
    hostile = torch.randint(0, 256, (18, (groups + 1) // 2), dtype=torch.uint8)
    for indices in (sparse_24(18, in_features, dtype).indices, hostile):
        weight = Sparse24(torch.randn(18, 2 * groups).to(dtype), indices, (18, in_features))
        for layout in both_layouts(weight):
            assert sparse24_linear(x, layout).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 40, 100])
def test_same_result_every_time_and_for_any_thread_count(
    target: str, threads: int, dtype: torch.dtype, batch: int
) -> None:
    x = torch.randn(batch, 300).to(dtype)
    for weight in both_layouts(sparse_24(200, 300, dtype)):
        torch.set_num_threads(1)
        expected = sparse24_linear(x, weight)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(sparse24_linear(x, weight), expected)


def test_operands_need_not_be_contiguous() -> None:
    sparse = sparse_24(6, 12)
    x, bias = torch.randn(4, 12), torch.randn(12)[::2]
    values = sparse.values.t().contiguous().t()
    indices = sparse.indices.repeat(1, 2)[:, : sparse.indices.shape[1]]
    y = sparse24_linear(x, Sparse24(values, indices, sparse.shape), bias)
    Oracle(x, sparse, bias).check(y)


WEIGHT = sparse_24(6, 12)
ERRORS = {
    "0-d x": (ValueError, "0-d", lambda: sparse24_linear(torch.tensor(1.0), WEIGHT)),
    "no tensor": (TypeError, "list", lambda: sparse24_linear([1.0], WEIGHT)),  # type: ignore[arg-type]
    "features": (
        ValueError,
        "x has 11 features, the weight expects 12",
        lambda: sparse24_linear(torch.ones(3, 11), WEIGHT),
    ),
    "features in the same number of groups, panels": (
        ValueError,
        "x has 10 features, the weight expects 12",
        lambda: sparse24_linear(torch.ones(3, 10), Sparse24Panels.from_sparse24(WEIGHT)),
    ),
    "dtype of x": (
        TypeError,
        "bfloat16.*float32",
        lambda: sparse24_linear(torch.ones(3, 12).bfloat16(), WEIGHT),
    ),
    "whole numbers": (
        TypeError,
        "int64",
        lambda: sparse24_linear(torch.ones(3, 12).long(), WEIGHT),
    ),
    "16-bit panels of the other type": (
        TypeError,
        "float16.*bfloat16",
        lambda: sparse24_linear(
            torch.ones(3, 12).half(), Sparse24Panels.from_sparse24(WEIGHT.to(torch.bfloat16))
        ),
    ),
    "dtype of bias": (
        TypeError,
        "float64.*float32",
        lambda: sparse24_linear(torch.ones(3, 12), WEIGHT, torch.ones(6).double()),
    ),
    "length of bias": (
        ValueError,
        r"\[5\].*\[6\]",
        lambda: sparse24_linear(torch.ones(3, 12), WEIGHT, torch.ones(5)),
    ),
    "activation": (
        ValueError,
        "tanh",
        lambda: sparse24_linear(torch.ones(3, 12), WEIGHT, activation="tanh"),
    ),
    "dense weight": (
        TypeError,
        "Tensor.*from_dense",
        lambda: sparse24_linear(torch.ones(3, 12), torch.ones(6, 12)),  # type: ignore[arg-type]
    ),
    "device of x": (
        ValueError,
        "meta.*cpu",
        lambda: sparse24_linear(torch.ones(3, 12, device="meta"), WEIGHT),
    ),
    "device of the weight": (
        ValueError,
        "cpu.*meta",
        lambda: sparse24_linear(torch.ones(3, 12), WEIGHT.to("meta")),
    ),
    "device of bias": (
        ValueError,
        "cpu.*meta",
        lambda: sparse24_linear(torch.ones(3, 12), WEIGHT, torch.ones(6, device="meta")),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_errors_with_values(case: str) -> None:
    error, text, call = ERRORS[case]
    with pytest.raises(error, match=text):
        call()


def test_meta_gives_the_shape() -> None:
    for weight in (WEIGHT.to("meta"), Sparse24Panels.from_sparse24(WEIGHT.to("meta"))):
        y = sparse24_linear(torch.ones(2, 3, 12, device="meta"), weight, activation="gelu")
        assert y.is_meta
        assert y.shape == (2, 3, 6)


def test_unknown_target_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sse9.*serial"):
        _C.force_target("sse9")
