"""Who loads what: as the tests of peers/ measure it, by missing and unexpected keys and by logits.

The README's table is this one; a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple

LEGACY, V5 = "legacy", "v5"


class Row(NamedTuple):
    """A format with a spelling of expert names ("" where there is but one)."""

    format: str
    names: str
    loads: str
    refuses: str = ""
    wrongly: str = ""

    @property
    def title(self) -> str:
        return f"{self.format}, {self.names}" if self.names else self.format


TABLE = (
    Row(
        "auto-gptq", LEGACY,
        "auto-gptq 0.7.1 (2, 3, 4, 8 bits, symmetric or not); vLLM 0.32 with 4 bits symmetric, near (8-bit "
        "activations: same top 96.9 %)",
        "GPTQModel 7.7; transformers alone; vLLM: asymmetric or 8 bits",
        "transformers 5.23 through GPTQModel: 192 keys missing",
    ),
    Row(
        "auto-gptq", V5, "GPTQModel, and transformers 5 through it (symmetric)", "vLLM; GPTQModel: asymmetric",
        "auto-gptq: experts zero",
    ),
    Row(
        "autoawq", LEGACY, "autoawq 0.2.9", "vLLM; transformers alone",
        "GPTQModel and transformers 5 through it: experts random",
    ),
    Row("autoawq", V5, "GPTQModel, and transformers 5 through it", "autoawq"),
    Row(
        "compressed-tensors", LEGACY, "transformers 5 (symmetric) and 4.57; vLLM with 4 bits symmetric, near",
        "transformers 5 and vLLM: asymmetric",
    ),
    Row("compressed-tensors", V5, "", "transformers 4; vLLM", "transformers 5: experts random"),
    Row("nf4", LEGACY, "transformers 4", "transformers 5; vLLM"),
    Row("int8", LEGACY, "transformers 4", "", "transformers 5: codes taken for weights"),
    Row("nf4 or int8", V5, "", "transformers 4", "transformers 5: experts random"),
    Row("dense", LEGACY, "transformers 4 and 5, vLLM"),
    Row("GGUF", "", "llama.cpp"),
)  # fmt: skip


def of(format: str, names: str) -> Row | None:
    """The row of a format ("auto-gptq", "nf4", "dense", "GGUF", ...); None where none was measured."""
    for row in TABLE:
        if format in row.format.split(" or ") and row.names in ("", names):
            return row
    return None
