"""Values of GGUF's metadata: each has a type, which a file that is written anew must keep.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple


class Kind(IntEnum):
    """The format's gguf_metadata_value_type."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class Value(NamedTuple):
    """`value`: an int, float, bool or str; of an array a list of those, all of the kind `item`."""

    kind: Kind
    value: Any
    item: Kind | None = None


Metadata = Mapping[str, Value]


def uint32(value: int) -> Value:
    return Value(Kind.UINT32, value)


def float32(value: float) -> Value:
    return Value(Kind.FLOAT32, value)


def boolean(value: bool) -> Value:
    return Value(Kind.BOOL, value)


def string(value: str) -> Value:
    return Value(Kind.STRING, value)


def array(item: Kind, values: Sequence[Any]) -> Value:
    return Value(Kind.ARRAY, list(values), item)


def to_json(metadata: Metadata) -> bytes:
    """The same as text: {"general.name": {"kind": "string", "value": "Mixtral"}, ...}."""
    told = {
        key: {
            "kind": kind.name.lower(), **({"item": item.name.lower()} if item is not None else {}), "value": value
        }
        for key, (kind, value, item) in metadata.items()
    }  # fmt: skip
    return (json.dumps(told, indent=1) + "\n").encode()


def from_json(document: Mapping[str, Any]) -> dict[str, Value]:
    """Inverse of `to_json`. Raises KeyError or TypeError for what is none of its documents."""
    return {
        key: Value(
            Kind[told["kind"].upper()], told["value"], Kind[told["item"].upper()] if "item" in told else None
        )
        for key, told in document.items()
    }  # fmt: skip
