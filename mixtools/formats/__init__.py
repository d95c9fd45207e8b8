"""Formats: how the numbers of one matrix lie in stored tensors, whatever those are called.

    shape ─► Format.parts ─► (suffix, dtype, shape) of each stored tensor ─► planned before a byte is written
    stored tensors ─► detect ─► Format ─► decode ─► the dense matrix [out, in]

A format knows no name but the suffixes of its parts, and no place but the matrix; which matrix lies where, and in which
order its rows, is a layout's business (layouts/). A new format is one file here, and its line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import ByRows, Format, Packed, Part, Stored
from .factored import Factored
from .ggml import Ggml
from .plain import Plain

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "ByRows",
    "Factored",
    "Format",
    "Ggml",
    "Packed",
    "Part",
    "Plain",
    "Stored",
    "claims",
    "detect",
]

FORMATS: Sequence[type[Format]] = (Factored, Ggml, Plain)  # the first that recognises what is stored is the one
SUFFIXES = tuple(dict.fromkeys(suffix for kind in FORMATS for suffix in kind.suffixes))


def detect(stored: Mapping[str, Stored]) -> Format | None:
    """The format of a matrix, from its stored tensors by suffix; None where there are none that any format knows."""
    return next((found for kind in FORMATS if (found := kind.detect(stored)) is not None), None)


def claims(quantization: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of a config.json is that of a format here, so that its folder can be read."""
    return any(kind.claims(quantization) for kind in FORMATS)
