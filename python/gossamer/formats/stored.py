"""What every format of a weight answers from its shape and its tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StoredWeight:
    """Base of the formats: frozen dataclasses whose fields are a shape and tensors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    shape: tuple[int, ...]
    version: ClassVar[int]  # of those that files hold

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, padding included."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    if not TYPE_CHECKING:  # or every attribute would pass for one of them

        def __getattr__(self, name: str) -> Any:
            if hasattr(Tensor, name):
                raise AttributeError(self._no_tensor(name))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __matmul__(self, other: Any) -> Any:
        raise TypeError(self._no_tensor("@"))

    def _no_tensor(self, name: str) -> str:
        return (
            f"{type(self).__name__} has no {name!r}: it is the sparse weight of a layer, no "
            "tensor; a layer whose weight the model itself reads has to stay dense (exclude)"
        )

    def _tensors(self) -> dict[str, Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def _state(self, *numbers: int) -> dict[str, Tensor]:
        """The entries of a file: the tensors by their names, and the version with these numbers."""
        header = torch.tensor([self.version, *numbers], dtype=torch.int64, device="cpu")
        return self._tensors() | {"format": header}


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
    """Raise TypeError unless it is a strided tensor of a dtype that weights are stored in."""
    what = type(weight).__name__
    if isinstance(weight, Tensor):
        strided = weight.layout == torch.strided
        if strided and weight.dtype in VALUE_DTYPES:
            return
        what = str(weight.dtype if strided else weight.layout)
    raise TypeError(
        f"{op}: weight is {what}, expected a tensor of float32, bfloat16, float16 or float64"
    )
