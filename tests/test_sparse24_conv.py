"""sparse24_conv by its own kernels: against torch's dense convolution, on every target."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SumOracle, bits, integers
from conv_cases import CASES, CONVS, LAST, ConvCase, typical
from gossamer import _C, reference
from gossamer.formats import Sparse24Conv, Sparse24ConvPanels
from gossamer.nn import SparseConv2d
from gossamer.ops import sparse24_conv
from gossamer.ops.sparse24_conv import sparse24_conv_choice
from gossamer.prune import magnitude_24
from torch import Tensor, nn

ops = torch.ops.gossamer
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Skipping serialization"),
]
PIXELS = 4096  # from so many on the kernel reads the portable weight too


def weight_of(case: ConvCase) -> Sparse24Conv:
    dense = magnitude_24(torch.randn(case.shape), dim=1)
    dense[torch.rand_like(dense) < 0.1] = -0.0
    return Sparse24Conv.from_dense(dense.to(case.dtype), case.groups)


def pairs_of(weight: Sparse24Conv) -> Sparse24ConvPanels:
    return Sparse24ConvPanels.from_sparse24(weight)


def oracle(
    case: ConvCase, x: Tensor, weight: Sparse24Conv, bias: Tensor | None, act: str | None = None
) -> SumOracle:
    exact = [None if t is None else t.double() for t in (x, weight.to_dense(), bias)]
    size = case.dense(*(None if t is None else t.abs() for t in exact))
    y = reference.activate(case.dense(*exact), act)
    return SumOracle(y, 1.2 * size, exact[1][0].numel(), case.dtype)


@pytest.mark.parametrize("case", CASES[::2], ids=map(str, range(0, len(CASES), 2)))
def test_matches_dense(blocksparse_target: str, case: ConvCase) -> None:
    weight, x = weight_of(case), case.x()
    bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
    y = sparse24_conv(x, pairs_of(weight), bias, **case.geometry)
    oracle(case, x, weight, bias).check(y)
    last = LAST.get(x.dim()) if not x.is_contiguous() else None
    assert y.is_contiguous(memory_format=last or torch.contiguous_format)
    if blocksparse_target == "serial":
        assert torch.equal(sparse24_conv(x, weight, bias, **case.geometry), y)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_passes_blocks_and_tiles(
    blocksparse_target: str, dtype: torch.dtype, act: str
) -> None:
    for group_in, group_out, groups, last in ((70, 33, 1, True), (64, 16, 2, False)):
        case = typical(
            dtype=dtype, group_in=group_in, group_out=group_out, groups=groups,
            channels_last=last, extents=(19, 23),
        )  # fmt: skip
        weight, x = weight_of(case), case.x()
        bias = torch.linspace(-9, 9, case.shape[0]).to(dtype)
        y = sparse24_conv(x, pairs_of(weight), bias, **case.geometry, activation=act)
        oracle(case, x, weight, bias, act).check(y)


def test_residual(blocksparse_target: str) -> None:
    for case in (*CASES[1:120:3], *(typical(dtype=dtype, group_in=70) for dtype in DTYPES)):
        weight, x = weight_of(case), case.x()
        bias = torch.randn(case.shape[0]).to(case.dtype) if case.bias else None
        product = oracle(case, x, weight, bias)
        residual = torch.randn(product.y.shape).to(case.dtype)
        y = sparse24_conv(x, pairs_of(weight), bias, **case.geometry, residual=residual)
        size = case.dense(
            x.double().abs(), weight.to_dense().double().abs(),
            None if bias is None else bias.double().abs(),
        ) + residual.double().abs()  # fmt: skip
        exact = product.y + residual.double()
        SumOracle(exact, size, weight.to_dense()[0].numel(), case.dtype).check(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(blocksparse_target: str, dtype: torch.dtype) -> None:
    case = typical(dtype=dtype, group_in=40)
    dense = magnitude_24(integers(*case.shape, limit=3, dtype=dtype), dim=1)
    x = integers(*case.x().shape, limit=3, dtype=dtype)
    y = sparse24_conv(x, pairs_of(Sparse24Conv.from_dense(dense)), **case.geometry)
    assert torch.equal(y, case.dense(x.double(), dense.double(), None).to(dtype))


def weight_keeping(*outputs: tuple[int, int]) -> Tensor:
    """[16 * len(outputs), 64, 1, 1], in turn with these two of every four channels."""
    dense = torch.zeros(16 * len(outputs), 16, 4)
    for i, kept in enumerate(outputs):
        dense[i :: len(outputs), :, kept] = torch.randn(16, 16, 2)
    return dense.view(-1, 64, 1, 1)


def test_outputs_that_share_all_or_nothing(blocksparse_target: str) -> None:
    for outputs in ([(0, 1)], [(0, 1), (2, 3)], [(0, 1), (1, 2), (2, 3)]):
        dense, x = weight_keeping(*outputs), torch.randn(2, 64, 9, 9)
        weight = Sparse24Conv.from_dense(dense)
        torch.testing.assert_close(sparse24_conv(x, pairs_of(weight)), F.conv2d(x, dense))
    # One that keeps what nobody else does leaves its partner's steps with columns of zeros.
    dense = weight_keeping((0, 1))
    dense[3] = weight_keeping((2, 3))[3]
    weight = Sparse24Conv.from_dense(dense)
    torch.testing.assert_close(sparse24_conv(x, pairs_of(weight)), F.conv2d(x, dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_hold_the_same_weight(dtype: torch.dtype) -> None:
    for case in CASES[::10]:
        weight = weight_of(ConvCase(**{**vars(case), "dtype": dtype}))
        back = pairs_of(weight).to_sparse24()
        assert torch.equal(bits(back.values), bits(weight.values))
        assert torch.equal(back.indices, weight.indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_x_goes_through_stored_positions_only(
    blocksparse_target: str, dtype: torch.dtype, poison: float
) -> None:
    case = typical(dtype=dtype, groups=2, group_in=9, group_out=9)
    weight, x = weight_of(case), case.x()
    x[1, 4, 3, 3] = x[0, 12, 0, 0] = poison
    stored = Sparse24Conv(torch.ones_like(weight.values), weight.indices, case.shape, 2).to_dense()
    met = case.dense((~x.isfinite()).double(), stored.double(), None) > 0
    y = sparse24_conv(x, pairs_of(weight), **case.geometry)
    assert met.any()
    assert torch.equal(~y.isfinite(), met)
    clean = sparse24_conv(x.nan_to_num(0, 0, 0), pairs_of(weight), **case.geometry)
    assert torch.equal(y[~met], clean[~met])


@pytest.mark.parametrize("last", [False, True])
def test_threads_and_packing_change_no_bit(
    blocksparse_target: str, threads: int, last: bool
) -> None:
    case = typical(
        batch=3, group_in=64, group_out=60, extents=(37, 41), channels_last=last, bias=True
    )
    weight, x, bias = weight_of(case), case.x(), torch.randn(60)
    assert x.numel() // 64 >= PIXELS
    assert sparse24_conv_choice(x.shape, weight, **case.geometry)["kernel"] != "dense"
    expected = sparse24_conv(x, weight, bias, **case.geometry)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for given, part in ((x, slice(None)), (x[:1], slice(1))):
            y = sparse24_conv(given, pairs_of(weight), bias, **case.geometry)
            assert torch.equal(y, expected[part])


def test_strided_x_and_empty_extents(blocksparse_target: str) -> None:
    case = typical(channels_last=False)
    weight, x = weight_of(case), torch.randn(2, 19, 9, 14)[..., ::2]
    y = sparse24_conv(x, pairs_of(weight), **case.geometry)
    assert torch.equal(y, sparse24_conv(x.contiguous(), pairs_of(weight), **case.geometry))
    x = torch.ones(2, 19, 0, 5)
    y = sparse24_conv(x, pairs_of(weight), torch.ones(21), padding=(2, 1))
    assert torch.equal(y, torch.ones(2, 21, 2, 5))


def test_choice_says_which_kernel_and_why(blocksparse_target: str) -> None:
    weight = weight_of(typical(group_in=64, group_out=64))
    pairs, many, few = pairs_of(weight), (8, 64, 28, 28), (1, 64, 28, 28)
    vectors = blocksparse_target != "serial"
    for shape, held, kernel in (
        (many, weight, "pairs"), (few, weight, "dense"), (many, pairs, "pairs"),
        (few, pairs, "pairs"),
    ):  # fmt: skip
        chosen = sparse24_conv_choice(shape, held, padding=1)
        assert chosen["kernel"] == (kernel if vectors else "serial")
        own = min(blocksparse_target, "avx512", key=_C.targets_built().index)
        assert chosen["target"] == own
        assert chosen["why"]
        assert ("strip_rows" in chosen) == (chosen["kernel"] == "pairs")
    depthwise = Sparse24Conv.from_dense(torch.randn(64, 1, 3, 3), 64)
    kernel = sparse24_conv_choice(many, depthwise)["kernel"]
    assert kernel == ("dense" if vectors else "serial")
    double = sparse24_conv_choice(many, weight.to(torch.float64))
    assert (double["kernel"], double["target"]) == ("serial", "serial")
    with pytest.raises(ValueError, match="64 channels"):
        sparse24_conv_choice((1, 65, 9, 9), weight)


def test_bfloat16_is_dense_where_cores_multiply_it(cpu_target: str) -> None:
    weight = weight_of(typical(group_in=64, group_out=64, dtype=torch.bfloat16))
    kernel = sparse24_conv_choice((8, 64, 28, 28), weight)["kernel"]
    names = _C.targets_built()
    expected = "pairs" if names.index(cpu_target) < names.index("avx512_bf16") else "dense"
    assert kernel == ("serial" if cpu_target == "serial" else expected)
    x = torch.randn(8, 64, 28, 28).bfloat16()
    torch.testing.assert_close(
        sparse24_conv(x, weight), F.conv2d(x, weight.to_dense()), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_that_torch_misreads(dtype: torch.dtype, channels_last: bool) -> None:
    # oneDNN's tiles read memory beside x where a stride has one output, or only padding is seen.
    junk = [torch.full((300_000,), 1e38) for _ in range(4)]
    del junk
    for extents, kernel, stride, padding in (
        ((10, 5), (1, 5), (1, 2), (2, 0)),
        ((8, 3), (5, 5), (1, 2), (1, 1)),
        ((6, 1), (1, 2), (1, 20), (1, 4)),
        ((1,), (1,), (3,), (2,)),
        ((2,), (3,), (3,), (2,)),
        ((4, 1), (2, 1), (3, 2), (0, 5)),
        ((1, 1), (1, 5), (2, 2), (0, 2)),
        ((5, 5, 3), (3, 3, 2), (2, 1, 2), (1, 0, 0)),
        ((1, 11, 3), (5, 2, 3), (1, 1, 1), (2, 0, 0)),
        ((1, 10, 1), (1, 5, 1), (1, 2, 3), (0, 0, 1)),
    ):
        case = typical(
            group_in=5, groups=3, kernel=kernel, extents=extents, stride=stride, padding=padding,
            dilation=(1,) * len(kernel), dtype=dtype, channels_last=channels_last,
        )  # fmt: skip
        weight, x = weight_of(case), case.x()
        y = sparse24_conv(x, weight, **case.geometry)
        oracle(case, x, weight, None).check(y)
        exact, dy = weight.to(torch.float64), torch.randn_like(y)
        want = _dvalues(exact, x.double(), dy.double(), case)
        error = (_dvalues(weight, x, dy, case) - want).abs().max()
        assert error <= 2.0**-6 * want.abs().max()


def _dvalues(weight: Sparse24Conv, x: Tensor, dy: Tensor, case: ConvCase) -> Tensor:
    y = sparse24_conv(x, replace(weight, values=weight.values.requires_grad_()), **case.geometry)
    return torch.autograd.grad(y, weight.values, dy)[0]


def test_derivatives(serial_target: str) -> None:
    held = weight_of(typical(groups=2, group_in=3, group_out=2, kernel=(3, 2), dtype=torch.float64))

    def conv(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = Sparse24Conv(values, held.indices, held.shape, 2)
        return sparse24_conv(x, weight, bias, 2, 1, activation="gelu")

    operands = (torch.randn(1, 6, 2, 2).double(), held.values, torch.randn(4).double())
    operands = tuple(t.requires_grad_() for t in operands)
    assert torch.autograd.gradcheck(conv, operands)
    assert torch.autograd.gradgradcheck(conv, operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_dense_layer(
    blocksparse_target: str, dtype: torch.dtype
) -> None:
    case = typical(dtype=dtype)
    weight, x, bias = weight_of(case), case.x().requires_grad_(), torch.randn(21).to(dtype)
    operands = (x, weight.values.requires_grad_(), bias.requires_grad_())
    y = sparse24_conv(x, weight, bias, **case.geometry)
    dy = torch.randn_like(y)
    dx, dvalues, db = torch.autograd.grad(y, operands, dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight.to_dense(), bias)]
    want = torch.autograd.grad(case.dense(*exact), exact, dy.double())
    stored = Sparse24Conv(torch.ones_like(dvalues), weight.indices, case.shape).to_dense()
    got = (dx, Sparse24Conv(dvalues, weight.indices, case.shape).to_dense(), db)
    for ours, theirs in zip(got, (want[0], want[1] * stored, want[2]), strict=True):
        rough = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
        torch.testing.assert_close(ours.double(), theirs, rtol=rough, atol=rough * 4)
    y = sparse24_conv(x, pairs_of(weight), **case.geometry)
    (through_pairs,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(through_pairs, dx)


def layer_and_x() -> tuple[SparseConv2d, Tensor]:
    layer = SparseConv2d.from_dense(nn.Conv2d(64, 48, 3, padding=1), prune="magnitude").eval()
    return layer, torch.randn(2, 64, 9, 8)


def test_packed_layers(blocksparse_target: str) -> None:
    layer, x = layer_and_x()
    expected, state = layer.to_dense()(x), layer.state_dict()
    if blocksparse_target == "serial":
        assert not layer.pack().packed
        return
    assert layer.pack().packed
    assert isinstance(layer.weight, Sparse24ConvPanels)
    assert "packed=True" in repr(layer)
    torch.testing.assert_close(layer(x), expected)
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer_and_x()[0].pack())
    others[2].load_state_dict(state)
    for other in others:
        assert other.packed
        assert torch.equal(other(x), layer(x))
        assert all(torch.equal(other.state_dict()[key], state[key]) for key in state)
    half = copy.deepcopy(layer).half()
    assert half.packed
    torch.testing.assert_close(half(x.half()), half.to_dense()(x.half()), rtol=1e-2, atol=1e-2)
    assert not copy.deepcopy(layer).to("meta").packed
    layer.train()
    with pytest.raises(RuntimeError, match=r"unpack\(\)"):
        layer(x)
    assert torch.equal(layer.unpack().values, state["values"])
    assert layer(x).requires_grad


def test_emptied_pairs_are_filled_by_a_checkpoint() -> None:
    layer, x = SparseConv2d(64, 64, 3).pack().eval(), torch.randn(1, 64, 5, 6)
    expected, state = layer(x), layer.state_dict()
    layer.to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(layer(x), expected)


def test_compilers() -> None:
    layer, x = layer_and_x()
    weight = layer.weight
    geometry: tuple[Any, ...] = (weight.shape, 1, (1, 1), (1, 1), (1, 1), "gelu")
    values, bias = weight.values.detach().clone(), torch.randn(48)
    for stored, indices in (
        (values.requires_grad_(), weight.indices),
        (pairs_of(weight).panels, None),
    ):
        for given in (x, x.to(memory_format=torch.channels_last)):
            args = (given.clone().requires_grad_(), stored, indices, bias, None, *geometry)
            torch.library.opcheck(ops.sparse24_conv, args)
    args = (x, pairs_of(weight).panels, None, bias, torch.randn(2, 48, 9, 8), *geometry)
    torch.library.opcheck(ops.sparse24_conv, args)
    torch.library.opcheck(
        ops.sparse24_conv_from_pairs, (pairs_of(weight).panels, weight.shape, 1, torch.float32)
    )
    for held in (layer, copy.deepcopy(layer).pack()):
        torch._dynamo.reset()
        compiled = torch.compile(held, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (2, 3):
            given = torch.randn(batch, 64, 9, 8, requires_grad=True)
            expected, got = held(given), compiled(given)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(
                torch.autograd.grad(got.sum(), given), torch.autograd.grad(expected.sum(), given)
            )


def test_autocast_and_vmap() -> None:
    layer, x = layer_and_x()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.pack()(x).dtype == torch.bfloat16
    layer.unpack()

    def loss(values: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values}, (x,)).square().sum()

    with pytest.warns(UserWarning, match="performance drop"):
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.values, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(per_sample.sum(0), layer.values.grad, rtol=1e-4, atol=1e-4)


def test_pairs_that_are_wrong_lead_nowhere() -> None:
    weight = weight_of(typical(group_in=64, group_out=32))
    pairs, x = pairs_of(weight), torch.randn(1, 64, 9, 9)

    def call(words: Tensor) -> Tensor:
        held = Sparse24ConvPanels(words, weight.shape, 1, torch.float32)
        return sparse24_conv(x, held)

    blocks = 9 * 2
    for at, value in ((0, 2**30), (0, -1), (1, 33), (2 * blocks - 1, -1)):
        words = pairs.panels.clone()
        words[at] = value
        with pytest.raises(ValueError, match="steps from word"):
            call(words)
        with pytest.raises(ValueError, match="steps from word"):
            Sparse24ConvPanels(words, weight.shape, 1, torch.float32).to_sparse24()
    with pytest.raises(ValueError, match="5 words for 18 blocks"):
        call(pairs.panels[:5].clone())
    words = pairs.panels.clone()
    words[2 * blocks :] = -1  # columns 255 and NaN, in the steps that are there
    call(words)
    Sparse24ConvPanels(words, weight.shape, 1, torch.float32).to_sparse24()


def test_mistakes_are_errors_with_values() -> None:
    weight, x = weight_of(typical()), torch.ones(1, 19, 9, 9)
    pairs = pairs_of(weight)
    words, kind = pairs.panels, (pairs.shape, 1, torch.float32)
    mistakes: tuple[tuple[type[Exception], str, Callable[[], object]], ...] = (
        (TypeError, "float64 panels", lambda: Sparse24ConvPanels(words.double(), *kind)),
        (ValueError, "panels have shape", lambda: Sparse24ConvPanels(words[None], *kind)),
        (TypeError, "no panels for torch.float64", lambda: pairs_of(weight.to(torch.float64))),
        (ValueError, "on meta", lambda: pairs_of(weight.to("meta"))),
        (TypeError, "x is torch.float16, the weight", lambda: sparse24_conv(x.half(), pairs)),
        (ValueError, "bias has shape", lambda: sparse24_conv(x, pairs, torch.ones(3))),
        (ValueError, "'tanh'", lambda: sparse24_conv(x, pairs, activation="tanh")),
    )
    for error, text, mistake in mistakes:
        with pytest.raises(error, match=text):
            mistake()
    assert repr(pairs) == (
        "Sparse24ConvPanels(shape=[21, 19, 3, 3], groups=1, dtype=torch.float32, device=cpu)"
    )
    assert CONVS[1](torch.ones(1, 19, 9, 9), pairs.to_dense()).shape == (1, 21, 7, 7)


def test_gradient_of_x_beside_panels_in_functorch() -> None:
    conv = nn.Conv2d(64, 64, 3)
    layer = SparseConv2d.from_dense(conv, prune="magnitude").eval()
    x = torch.randn(1, 64, 5, 5)

    def total(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    expected = torch.func.grad(total)(x)
    layer.pack()
    assert layer.packed
    torch.testing.assert_close(torch.func.grad(total)(x), expected, rtol=1e-4, atol=1e-4)


def test_layers_without_values_are_not_packed() -> None:
    layer = SparseConv2d(64, 64, 3, device="meta").pack()
    assert not layer.packed


def test_a_single_input_far_beyond_which_windows_reach() -> None:
    # Where torch's own conv1d would end the process.
    x = torch.randn(1, 24, 1)
    weight = Sparse24Conv.from_dense(magnitude_24(torch.randn(9, 8, 1), dim=1), 3)
    for dtype in (torch.float32, torch.bfloat16):
        held = weight.to(dtype)
        for _ in range(20):
            y = sparse24_conv(x.to(dtype), held, None, 3, 5, 2)
        expected = F.conv1d(x.to(dtype).double(), held.to_dense().double(), None, 3, 5, 2, 3)
        torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-5)


def test_more_pixels_than_are_counted_are_refused() -> None:
    weight = Sparse24Conv.from_dense(torch.zeros(8, 8, 1, 1))
    with pytest.raises(ValueError, match=r"expected up to 2\*\*40"):
        sparse24_conv_choice((1, 8, 2**21, 2**21), weight)
