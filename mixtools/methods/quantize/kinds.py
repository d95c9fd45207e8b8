"""What --method, --format, --bits and --group-size may be together, and the grid and format that they mean.

method  format               bits        zeros           groups
gptq    auto-gptq            2, 3, 4, 8  in the middle   -1, 32, 64, 128
gptq    compressed-tensors   4, 8        in the middle   -1, 32, 64, 128
awq     autoawq              4           by group        -1, 32, 64, 128
awq     compressed-tensors   4, 8        by group        -1, 32, 64, 128
awq     auto-gptq            2, 3, 4, 8  by group        -1, 32, 64, 128
nf4     bitsandbytes         4           none            64
int8    bitsandbytes         8           none            a row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...storage.dtypes import DType

if TYPE_CHECKING:
    from ...config import MixtralConfig
    from ...formats import Format
    from .grid import Scheme

AUTO_GPTQ, AUTOAWQ, COMPRESSED, BITSANDBYTES = "auto-gptq", "autoawq", "compressed-tensors", "bitsandbytes"
GROUPS = (-1, 32, 64, 128)
_FOUR, _MANY = (4,), (2, 3, 4, 8)
TAKES: dict[str, dict[str, tuple[int, ...]]] = {  # method, its formats (the first is the usual one), bits
    "gptq": {AUTO_GPTQ: _MANY, COMPRESSED: (4, 8)},
    "awq": {AUTOAWQ: _FOUR, COMPRESSED: (4, 8), AUTO_GPTQ: _MANY},
    "nf4": {BITSANDBYTES: _FOUR},
    "int8": {BITSANDBYTES: (8,)},
}
_NF4_BLOCK = 64
_ROWS = {AUTO_GPTQ: 32, AUTOAWQ: 8}  # of a matrix, which zeros are packed along


@dataclass(frozen=True)
class Kind:
    """A method in a format. `group`: columns, -1 for a whole row."""

    method: str
    format: str
    bits: int
    group: int

    @classmethod
    def of(cls, method: str, format: str | None, bits: int | None, group: int | None) -> Kind:
        """With the usual values where nothing is asked for. Raises UsageError for what does not go together."""
        formats = TAKES[method]
        format = format or next(iter(formats))
        if format not in formats:
            raise UsageError(f"--method {method} --format {format}: it is stored as {' or '.join(formats)}")
        taken = formats[format]
        bits = (4 if 4 in taken else taken[0]) if bits is None else bits
        if bits not in taken:
            told = ", ".join(map(str, taken))
            raise UsageError(f"--method {method} --format {format} --bits {bits}: there it has {told} bits")
        if format == BITSANDBYTES:
            if group is not None:
                raise UsageError(f"--method {method} has groups of its own: leave out --group-size")
            return cls(method, format, bits, _NF4_BLOCK if method == "nf4" else -1)
        group = 128 if group is None else group
        if group not in GROUPS:
            raise UsageError(f"--group-size {group}: there is {', '.join(map(str, GROUPS))} (-1: a row)")
        return cls(method, format, bits, group)

    @property
    def symmetric(self) -> bool:
        return self.method != "awq"

    def plain_dtype(self, main: DType) -> DType:
        """Of what is not quantized: fp16 in the packages' own formats, else the source's."""
        if self.format in (AUTO_GPTQ, AUTOAWQ):
            return DType.F16
        return main

    def matrix_format(self, main: DType) -> Format:
        """How each linear is stored."""
        from ...formats import Awq, Gptq, Int8, Nf4, PackedInts

        if self.format == AUTO_GPTQ:
            return Gptq(self.bits, self.group, DType.F16, self.symmetric)
        if self.format == AUTOAWQ:
            return Awq(self.group, DType.F16, self.symmetric)
        if self.format == COMPRESSED:
            return PackedInts(self.bits, self.group, DType.F16 if main is DType.F32 else main, self.symmetric)
        return Nf4(main) if self.method == "nf4" else Int8(main)

    def scheme(self, main: DType) -> Scheme:
        """The grid of a calibrated run."""
        from ...formats import Awq, Gptq, Int8, Nf4, PackedInts
        from .grid import Groups
        from .grid_bnb import AbsMax

        found = self.matrix_format(main)
        if isinstance(found, Nf4 | Int8):
            return AbsMax(found)
        assert isinstance(found, Gptq | Awq | PackedInts)
        return Groups(found, least_zero=int(self.format == AUTO_GPTQ))

    def expect_fits(self, config: MixtralConfig) -> None:
        """Raises UsageError for a model whose matrices do not fill whole groups and words."""
        heads = {"": config.num_heads, "key ": config.num_kv_heads}
        sizes = {"hidden size": config.hidden_size, "expert size": config.intermediate_size}
        sizes |= {f"{which}heads' width": count * config.head_dim for which, count in heads.items()}
        for name, size in sizes.items():
            group = 32 if self.group < 0 else self.group
            if self.method != "int8" and name != "key heads' width" and size % group:
                raise UsageError(f"the {name} of {size} is no multiple of --group-size {self.group}: choose another")
            if size % (rows := _ROWS.get(self.format, 1)):
                raise UsageError(f"the {name} of {size} is no multiple of {rows}, as --format {self.format} needs")
