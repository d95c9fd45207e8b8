"""Which type each tensor of a GGUF gets: the mixtures that stand behind the names of file types, such as Q4_K_M.

Facts: llama_tensor_get_type of src/llama-quant.cpp in https://github.com/ggml-org/llama.cpp, for its llama
architecture. Everything follows from the configuration alone, so a file is planned before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...config import MixtralConfig
from ...errors import UsageError
from ...layouts.gguf import GGUF
from ...layouts.gguf_config import FILE_TYPES
from ...names import ATTENTION, EXPERT, Role, Slot
from ...storage.dtypes import ELEMENTS, DType

T = DType
DENSE = (T.F32, T.F16, T.BF16)
TODAY, CARD = "today", "2023-12"
RULES = (TODAY, CARD)
MATRICES = (Role.EMBED, *ATTENTION, *EXPERT, Role.HEAD)  # all else, norms and router, stays F32

_BASE = {  # of most tensors; where the name is not the type's own
    "Q2_K_S": T.Q2_K, "Q3_K_S": T.Q3_K, "Q3_K_M": T.Q3_K, "Q3_K_L": T.Q3_K, "Q4_K_S": T.Q4_K, "Q4_K_M": T.Q4_K,
    "Q5_K_S": T.Q5_K, "Q5_K_M": T.Q5_K, "IQ2_S": T.IQ2_XS, "IQ2_M": T.IQ2_S, "IQ3_XS": T.IQ3_S, "IQ3_M": T.IQ3_S,
    "MXFP4_MOE": T.MXFP4,
}  # fmt: skip
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize has them
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # rules of their own for all but the experts
_FALLBACK = {  # where rows are no multiple of 256
    T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL,
    T.IQ1_S: T.IQ4_NL, T.IQ1_M: T.IQ4_NL, T.IQ2_XXS: T.IQ4_NL, T.IQ2_XS: T.IQ4_NL, T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL, T.IQ3_S: T.IQ4_NL,
}  # fmt: skip
NEED_IMATRIX = (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS)
_CARD_TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S",
               "Q5_K_M", "Q6_K", "Q8_0")  # fmt: skip
_CARD_OUTPUTS = {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}  # attn_output of December 2023


@dataclass(frozen=True)
class Mixture:
    """A file type and what changes it.

    `tensor_types`: (regular expression, type) pairs, the first that is found in a tensor's name decides; `pure`: the
    base type throughout; `rules`: of which time.
    """

    name: str
    pure: bool = False
    tensor_types: tuple[tuple[str, DType], ...] = ()
    output: DType | None = None
    embedding: DType | None = None
    rules: str = TODAY

    @property
    def base(self) -> DType:
        return _BASE.get(self.name) or DType[self.name]


class Choice(NamedTuple):
    """Of a tensor. `wanted`: where rows that do not fit made it another."""

    type: DType
    wanted: DType | None = None


def type_named(text: str) -> str:
    """The file type, whatever its case; Q4_K means Q4_K_M. Raises UsageError, which lists them."""
    name = text.upper()
    name = _ALIASES.get(name, name)
    if name not in FILE_TYPES:
        raise UsageError(f"--type {text}: there is no such type; there are {', '.join(FILE_TYPES)}")
    return name


def dtype_named(text: str, option: str) -> DType:
    """A tensor's type by ggml's name, whatever its case. Raises UsageError, which lists them."""
    known = [dtype.value for dtype in DType if dtype in DENSE or dtype not in ELEMENTS]
    if text.upper() not in known:
        raise UsageError(f"{option}{text}: there is no such type; there are {', '.join(known)}")
    return DType[text.upper()]


def choose(mixture: Mixture, config: MixtralConfig, *, tied: bool, imatrix: bool) -> dict[Slot, Choice]:
    """The type of every tensor, by slot.

    `tied`: the head is the embedding, and has no tensor; `imatrix`: there is one. Raises UsageError for rules that
    do not know the file type.
    """
    if mixture.rules == CARD and mixture.name not in (*_CARD_TYPES, "F16"):
        raise UsageError(f"--rules {CARD}: of {', '.join(_CARD_TYPES)}; {mixture.name} came later")
    patterns = [(re.compile(pattern), dtype) for pattern, dtype in mixture.tensor_types]
    about = _About(mixture, config, tied, imatrix)
    found = {}
    for slot in config.slots():
        if slot.role not in MATRICES:
            found[slot] = Choice(T.F32)
            continue
        name = GGUF.piece(slot, config).name
        wanted = _override(mixture, slot.role, name, patterns) or about.type(slot.role, slot.layer or 0)
        found[slot] = _fitting(wanted, config.shape(slot.role)[1])
    return found


def _override(
    mixture: Mixture, role: Role, name: str, patterns: Sequence[tuple[re.Pattern[str], DType]]
) -> DType | None:
    """What the user says of this tensor."""
    if role is Role.EMBED and mixture.embedding:
        return mixture.embedding
    if role is Role.HEAD and mixture.output:
        return mixture.output
    return next((dtype for pattern, dtype in patterns if pattern.search(name)), None)


def _fitting(wanted: DType, columns: int) -> Choice:
    """`wanted`, or what llama-quantize takes where a row is no whole number of its blocks."""

    if _fits(wanted, columns):
        return Choice(wanted)
    second = _FALLBACK.get(wanted, T.F16)
    return Choice(second if _fits(second, columns) else T.F16, wanted)


def _fits(dtype: DType, columns: int) -> bool:
    """Whether a row is a whole number of blocks."""
    try:
        dtype.row_bytes(columns)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class _About:
    mixture: Mixture
    config: MixtralConfig
    tied: bool
    imatrix: bool

    def type(self, role: Role, layer: int) -> DType:
        """The mixture's own choice."""
        name, base = self.mixture.name, self.mixture.base
        if self.mixture.pure or base in DENSE:
            return base
        if role is Role.HEAD or (role is Role.EMBED and self.tied):
            return self.head()
        if self.mixture.rules == CARD:
            return self.card(role)
        if name == "MXFP4_MOE":
            return T.MXFP4 if role in EXPERT and self.config.num_experts > 1 else T.Q8_0
        return self.by_role(role, layer)

    def by_role(self, role: Role, layer: int) -> DType:
        name, base = self.mixture.name, self.mixture.base
        if role is Role.EMBED:
            return {"IQ2_S": T.IQ3_S, "IQ2_M": T.IQ3_S, "IQ3_XXS": T.IQ3_S}.get(name, T.Q2_K if name in _LOW else base)
        if name in _LOW:
            return self.low(role, layer)
        rules: dict[Role, Callable[[int], DType]] = {
            Role.V: self.value, Role.K: self.key, Role.Q: self.query, Role.O: self.attention_output,
            Role.DOWN: self.down, Role.GATE: self.gate, Role.UP: self.gate,
        }  # fmt: skip
        return rules[role](layer)

    def head(self) -> DType:
        name, base = self.mixture.name, self.mixture.base
        if self.mixture.output:  # a tied embedding is both
            return self.mixture.output
        if name == "MXFP4_MOE" or not _fits(base, self.config.hidden_size):
            return T.Q8_0
        if name in (*_LOW, "IQ3_XXS"):
            return T.Q5_K
        return base if base is T.Q8_0 else T.Q6_K

    def card(self, role: Role) -> DType:
        """December 2023: the rules for ffn_down looked for names that no expert had."""
        if role in (Role.K, Role.V) and self.eight:
            return T.Q8_0
        return _CARD_OUTPUTS.get(self.mixture.name, self.mixture.base) if role is Role.O else self.mixture.base

    @property
    def eight(self) -> bool:
        """llama.cpp has rules of its own for models of eight experts, and for no other number."""
        return self.config.num_experts == 8

    @property
    def grouped(self) -> bool:
        return self.config.num_heads // self.config.num_kv_heads >= 4

    def before(self, layer: int, share: int) -> bool:
        return layer < self.config.num_layers // share

    def more(self, layer: int) -> bool:
        """Layers that get more bits: the first and last eighth, and every third between."""
        layers = self.config.num_layers
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2

    def low(self, role: Role, layer: int) -> DType:
        """One and two bits: what matters most is kept wider."""
        name, base = self.mixture.name, self.mixture.base
        wider = T.IQ3_S if name in ("IQ2_S", "IQ2_M") else T.Q2_K
        if role is Role.V:
            return T.Q4_K if self.grouped or self.config.num_experts >= 4 else wider
        if role is Role.K and self.eight:
            return T.Q4_K
        if role is Role.DOWN and self.before(layer, 8):
            return wider
        if role is Role.O:
            ones = {"IQ1_S": T.IQ2_XXS, "IQ1_M": T.IQ2_XXS, "IQ2_S": T.IQ3_S, "IQ2_M": T.IQ3_S}
            return T.Q5_K if self.eight else ones.get(name, base)
        return base

    def value(self, layer: int) -> DType:
        name, base = self.mixture.name, self.mixture.base
        if self.eight:
            return T.Q8_0
        by_name: dict[str, DType] = {
            "Q2_K": T.Q4_K if self.grouped else T.Q3_K,
            "Q2_K_S": T.Q4_K if self.grouped else base,
            "IQ3_XXS": T.Q4_K if self.grouped else T.IQ3_XXS if self.imatrix else T.IQ3_S,
            "IQ3_XS": T.Q4_K if self.grouped else base,
            "IQ3_S": T.Q4_K if self.grouped else base,
            "IQ3_M": T.Q4_K,
            "Q3_K_M": T.Q5_K if layer < 2 else T.Q4_K,
            "Q3_K_L": T.Q5_K,
            "IQ4_NL": T.Q5_K if self.grouped else base,
            "IQ4_XS": T.Q5_K if self.grouped else base,
            "Q4_K_M": T.Q6_K if self.more(layer) else base,
            "Q5_K_M": T.Q6_K if self.more(layer) else base,
            "Q4_K_S": T.Q5_K if layer < 4 else base,
        }
        found = by_name.get(name, base)
        large = self.config.num_layers == 80 and self.config.num_heads != self.config.num_kv_heads  # to llama.cpp a 70B
        if large and found in (T.Q3_K, T.Q4_K):
            return T.Q5_K
        return found

    def key(self, layer: int) -> DType:
        return T.Q8_0 if self.eight else self.query(layer)

    def query(self, layer: int) -> DType:
        return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(self.mixture.name, self.mixture.base)

    def attention_output(self, layer: int) -> DType:
        name, base = self.mixture.name, self.mixture.base
        if self.eight:
            wide = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M",
                    "IQ4_XS")  # fmt: skip
            return T.Q5_K if name in wide else base
        others = {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K}
        return others.get(name, base)

    def down(self, layer: int) -> DType:
        name, base = self.mixture.name, self.mixture.base
        eighth = self.before(layer, 8)
        always = {"Q2_K": T.Q3_K, "Q3_K_M": T.Q5_K if self.before(layer, 16) else T.Q4_K, "Q3_K_L": T.Q5_K}
        if name in always:
            return always[name]
        if name == "IQ3_XXS" and not self.imatrix:
            return T.Q4_K if eighth else T.Q3_K
        widened = {
            "Q2_K_S": (eighth, T.Q4_K), "IQ3_M": (eighth or (self.eight and self.more(layer)), T.Q4_K),
            "Q4_K_M": (self.more(layer), T.Q6_K), "Q5_K_M": (self.more(layer), T.Q6_K), "Q4_K_S": (eighth, T.Q5_K),
            "IQ4_NL": (eighth and not self.imatrix, T.Q5_K), "IQ4_XS": (eighth and not self.imatrix, T.Q5_K),
            "Q4_0": (eighth and self.imatrix, T.Q4_1), "Q5_0": (eighth and self.imatrix, T.Q5_1),
        }  # fmt: skip
        holds, wider = widened.get(name, (False, base))
        return wider if holds else base

    def gate(self, layer: int) -> DType:
        layers = self.config.num_layers
        middle = layers // 8 <= layer < 7 * layers // 8
        return T.IQ3_XXS if self.mixture.name == "IQ3_XS" and middle else self.mixture.base


def needs_imatrix(mixture: Mixture, choices: Mapping[Slot, Choice]) -> Iterator[tuple[Slot, DType]]:
    """Tensors that llama.cpp does not quantize without an importance matrix."""
    for slot, (dtype, _) in choices.items():
        if slot.role in (Role.EMBED, Role.HEAD):
            continue
        if dtype in NEED_IMATRIX or (dtype is T.Q2_K and mixture.name == "Q2_K_S"):
            yield slot, dtype
