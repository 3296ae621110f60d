"""SparseTrainingLinear: a dense weight is trained, what is multiplied is its 2:4 projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._sharded import whole
from ..formats import VALUE_DTYPES, Sparse24
from ..ops.operands import autocast_dtype, autocast_to, has_content
from ..projection24 import hard_threshold_24, scale_24, soft_threshold_24, transposable_mask_24
from .called import keep_called
from .checkpoint import buffers_detached
from .dense import check_layer
from .fused_steps import follow_fused_steps
from .sparse_training_product import StraightProduct
from .sparse_training_state import check_buffers, has_mask

PROJECTIONS = ("hard", "soft", "transposable")


class SparseTrainingLinear(nn.Linear):
    """``y = x P(W)ᵀ + b``, P(W) 2:4 and anew at each step, the gradient of P(W) given to W.

    The forward product runs through the 2:4 kernels. The weight is a dense Parameter; a
    ``state_dict`` holds it beside the three buffers below. A graph of ``torch.compile`` holds the
    layer whole where each step searches anew ("hard" or "soft", ``refresh`` 1), and breaks at it
    otherwise. Transforms of ``torch.func`` are refused. ``torch.export`` is for inference, under
    ``torch.no_grad()``, and averages of models leave buffers out (``use_buffers=False``).

    Parameters
    ----------
    in_features, out_features : int
        K and N, any numbers from 1 on.
    bias : bool
    projection : {"hard", "soft", "transposable"}
        "hard" keeps the two largest of every four inputs. "soft" takes the second smallest
        magnitude of the four off each, and multiplies by the scale that ``freeze_scale()`` found.
        "transposable" keeps two of every four inputs and of every four outputs, so that the
        gradient of x is a 2:4 product, too.
    refresh : int
        Steps between searches for the mask (not of "soft"): a step is what changed the weight.
    mvue : bool
        Whether the gradient of the weight is taken from a random 2:4 estimate of the output's,
        which is unbiased, by the 2:4 kernels.
    device, dtype
        As for ``torch.nn.Linear``: float32, bfloat16, float16, float64.

    Attributes
    ----------
    weight : Parameter
        [N, K], dense. Writing to it through ``.data``, which torch does not count as a change, is
        not seen; write under ``torch.no_grad()``, as optimizers do.
    scale : Tensor
        0-d float64: the frozen factor of "soft", 1 otherwise.
    age : Tensor
        0-d int64: steps since the mask was searched.
    indices : Tensor
        [N, ceil(ceil(K / 4) / 2)] uint8: the mask (``gossamer.formats.Sparse24``).

    Raises
    ------
    ValueError
        If a size or ``refresh`` is below 1, or the projection unknown.
    TypeError
        If there are no kernels for ``dtype``.

    References
    ----------
    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR
    2021 ("hard"); Hu et al., "S-STE", NeurIPS 2024 ("soft"); Hu et al., "Accelerating Transformer
    Pre-training with 2:4 Sparsity", ICML 2024 ("transposable", ``mvue``).
    """

    scale: Tensor
    age: Tensor
    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        projection: str = "hard",
        refresh: int = 1,
        mvue: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1 or out_features < 1 or refresh < 1:
            raise ValueError(
                f"SparseTrainingLinear: in_features {in_features}, out_features {out_features}, "
                f"refresh {refresh}: all must be at least 1"
            )
        if projection not in PROJECTIONS:
            raise ValueError(
                f"SparseTrainingLinear: projection {projection!r}, expected {PROJECTIONS}"
            )
        if projection == "soft" and refresh != 1:
            raise ValueError("SparseTrainingLinear: a soft threshold moves with every step")
        super().__init__(in_features, out_features, bias, device, dtype)
        if self.weight.dtype not in VALUE_DTYPES:
            raise TypeError(f"SparseTrainingLinear: no kernels for {self.weight.dtype}")
        self.projection, self.refresh, self.mvue = projection, refresh, mvue
        on = self.weight.device
        groups = (in_features + 3) // 4
        self.register_buffer("scale", torch.ones((), dtype=torch.float64, device=on))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64, device=on))
        empty = torch.zeros(out_features, (groups + 1) // 2, dtype=torch.uint8, device=on)
        self.register_buffer("indices", empty)
        self._projected: _Projected | None = None
        self._searched = False
        self.freeze_scale()
        keep_called(self)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, projection: str = "hard", refresh: int = 1, mvue: bool = False
    ) -> SparseTrainingLinear:
        """A layer that shares the very Parameters of a dense one, which optimizers may hold.

        Raises
        ------
        TypeError
            If it is not a ``torch.nn.Linear``, or there are no kernels for its dtype.
        ValueError
            If ``refresh`` is below 1, or the projection unknown.
        """
        check_layer(f"{cls.__name__}.from_dense", linear, nn.Linear)
        bias = linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            projection,
            refresh,
            mvue,
            linear.weight.device,
            linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, bias
        layer.freeze_scale()
        return layer.train(linear.training)

    @torch.no_grad()
    def freeze_scale(self) -> None:
        """Take the scale of "soft" from the weight as it is: <W, S(W)> / <S(W), S(W)>."""
        if self.projection == "soft" and has_content(self.weight):
            self.scale.fill_(scale_24(self.weight))
        self._projected = None

    @property
    @torch.no_grad()
    def mask(self) -> Tensor:
        """Bool [N, K]: which entries of the weight are multiplied at present."""
        projected = self._project()
        sparse = projected.sparse
        ones = torch.ones_like(sparse.values)
        mask = Sparse24(ones, sparse.indices, sparse.shape).to_dense() != 0
        if self._indices_name_more():
            mask &= projected.dense != 0
        return mask

    @torch.no_grad()
    def projected(self) -> Tensor:
        """P(W), dense [N, K]; not to be written to."""
        return self._project().dense

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP puts what it has gathered there at each pass, and neither version nor address tells
        # whether that is what it was.
        if name == "weight":
            self.doubt_weight()

    def doubt_weight(self) -> None:
        """Compare the weight with what was projected before that is used again."""
        if (projected := self.__dict__.get("_projected")) is not None:
            projected.remember()

    def _project(self) -> _Projected:
        """P(W) of the weight as it is; what it was made of is remembered by its version."""
        weight = whole(self.weight)
        made_of: tuple[Any, ...] = ()
        # Tensors of inference mode do not count their changes, and one that is made for each pass
        # may lie where that of the last pass lay. A Parameter that is held cannot be mistaken.
        if isinstance(weight, nn.Parameter) and not weight.is_inference():
            made_of = (id(weight), weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._projected is not None and made_of and self._projected.made_of == made_of:
            return self._projected
        if self._projected is not None and not self._still_holds(weight, self._projected):
            self.age = self.age + 1
        elif self._projected is not None:
            self._projected.remember(made_of, weight)
            return self._projected
        self._projected = None  # its memory serves the next one
        shape = (self.out_features, self.in_features)
        if self.projection == "soft":
            dense, sparse = self._thresholded(weight)
            self.age = torch.zeros_like(self.age)
        elif self._has_to_search():
            if self.projection == "hard":
                dense, sparse = self._thresholded(weight)
            else:
                mask = transposable_mask_24(weight)
                dense = weight.detach() * mask
                # By the mask, for a weight that is kept may be 0.
                sparse = Sparse24.from_dense(
                    dense if self.in_features % 4 else mask.to(dense.dtype)
                )
                values = torch.ops.gossamer.sparse24_gather(dense, sparse.indices)
                sparse = Sparse24(values, sparse.indices, shape)
            self.age = torch.zeros_like(self.age)
        else:
            values = torch.ops.gossamer.sparse24_gather(weight.detach(), self.indices)
            sparse = Sparse24(values, self.indices, shape)
            dense = sparse.to_dense()
        self.indices, self._searched = sparse.indices.contiguous(), True
        self._projected = _Projected(dense, sparse, made_of, weight)
        follow_fused_steps(self)
        return self._projected

    def _thresholded(self, weight: Tensor) -> tuple[Tensor, Sparse24]:
        if self.projection == "soft":
            return soft_threshold_24(weight, self.scale)
        return hard_threshold_24(weight)

    def _has_to_search(self) -> bool:
        always = not self._searched or self._searches_always()
        return always or not has_content(self.age) or int(self.age) >= self.refresh

    def _searches_always(self) -> bool:
        return self.refresh == 1 or self._indices_name_more()

    def _indices_name_more(self) -> bool:
        """Whether indices name two places of a last group that keeps one or none of them.

        A mask that is transposable may, and they do not say which.
        """
        return self.projection == "transposable" and self.in_features % 4 != 0

    def _still_holds(self, weight: Tensor, projected: _Projected) -> bool:
        """Whether a weight of unknown age is the one that was projected, by what was kept of it.

        What was not kept does not matter before the next search.
        """
        if projected.made_of or self._searches_always():
            return False
        kept = torch.ops.gossamer.sparse24_gather(weight.detach(), projected.sparse.indices)
        return torch.equal(kept, projected.sparse.values)

    def forward(self, input: Tensor) -> Tensor:  # as torch's layer names it
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "SparseTrainingLinear: no transform of torch.func goes through it; backward() does"
            )
        follows = self.projection != "transposable" and self.refresh == 1
        if follows and torch.compiler.is_compiling():
            # Nothing is kept from step to step, so a graph may hold it whole.
            with torch.no_grad():
                projected = _Projected(*self._thresholded(whole(self.weight)))
        else:
            # Outside inference mode, or what is kept could never be saved for a backward.
            with torch.inference_mode(False), torch.no_grad():
                projected = self._project()
        x, autocast = input, autocast_dtype(input)
        bias: Tensor | None = self.bias
        dense, sparse = projected.dense, projected.sparse
        if autocast is not None:
            x = autocast_to(x, autocast)
            bias = None if bias is None else autocast_to(bias, autocast)
            dense, sparse = projected.cast(
                autocast if dense.dtype != torch.float64 else dense.dtype
            )
        if x.dtype != dense.dtype:
            raise TypeError(f"SparseTrainingLinear: x is {x.dtype}, the weight {dense.dtype}")
        both = self.projection == "transposable"
        y: Tensor = StraightProduct.apply(
            x, self.weight, bias, dense, sparse.values, sparse.indices, both, self.mvue
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, projection={self.projection!r}, refresh={self.refresh}, "
            f"mvue={self.mvue}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseTrainingLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # frozen: not rounded with the weight
            self.scale = scale.to(self.scale.device)
        return self

    def _bring_up_to_date(self) -> None:
        """Project the weight as it is, so that what is saved goes on as the layer itself does.

        Of a sharded weight every rank has to come here, as with all its ``state_dict``.
        """
        if self.weight.device.type != "meta":
            with torch.no_grad():
                self._project()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._bring_up_to_date()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        try:
            check_buffers(state_dict, prefix, (self.out_features, self.in_features))
        except ValueError as error:
            args[-1].append(str(error))
            return
        given = buffers_detached(self, state_dict, prefix)
        super()._load_from_state_dict(given, prefix, *args)
        self._projected, self._searched = None, has_mask(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        self._bring_up_to_date()
        return {**self.__dict__, "_projected": None}


class _Projected:
    """P(W), dense and packed, and of which weight."""

    def __init__(self, dense: Tensor, sparse: Sparse24, *made_of: Any) -> None:
        self.dense, self.sparse = dense, sparse
        self.remember(*made_of)
        self._cast: tuple[Tensor, Sparse24] | None = None

    def remember(self, made_of: tuple[Any, ...] = (), weight: Tensor | None = None) -> None:
        self.made_of = made_of
        self.weight = weight if made_of else None  # held, so that no other has its place

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Sparse24]:
        if self.dense.dtype == dtype:
            return self.dense, self.sparse
        if self._cast is None or self._cast[0].dtype != dtype:
            self._cast = self.dense.to(dtype), self.sparse.to(dtype)
        return self._cast
