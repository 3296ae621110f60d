"""SparseLinearQuantized: a linear layer with an 8-bit or 4-bit 2:4 weight, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _C
from .._cuda_module import obstacle
from ..formats import Sparse24, Sparse24Quantized, Sparse24QuantizedPanels
from ..formats.geometry import whole_number
from ..formats.sparse24_quantized import resolve_group, sparse24_quantized_shapes, value_type_of
from ..ops.quantize_rows import FLOAT_DTYPES
from ..ops.sparse24_quantized import sparse24_linear_quantized_tensors
from .linear import SparseLinear
from .packable import PackableModule, held_while_spawning

if TYPE_CHECKING:
    from typing_extensions import Self

# A leaf for torch.fx, which could not follow its branches on x.
torch.fx.wrap("sparse24_linear_quantized_tensors")

# The index byte of two groups that keep their first two columns.
_FIRST_TWO = 0x44


class SparseLinearQuantized(PackableModule):
    """``y = x Wᵀ + b`` where W is 2:4 and its values have 8 or 4 bits and a scale.

    ``SparseLinearQuantized.from_sparse`` or ``gossamer.quantize`` makes one of a trained layer; a
    fresh one has the weight 0, to load a checkpoint into. Nothing of it is trained: all tensors
    are buffers. The weight is held as ``panels``, the layout that the kernels of its device read,
    unless ``unpack()`` said otherwise or there are no such kernels. A ``state_dict``, a pickle and
    a deep copy hold the open format (``gossamer.formats.Sparse24Quantized``) in any case, and what
    comes in is validated first. Moves to another dtype change the bias alone.

    Parameters
    ----------
    in_features, out_features : int
        K and N, any numbers from 1 on.
    bias : bool
        Whether there is a [N] bias.
    value_type : {"int8", "float8_e4m3fn", "int4"}
        int8 and float8_e4m3fn quantise x at run time and multiply in that type; int4 keeps x.
    group : int, optional
        Columns a scale, for int4: a multiple of 4, by default 128; from K on, one scale a row.
    device, dtype
        As for ``torch.nn.Linear``: float32, bfloat16 or float16, of the bias and of what
        ``dequantize`` gives back.

    Attributes
    ----------
    values, indices : Tensor or None
        The weight as ``gossamer.formats.Sparse24Quantized`` describes it; None while packed.
    panels : Tensor or None
        The packed weight (``gossamer.formats.Sparse24QuantizedPanels``).
    scales : Tensor
        float32, in either state.
    format : Tensor
        int64 (version, N, K, group, type): what a ``state_dict`` says of itself.
    bias : Tensor or None
        [N], in the dtype of x.

    Raises
    ------
    ValueError
        If a size is below 1, the value type unknown or the group does not fit it.
    TypeError
        If there are no kernels for ``dtype``.
    """

    values: Tensor | None
    indices: Tensor | None
    scales: Tensor
    _keep_portable: bool = False  # what unpack() asked for

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        value_type: str = "int8",
        group: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = whole_number(in_features), whole_number(out_features)
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"SparseLinearQuantized: in_features {in_features} and out_features "
                f"{out_features}, both must be at least 1"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"SparseLinearQuantized: dtype {dtype}, expected float32, bfloat16 or float16"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.value_type = value_type
        self.group = resolve_group(value_type, in_features, group)
        shapes = sparse24_quantized_shapes(value_type, (out_features, in_features), self.group)
        storage = value_type_of(value_type).storage
        indices = torch.full(shapes[1], _FIRST_TWO, dtype=torch.uint8, device=device)
        if (in_features + 3) // 4 % 2 == 1:
            indices[:, -1] &= 15
        self.register_buffer("values", torch.zeros(shapes[0], dtype=storage, device=device))
        self.register_buffer("indices", indices)
        self.register_buffer("scales", torch.ones(shapes[2], dtype=torch.float32, device=device))
        self.register_buffer("panels", None, persistent=False)
        self.register_buffer("format", self._portable().state()["format"].to(indices.device))
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )
        self._dtype = dtype
        self._pack_where_possible()

    @classmethod
    def from_sparse(
        cls, layer: SparseLinear, dtype: str = "int8", group: int | None = None
    ) -> SparseLinearQuantized:
        """The layer with its weight rounded (``Sparse24Quantized.from_sparse24``).

        Parameters
        ----------
        layer : SparseLinear
            Trainable or packed, of float32, bfloat16 or float16. It stays as it is.
        dtype : {"int8", "float8_e4m3fn", "int4"}
            The value type.
        group : int, optional
            Columns a scale, as in the constructor.

        Raises
        ------
        TypeError
            If ``layer`` is not a 2:4 ``SparseLinear``, or of float64.
        ValueError
            If the type is unknown, the group does not fit it, or a weight is not finite.
        """
        if not isinstance(layer, SparseLinear):
            raise TypeError(
                f"SparseLinearQuantized.from_sparse: {type(layer).__name__}, expected SparseLinear"
            )
        # Outside inference mode, or its tensors could never be written to by a load again.
        with torch.inference_mode(False), torch.no_grad():
            portable = layer._portable()
            if not isinstance(portable, Sparse24):
                raise TypeError(
                    f"SparseLinearQuantized.from_sparse: pattern {layer.pattern}, expected 2:4"
                )
            quantized = cls(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                value_type=dtype,
                group=group,
                device="meta",
                dtype=portable.dtype,
            )
            rounded = Sparse24Quantized.from_sparse24(portable, dtype, group)
            quantized.values, quantized.scales = rounded.values, rounded.scales
            quantized.indices = rounded.indices.clone()
            quantized.format = rounded.state()["format"].to(rounded.device)
            if layer.bias is not None:
                quantized.bias = layer.bias.detach().clone()
            quantized._pack_where_possible()
            return quantized.train(layer.training)

    def dequantize(self) -> SparseLinear:
        """A trainable layer with the weight that this stands for, and a copy of the bias."""
        with torch.inference_mode(False):
            layer = SparseLinear(
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                device="meta",
                dtype=self.dtype,
            )
            weight = self._portable().to_sparse24(self.dtype)
            layer.values, layer.indices = nn.Parameter(weight.values), weight.indices.clone()
            layer.format = weight.state()["format"].to(weight.device)
            if self.bias is not None:
                layer.bias = nn.Parameter(self.bias.detach().clone())
            return layer.train(self.training)

    def pack(self) -> Self:
        """Hold the weight in the layout that its device reads fastest, from here on.

        Those are the panels, which a layer holds anyway unless ``unpack()`` was called. Where there
        are none, as on a CPU with the serial kernel alone, nothing changes until a move.

        Returns
        -------
        self
        """
        self._keep_portable = False
        self._pack_where_possible()
        return self

    def unpack(self) -> Self:
        """Hold ``values`` and ``indices``, on any device, until ``pack()`` is called.

        They are turned into panels at each call, which takes longer than the product of a few rows.

        Returns
        -------
        self
        """
        self._keep_portable = True
        self._unpack()
        return self

    @property
    def weight(self) -> Sparse24Quantized | Sparse24QuantizedPanels:
        """The weight as the format it is held in: portable, or panels while packed."""
        shape = (self.out_features, self.in_features)
        if self._panels_dtype is not None:
            assert self.panels is not None
            return Sparse24QuantizedPanels(
                self.panels, self.scales, shape, self.group, self.value_type
            )
        assert self.values is not None
        assert self.indices is not None
        return Sparse24Quantized(self.values, self.indices, self.scales, shape, self.group)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the layer: of its bias, and of a dequantised weight."""
        return self._dtype if self.bias is None else self.bias.dtype

    def forward(self, input: Tensor) -> Tensor:  # as torch's layer names it
        """``input`` [..., K] -> [..., N], both float32, bfloat16 or float16 as the bias.

        Raises
        ------
        RuntimeError
            If a gradient is wanted of it.
        """
        shape, indices = (self.out_features, self.in_features), self.indices
        stored = self.panels if indices is None else self.values
        assert stored is not None
        value_dtype = value_type_of(self.value_type).storage
        return sparse24_linear_quantized_tensors(
            input, stored, indices, self.scales, value_dtype, self.bias, shape, self.group
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, value_type={self.value_type}, group={self.group}"
            + (", packed=True" if self.packed else "")
        )

    def _portable(self) -> Sparse24Quantized:
        weight = self.weight
        return weight if isinstance(weight, Sparse24Quantized) else weight.to_quantized()

    def _hold_portable(self) -> None:
        weight = self.weight
        if isinstance(weight, Sparse24QuantizedPanels):
            portable = weight.to_quantized()
            self.values, self.indices = portable.values, portable.indices
            self.panels = self._panels_dtype = None
            self._tensors_first()

    def _hold_panels(self) -> None:
        weight = self.weight
        if isinstance(weight, Sparse24Quantized):
            packed = Sparse24QuantizedPanels.from_quantized(weight)
            self.values = self.indices = None
            self.panels, self._panels_dtype = packed.panels, packed.storage
            self._tensors_first()

    def _tensors_first(self) -> None:
        # torch.export (not strict) counts on it.
        self._buffers = dict(sorted(self._buffers.items(), key=lambda entry: entry[1] is None))

    def _can_pack(self) -> bool:
        device = self.scales.device
        if device.type == "cpu":
            return _C.target() != "serial"
        return device.type == "cuda" and obstacle(device) is None

    def _wants_panels(self) -> bool:
        return not self._keep_portable

    def _takes_dtype(self, t: Tensor) -> bool:
        return t is self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        weight = self._portable()
        # As bytes: pickle.loads cannot read what pickle.dumps makes of a float8 tensor.
        values = weight.values.view(torch.uint8)
        portable = {"values": values, "indices": weight.indices, "panels": None}
        return held_while_spawning({**self.__dict__, "_buffers": {**self._buffers, **portable}})

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = state["_buffers"]["values"].view(value_type_of(state["value_type"]).storage)
        super().__setstate__({**state, "_buffers": {**state["_buffers"], "values": values}})
