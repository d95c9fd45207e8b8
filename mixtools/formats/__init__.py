"""Formats: how the numbers of one matrix lie in stored tensors, whatever those are called.

    shape ─► Format.parts ─► (suffix, dtype, shape) of each stored tensor ─► planned before a byte is written
    stored tensors ─► detect ─► Format ─► decode ─► the dense matrix [out, in]

A format knows no name but the suffixes of its parts, and no place but the matrix; which matrix lies where, and in which
order its rows, is a layout's business (layouts/). A new format is one file here, and its line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .awq import Awq
from .base import ByRows, Format, Packed, Part, Quantized, Stored
from .factored import Factored
from .ggml import Ggml
from .gptq import Gptq
from .int8 import Int8
from .nf4 import Nf4
from .packed import PackedInts
from .plain import Plain

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Awq",
    "ByRows",
    "Factored",
    "Format",
    "Ggml",
    "Gptq",
    "Int8",
    "Nf4",
    "Packed",
    "PackedInts",
    "Part",
    "Plain",
    "Quantized",
    "Stored",
    "claims",
    "detect",
    "naming",
]

# the first that recognises what is stored is the one
FORMATS: Sequence[type[Format]] = (Factored, Gptq, Awq, PackedInts, Nf4, Int8, Ggml, Plain)
SUFFIXES = tuple(dict.fromkeys(suffix for kind in FORMATS for suffix in kind.suffixes))


def detect(stored: Mapping[str, Stored], quantization: Mapping[str, Any] | None = None) -> Format | None:
    """The format of a matrix, from its stored tensors by suffix and the `quantization_config` of its config.json.

    None where there are no tensors that any format knows.
    """
    return next((found for kind in FORMATS if (found := kind.detect(stored, quantization or {})) is not None), None)


def naming(fragment: Mapping[str, Any], plain: Sequence[str]) -> Mapping[str, Any]:
    """A format's fragment of config.json, with the modules that stay plain where it has a list of those to pass over.

    `plain`: names of linear modules, as the layout has them; a format knows none.
    """
    about = fragment.get("quantization_config", {})
    return {**fragment, "quantization_config": {**about, "ignore": [*plain]}} if "ignore" in about else fragment


def claims(quantization: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of a config.json is that of a format here, so that its folder can be read."""
    return any(kind.claims(quantization) for kind in FORMATS)
