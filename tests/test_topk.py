"""k-sparse codes: every kernel against plain torch, derivatives, compilers, mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SumOracle
from gossamer import _C, reference, topk_decode, topk_encode
from gossamer.nn import TopKAutoencoder
from gossamer.ops import topk, topk_dense, topk_gradient
from gossamer.ops.topk import _decode_cuda
from gossamer.ops.topk_dense import dense_wins
from gossamer.ops.topk_gradient import _values_cuda, _weight_cuda
from torch import Tensor

ops = torch.ops.gossamer


@dataclass(frozen=True)
class Case:
    tokens: int
    k: int
    width: int
    d: int

    def __str__(self) -> str:
        return f"{self.tokens}-{self.k}-{self.width}-{self.d}"

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """values, indices, weight and bias; indices repeat, and some rows are never named."""
        indices = torch.randint(0, self.width, (self.tokens, self.k)).square() // self.width
        values, weight = torch.randn(self.tokens, self.k), torch.randn(self.width, self.d)
        return values.to(dtype), indices, weight.to(dtype), torch.randn(self.d).to(dtype)


class Once(Case):
    """A code names no row twice."""

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, _, *rest = super().operands(dtype)
        return values, torch.rand(self.tokens, self.width).argsort()[:, : self.k], *rest


CASES = (
    Case(1, 1, 1, 1),
    Case(0, 3, 5, 7),
    Case(4, 0, 5, 9),  # empty codes: the bias alone
    Case(3, 5, 4, 17),  # k above width, a column past a register
    Case(2, 7, 30, 300),  # threads share the columns
    Case(65, 12, 90, 129),  # and the tokens
    Case(6, 60, 60, 1000),  # k = width
    Case(3, 20, 8, 2100),  # two strips of columns, several groups of rows
)
# Past L2 with each row named often, so that tiles are copied: of one block, and of several.
TILED = (Case(2300, 20, 3000, 400), Case(3000, 90, 20000, 83))


NATIVE = (topk_decode, ops.topk_values, ops.topk_weight)


def check_all(case: Case, dtype: torch.dtype, functions: tuple[Any, ...] = NATIVE) -> None:
    """Decode and both gradients against float64."""
    decode, values_of, weight_of = functions
    values, indices, weight, bias = case.operands(dtype)
    given = bias if case.d % 2 else None
    dy = torch.randn(case.tokens, case.d).to(dtype)
    narrow = indices.int() if case.k % 2 else indices

    v, w, y64 = values.double(), weight.double(), dy.double()
    b = None if given is None else given.double()
    wanted = reference.topk_decode(v, indices, w, b)
    size = reference.topk_decode(v.abs(), indices, w.abs(), None if b is None else b.abs())
    SumOracle(wanted, size, case.k + 1, dtype).check(decode(values, narrow, weight, given))

    def at_rows(dy: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("td,tjd->tj", dy, w[indices])

    got = values_of(dy, narrow, weight)
    SumOracle(at_rows(y64, w), at_rows(y64.abs(), w.abs()), case.d, dtype).check(got)

    def by_row(v: Tensor, dy: Tensor) -> Tensor:
        codes = v.new_zeros(case.tokens, case.width).scatter_add_(1, indices, v)
        return codes.t() @ dy

    got = weight_of(values, narrow, dy, case.width)
    most = int(torch.bincount(indices.flatten(), minlength=1).max()) if indices.numel() else 0
    SumOracle(by_row(v, y64), by_row(v.abs(), y64.abs()), most + 1, dtype).check(got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_plain_torch(target: str, dtype: torch.dtype) -> None:
    for case in CASES:
        check_all(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_a_gpu_runs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for case in CASES:
        check_all(case, dtype, (_decode_cuda, _values_cuda, _weight_cuda))
    monkeypatch.setattr("gossamer.ops.topk_gradient._GATHERED_BYTES", 80000)
    check_all(CASES[5], dtype, (_decode_cuda, _values_cuda, _weight_cuda))


DENSE = Once(21, 32, 67, 45)  # so large a share of the rows that torch's product is taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_products(
    monkeypatch: pytest.MonkeyPatch, cpu_target: str, dtype: torch.dtype
) -> None:
    """They are taken where they win, and leave to the kernels what is none of theirs."""
    taken: list[Tensor | None] = []
    sizes = (DENSE.tokens, DENSE.k, DENSE.width)
    for module, name in ((topk, "dense_decode"), (topk_gradient, "dense_weight")):
        dense = getattr(topk_dense, name)

        def recorded(*operands: Any, dense: Any = dense) -> Tensor | None:
            taken.append(dense(*operands))
            return taken[-1]

        monkeypatch.setattr(module, name, recorded)
    values, indices, weight, bias = DENSE.operands(dtype)
    dy = torch.randn(DENSE.tokens, DENSE.d).to(dtype)
    for case in (DENSE, Once(*sizes, 0), Once(20, 30, 30, 8)):
        check_all(case, dtype)
    wins = dense_wins("decode", dtype, sizes[:2], sizes[2], cpu_target)
    assert [t is not None for t in taken] == [wins] * len(taken)
    assert len(taken) == 6 * wins

    taken.clear()
    repeated, infinite, nan = indices.clone(), weight.clone(), dy.clone()
    repeated[3, :2] = repeated[3, 0]
    infinite[5, 7], nan[4, 1] = float("inf"), float("nan")
    calls = (
        lambda: topk_decode(values, repeated, weight, bias),
        lambda: topk_decode(values, indices, infinite, bias),
        lambda: ops.topk_weight(values, repeated, dy, DENSE.width),
        lambda: ops.topk_weight(values, indices, nan, DENSE.width),
        lambda: ops.topk_values(dy, indices, infinite),
    )
    got = [call() for call in calls]
    assert taken == [None] * (4 * wins)
    for module in (topk, topk_gradient):
        monkeypatch.setattr(module, "dense_wins", lambda *_: False)
    for call, found in zip(calls, got, strict=True):
        torch.testing.assert_close(found, call(), equal_nan=True)
    for wild in (indices + 40, indices - 40):
        with pytest.raises(
            ValueError, match=r"topk_values: indices\[\d+, \d+\] is -?\d+, expected"
        ):
            topk_dense.dense_values(dy, wild, weight)
        with pytest.raises(
            ValueError, match=r"topk_decode: indices\[\d+, \d+\] is -?\d+, expected"
        ):
            topk_dense.dense_decode(values, wild, weight, None)


def test_where_the_dense_product_wins() -> None:
    def least(which: str, dtype: torch.dtype, target: str, tokens: int = 512) -> int | None:
        wins = (k for k in range(1001) if dense_wins(which, dtype, (tokens, k), 1000, target))
        return next(wins, None)

    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    assert [least("decode", d, "amx_bf16") for d in DTYPES] == [400, 170, 300]
    assert least("values", float32, "avx2") == 170
    assert least("weight", bfloat16, "amx_bf16") == 170
    for which, dtype, target, tokens in (
        ("decode", bfloat16, "avx512_bf16", 512),  # whose dense products nobody has measured
        ("decode", float32, "avx512", 15),
        ("decode", float32, "serial", 512),
        ("decode", torch.float64, "amx_bf16", 512),
        ("decode", bfloat16, "cuda", 4096),
        ("values", bfloat16, "cuda", 511),
    ):
        assert least(which, dtype, target, tokens) is None
    assert least("values", float16, "cuda") == 20
    assert least("values", float32, "cuda") == 100
    assert not dense_wins("decode", float32, (512, 1001), 1000, "avx2")  # some row twice
    assert not dense_wins("decode", float32, (512, 1), 0, "avx2")


def test_dense_product_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(520, 9, 40, 12)
    monkeypatch.setattr(topk_dense, "DENSE_BYTES", 7000)
    for dtype in DTYPES:
        check_all(case, dtype, (_decode_cuda, _values_cuda, _weight_cuda))
    dy, weight = torch.randn(520, 12), torch.randn(40, 12)
    indices = torch.randint(-1, 41, (520, 9))
    outside = (indices < 0) | (indices == 40)
    assert torch.equal(_values_cuda(dy, indices, weight).isnan(), outside)


def test_float64(serial_target: str) -> None:
    check_all(CASES[4], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_match_and_threads_change_nothing(
    cpu_target: str, threads: int, dtype: torch.dtype
) -> None:
    if cpu_target == "serial":
        return
    for case in (*TILED, *CASES[4:]):
        values, indices, weight, bias = case.operands(dtype)
        size = reference.topk_decode(values.double().abs(), indices, weight.double().abs())
        wanted = reference.topk_decode(values.double(), indices, weight.double(), bias.double())
        dy = torch.randn(case.tokens, case.d).to(dtype)
        before: list[Tensor] = []
        for team in (1, 3, 8):
            torch.set_num_threads(team)
            got = [
                topk_decode(values, indices, weight, bias),
                ops.topk_values(dy, indices, weight),
                ops.topk_weight(values, indices, dy, case.width),
            ]
            before = before or got
            for a, b in zip(got, before, strict=True):
                assert torch.equal(a, b), (case, team)
        SumOracle(wanted, size + bias.double().abs(), case.k + 1, dtype).check(before[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_selection_is_a_stable_sort(cpu_target: str, dtype: torch.dtype) -> None:
    for rows, width, k in (
        (1, 1, 1),
        (5, 7, 7),
        (0, 9, 2),
        (3, 1000, 1),
        (9, 513, 64),
        (2, 90, 90),
    ):
        dense = torch.randint(-4, 5, (rows, width)).to(dtype)  # of many equal ones
        dense[torch.rand_like(dense) < 0.1] = -0.0
        for special in (float("nan"), float("inf"), -float("inf"), 1e-30):
            dense[torch.rand_like(dense) < 0.02] = special
        if rows == 3:
            dense[0] = float("nan")
            dense[1] = torch.arange(width)  # each one above all before it
        values, indices = dense.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        for relu in (False, True):
            _C.topk_select(values, indices, dense, relu, 2)
            wanted, order = dense.sort(dim=-1, descending=True, stable=True)
            wanted = wanted.relu() if relu else wanted
            assert torch.equal(indices, order[:, :k]), (rows, width, k)
            torch.testing.assert_close(values, wanted[:, :k], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("relu", [False, True])
def test_encode_is_topk_of_the_dense_layer(target: str, relu: bool) -> None:
    for shape, k in (((9, 20), 4), ((20,), 1), ((2, 3, 20), 33), ((0, 20), 2)):
        x, weight, bias = torch.randn(shape), torch.randn(33, 20), torch.randn(33)
        given = bias if k % 2 else None
        values, indices = topk_encode(x, weight, given, k=k, relu=relu)
        dense = F.linear(x, weight, given)
        wanted = dense.topk(k).values
        torch.testing.assert_close(values, wanted.relu() if relu else wanted)
        assert values.shape == indices.shape == (*shape[:-1], k)
        at = dense.gather(-1, indices)
        torch.testing.assert_close(values, at.relu() if relu else at)


def test_encode_takes_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(50, 8), torch.randn(40, 8), torch.randn(40)
    whole = topk_encode(x, weight, bias, 5)
    monkeypatch.setattr("gossamer.ops.topk_encoder._CPU_BYTES", 7 * 40 * 4)
    parts = topk_encode(x, weight, bias, k=5)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_what_is_no_number_stays_where_it_is(target: str) -> None:
    values, indices, weight, _ = Case(5, 6, 20, 37).operands(torch.float32)
    clean = topk_decode(values, indices, weight)
    weight[int(indices[2, 3])] = float("inf")
    values[2, 3] = 0.0  # 0 * inf, as a stored entry has it
    y = topk_decode(values, indices, weight)
    named = (indices == indices[2, 3]).any(1)
    assert torch.equal(y[~named], clean[~named])
    assert not y[named].isfinite().any()


def test_any_strides_and_leading_dimensions(target: str) -> None:
    values, indices, weight, bias = Case(6, 4, 11, 21).operands(torch.float32)
    y = topk_decode(values, indices, weight, bias)
    wide = torch.full((11, 50), float("nan"))
    wide[:, 3:24] = weight
    for w in (wide[:, 3:24], weight.t().contiguous().t()):
        got = topk_decode(values.t().contiguous().t(), indices.t().contiguous().t(), w, bias)
        assert torch.equal(got, y)
    assert torch.equal(topk_decode(values[1], indices[1], weight, bias), y[1])
    shape = (2, 3, 4)
    got = topk_decode(values.view(shape), indices.view(shape), weight, bias)
    assert torch.equal(got, y.view(2, 3, 21))


def test_derivatives(serial_target: str) -> None:
    values, indices, weight, bias = Case(3, 4, 6, 5).operands(torch.float64)
    operands = tuple(t.requires_grad_() for t in (values, weight, bias))
    assert torch.autograd.gradcheck(lambda v, w, b: topk_decode(v, indices, w, b), operands)
    assert torch.autograd.gradgradcheck(lambda v, w, b: topk_decode(v, indices, w, b), operands)
    x, encoder = torch.randn(3, 5).double(), torch.randn(6, 5).double()
    operands = tuple(t.requires_grad_() for t in (x, encoder, torch.randn(6).double()))
    for relu in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, w, b, relu=relu: topk_encode(x, w, b, k=3, relu=relu)[0], operands
        )
    assert torch.autograd.gradgradcheck(lambda x, w, b: topk_encode(x, w, b, k=3)[0], operands)


def dense_autoencoder(model: TopKAutoencoder, x: Tensor) -> Tensor:
    """The same in plain torch, of scattered codes."""
    z = F.linear(x - model.decoder_bias, model.encoder_weight, model.encoder_bias)
    values, indices = z.topk(model.k)
    codes = torch.zeros_like(z).scatter(-1, indices, values.relu())
    return codes @ model.decoder_weight + model.decoder_bias


def check_autoencoder() -> TopKAutoencoder:
    model, x = TopKAutoencoder(16, 100, 5), torch.randn(30, 16)
    torch.nn.init.normal_(model.encoder_bias)
    torch.nn.init.normal_(model.decoder_bias)
    parameters = list(model.parameters())
    y, wanted = model(x), dense_autoencoder(model, x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(
        torch.autograd.grad((y - x).square().sum(), parameters),
        torch.autograd.grad((wanted - x).square().sum(), parameters),
        rtol=1e-4,
        atol=1e-4,
    )
    return model


def test_autoencoder_is_the_dense_one(target: str) -> None:
    model = check_autoencoder()
    assert "d_model=16, width=100, k=5" in repr(model)
    with pytest.raises(ValueError, match="k is 101"):
        TopKAutoencoder(16, 100, 101)
    with pytest.raises(TypeError, match=r"TopKAutoencoder: .*4\.5, expected a whole number"):
        TopKAutoencoder(16, 100, 4.5)  # type: ignore[arg-type]


def test_decoder_of_float16_is_normalized() -> None:
    model = TopKAutoencoder(8, 4, 2, dtype=torch.float16)
    with torch.no_grad():
        model.decoder_weight[0] = 0
        model.decoder_weight[1] = 60000.0  # 8 of them are longer than the type counts
    model.normalize_decoder()
    lengths = model.decoder_weight.detach().float().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([0.0, 1, 1, 1]), rtol=2e-3, atol=0)


def test_autoencoder_learns(threads: int) -> None:
    """Sums of 3 of 24 directions in 12 dimensions are found again."""
    torch.set_num_threads(1)  # a team would wait at each of many small products
    directions = F.normalize(torch.randn(24, 12), dim=-1)
    model = TopKAutoencoder(12, 48, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        codes = torch.zeros(256, 24).scatter(1, torch.rand(256, 24).topk(3).indices, 1.0)
        x = codes @ directions
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.normalize_decoder()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.35 * losses[0]
    torch.testing.assert_close(model.decoder_weight.norm(dim=-1), torch.ones(48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, x = TopKAutoencoder(16, 32, 4), torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_opcheck() -> None:
    values, indices, weight, bias = Case(3, 4, 6, 5).operands(torch.float32)
    torch.library.opcheck(ops.topk_decode, (values, indices.int(), weight, None))
    values, weight, bias = (t.requires_grad_() for t in (values, weight, bias))
    dy = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(ops.topk_decode, (values, indices, weight, bias))
    torch.library.opcheck(ops.topk_encode, (dy, weight, torch.randn(6), 3, True))
    torch.library.opcheck(ops.topk_values, (dy, indices, weight))
    torch.library.opcheck(ops.topk_weight, (values, indices, dy, 6))


def test_compiled_training_matches_eager() -> None:
    torch._dynamo.reset()
    model = TopKAutoencoder(16, 32, 4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters: list[Any] = list(model.parameters())
    for tokens in (7, 20):
        x = torch.randn(tokens, 16)
        wanted, got = model(x), compiled(x)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(wanted.square().sum(), parameters),
        )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients() -> None:
    values, indices, weight, _ = Case(4, 3, 6, 5).operands(torch.float32)

    def loss(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return topk_decode(values, indices, weight).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, values, indices)
    for t in range(4):
        w = weight.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(w, values[t], indices[t]), w)
        torch.testing.assert_close(got[t], wanted)


VALUES, INDICES, WEIGHT = (
    torch.randn(3, 2),
    torch.tensor([[0, 1], [3, 2], [1, 1]]),
    torch.randn(4, 5),
)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"indices": INDICES + 1}, ValueError, r"indices\[1, 0\] is 4, expected 0 to 3"),
        ({"indices": (INDICES - 1).int()}, ValueError, r"indices\[0, 0\] is -1"),
        ({"indices": INDICES.float()}, TypeError, "float32, expected int32 or int64"),
        ({"indices": INDICES[:2]}, ValueError, r"\[3, 2\] and indices \[2, 2\]"),
        ({"values": VALUES.double()}, TypeError, "float64"),
        ({"weight": WEIGHT[0]}, ValueError, r"shape \[5\]"),
        ({"weight": WEIGHT[:0]}, ValueError, r"indices\[0, 0\] is 0, expected 0 to -1"),
        ({"bias": torch.zeros(4)}, ValueError, r"shape \[4\], expected \[5\]"),
        ({"values": VALUES.int(), "weight": WEIGHT.int()}, TypeError, "int32"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "meta"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_decode_mistakes(
    change: dict[str, Any], error: type[Exception], text: str, gradient: bool
) -> None:
    given = {"values": VALUES, "indices": INDICES, "weight": WEIGHT} | change
    if gradient and given["values"].is_floating_point():
        given["values"] = given["values"].clone().requires_grad_()
    with pytest.raises(error, match=text):
        topk_decode(**given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": 0}, ValueError, "k is 0, expected 1 to 4"),
        ({"k": None}, TypeError, "k is None, expected a whole number"),
        ({"k": 5}, ValueError, "k is 5, expected 1 to 4"),
        ({"k": 2.0}, TypeError, "k is 2.0, expected a whole number"),
        ({"x": torch.randn(3, 6)}, ValueError, "6 features, the weight expects 5"),
        ({"x": torch.randn(3, 5).half()}, TypeError, "float16"),
        ({"bias": torch.zeros(5)}, ValueError, r"shape \[5\], expected \[4\]"),
        ({"weight": WEIGHT[0]}, ValueError, r"shape \[5\]"),
    ],
)
def test_encode_mistakes(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        topk_encode(**{"x": torch.randn(3, 5), "weight": WEIGHT, "k": 2} | change)
