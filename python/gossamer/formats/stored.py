"""What every format of a weight answers from its shape and its tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor


class StoredWeight:
    """Base of the formats: frozen dataclasses whose fields are a shape and tensors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    shape: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, padding included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        held = (getattr(self, field.name) for field in fields(self))
        return [value for value in held if isinstance(value, Tensor)]
