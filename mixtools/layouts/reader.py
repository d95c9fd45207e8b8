"""Reader: any checkpoint in one canonical form, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # torch takes 1.4 s to import, and copying bytes does not need it
    import torch

    from ..config import MixtralConfig
    from ..names import Slot
    from ..storage.dtypes import DType


class Spec(NamedTuple):
    """Shape and stored dtype of a tensor in canonical form."""

    shape: tuple[int, ...]
    dtype: DType


class Mapped(Enum):
    """How a matrix that may stay in its file is had."""

    NOT = "as a copy in memory"
    NOW = "in its file, which is read now"
    LATER = "in its file, each part of which is read when it is looked at"


class Reader(Protocol):
    """What every source offers. Canonical: matrices [out, in], q/k rows in Hugging Face order."""

    @property
    def config(self) -> MixtralConfig: ...

    def slots(self) -> Iterator[Slot]:
        """Every slot of the model, embedding first, head last."""
        ...

    def spec(self, slot: Slot) -> Spec: ...

    def read(self, slot: Slot) -> torch.Tensor:
        """The tensor, contiguous, on the CPU, in its stored dtype; the caller owns it."""
        ...
