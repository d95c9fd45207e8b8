"""Format: the one protocol, and what it speaks of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from ..storage.dtypes import DType
from ..storage.store import Bits

if TYPE_CHECKING:  # torch takes over a second to import, and copying bytes does not need it
    from torch import Tensor


class Part(NamedTuple):
    """One stored tensor of a matrix; `suffix` is the last word of its name ("weight", "qweight", "scales")."""

    suffix: str
    dtype: DType
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """What was found on disk under a suffix."""

    dtype: DType
    shape: tuple[int, ...]


class Format(Protocol):
    """A way to store a matrix; an instance says it of one matrix (its rank, its group size, its block type).

    Instances are frozen and compare by value.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]  # of all its parts; the first is always there

    @property
    def dtype(self) -> DType:
        """Of the dense matrix."""
        ...

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored tensors of a matrix [out, in] (or a vector), in the order in which `decode` takes them."""
        ...

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The dense matrix [out, in] in `dtype`: the same bits on every machine and with any number of threads."""
        ...

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """What `decode` takes at most beside its parts and its result."""
        ...

    def fragment(self) -> Mapping[str, Any]:
        """Keys of the config.json beside matrices in this format, by which loaders know it; empty for plain ones."""
        ...

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Format | None:
        """The format of what lies there, by suffix; None if it is another. A part may be missing but the first.

        `quantization`: what config.json says of it, for what the parts do not tell; empty where it says nothing.
        """
        ...

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        """Whether a config.json's `quantization_config` is this format's."""
        ...


@runtime_checkable
class ByRows(Protocol):
    """A format of one part, each row of which is by itself a row of the matrix: read and decoded in runs of rows."""

    def decode_rows(self, bits: Bits) -> Bits:
        """Stored rows [rows, words] as dense ones [rows, columns] in the format's `dtype`."""
        ...


@runtime_checkable
class Quantized(Format, Protocol):
    """A format of fewer bits than its dense matrix has, whose dtype is a reader's choice."""

    @property
    def kind(self) -> str:
        """By which checking knows what such an output may lose: "gptq" for its usual 4 bits, "gptq-8bit", ..."""
        ...

    @property
    def about(self) -> str:
        """Bits, groups and what else a user should know of it, in a few words."""
        ...

    def to(self, dtype: DType) -> Format:
        """The same, decoded to `dtype`: rounded once, to nothing else before."""
        ...


class Packed(NamedTuple):
    """A matrix as it is stored: what a method makes of one."""

    format: Format
    parts: tuple[Tensor, ...]

    @property
    def dense(self) -> Tensor:
        """The matrix that a reader of the parts sees."""
        return self.format.decode(self.parts)
