"""What every format of a weight answers from its shape and its tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


class SavedWeight(StoredWeight):
    """Base of the formats that files and pickles hold: what comes back from them is validated."""

    values: Tensor

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError where dtypes, shapes or devices disagree."""
        raise NotImplementedError

    def validate(self) -> Any:
        """Raise ValueError where the tensors' content is not valid; return self."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()
        self.validate()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


def check_dense(op: str, weight: Any) -> None:
    """Raise TypeError unless ``weight`` is a tensor of a dtype that weights are stored in."""
    if not isinstance(weight, Tensor) or weight.dtype not in VALUE_DTYPES:
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"{op}: weight is {what}, expected a tensor of float32, bfloat16, float16 or float64"
        )
