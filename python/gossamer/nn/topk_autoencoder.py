"""TopKAutoencoder: a sparse autoencoder whose codes have k non-zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._wide import wide
from ..formats.geometry import whole_number
from ..ops.topk import topk_decode
from ..ops.topk_encoder import topk_encode
from .checkpoint import CheckedModule, check_loaded

torch.fx.wrap("topk_encode")  # leaves: torch.fx could not follow their branches
torch.fx.wrap("topk_decode")


class TopKAutoencoder(CheckedModule):
    """``y = topk(relu(W_e (x - b_d) + b_e)) W_d + b_d`` with k active latents a token.

    Parameters
    ----------
    d_model : int
        Features of a token.
    width : int
        Latents, usually many times ``d_model``.
    k : int
        Active latents of each token, from 1 to ``width``.
    device, dtype
        As for ``torch.nn.Linear``.

    Attributes
    ----------
    encoder_weight, decoder_weight : Parameter
        [width, d_model]; the decoder's rows start as unit vectors, the encoder's as a copy of them.
    encoder_bias, decoder_bias : Parameter
        [width] and [d_model], zero at first.

    Raises
    ------
    ValueError
        If a size is below 1 or k above ``width``.

    References
    ----------
    Gao et al., "Scaling and evaluating sparse autoencoders", 2024 (arXiv:2406.04093).

    Examples
    --------
    >>> import torch, gossamer
    >>> model = gossamer.nn.TopKAutoencoder(64, 1024, k=32)
    >>> x = torch.randn(8, 64)
    >>> loss = (model(x) - x).square().mean()
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        k: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            d_model, width, k = map(whole_number, (d_model, width, k))
        except TypeError as wrong:
            raise TypeError(f"TopKAutoencoder: d_model, width or k is {wrong}") from None
        if min(d_model, width) < 1 or not 1 <= k <= width:
            raise ValueError(
                f"TopKAutoencoder: d_model is {d_model}, width {width} and k is {k}, expected "
                "sizes from 1 on and k up to width"
            )
        self.d_model, self.width, self.k = d_model, width, k

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.encoder_weight, self.encoder_bias = empty(width, d_model), empty(width)
        self.decoder_weight, self.decoder_bias = empty(width, d_model), empty(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.decoder_weight)
        self.normalize_decoder()
        with torch.no_grad():
            self.encoder_weight.copy_(self.decoder_weight)
        nn.init.zeros_(self.encoder_bias)
        nn.init.zeros_(self.decoder_bias)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the decoder's rows to length 1, as is usual after each step of an optimizer."""
        # float16 has neither the least length that is divided by nor every length of a row.
        rows = self.decoder_weight.to(wide(self.decoder_weight.dtype))
        self.decoder_weight.copy_(F.normalize(rows, dim=-1))

    def check_state(self, given: Mapping[str, Any], assign: bool) -> None:
        check_loaded(given, dict(self.named_parameters()), assign)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d_model] to values and indices, both [..., k]."""
        return topk_encode(x - self.decoder_bias, self.encoder_weight, self.encoder_bias, k=self.k)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes back to [..., d_model]."""
        return topk_decode(values, indices, self.decoder_weight, self.decoder_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] to its reconstruction."""
        code = self.encode(x)
        return self.decode(code[0], code[1])  # torch.fx could not unpack it

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, width={self.width}, k={self.k}"
