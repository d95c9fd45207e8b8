"""Golden bytes of auto-gptq, autoawq and compressed-tensors (tests/golden): ours are theirs, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtools import formats
from mixtools.formats import Awq, Gptq, PackedInts, Stored
from mixtools.storage.dtypes import DType

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"gptq": load_file(GOLDEN / "gptq.safetensors"), "awq": load_file(GOLDEN / "awq.safetensors"),
         "compressed": load_file(GOLDEN / "compressed.safetensors")}  # fmt: skip
CASES = sorted({(file, name.rpartition(".")[0]) for file, stored in FILES.items() for name in stored})


def told(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}-config.json").read_text("utf-8"))


def case(file: str, name: str) -> tuple[Gptq | Awq | PackedInts, dict[str, torch.Tensor]]:
    parts = {key.rpartition(".")[2]: part for key, part in FILES[file].items() if key.rpartition(".")[0] == name}
    bits, group, symmetric = (
        int(word) if word.lstrip("-").isdigit() else word == "sym" for word in name.split(".")[:3]
    )
    if file == "gptq":
        return Gptq(bits, group, symmetric="asym" not in name), parts
    if file == "awq":
        return Awq(group, symmetric=bool(symmetric)), parts
    return PackedInts(bits, group, DType.of(parts["weight_scale"].dtype), symmetric=bool(symmetric)), parts


@pytest.mark.parametrize(("file", "name"), CASES)
def test_unpacked_as_the_package_multiplies_with_it(file: str, name: str) -> None:
    kind, parts = case(file, name)
    shape = tuple(parts["codes"].shape)
    found = kind.decode([parts[part.suffix] for part in kind.parts(shape)])
    assert torch.equal(found, parts["weight"].to(found.dtype)) and found.dtype == parts["weight"].dtype


@pytest.mark.parametrize(("file", "name"), [one for one in CASES if not one[1].endswith("order")])
def test_packed_to_the_package_s_bytes(file: str, name: str) -> None:
    kind, parts = case(file, name)
    scales = parts["weight_scale"] if file == "compressed" else parts["scales"].T
    packed = kind.encode(parts["codes"], scales.float().contiguous(), parts["zeros"])
    assert len(packed.parts) == len(parts) - 3  # codes, zeros and weight are what went in and came out
    for part, planned in zip(packed.parts, kind.parts(tuple(parts["codes"].shape)), strict=True):
        theirs = parts[planned.suffix]
        assert part.dtype == theirs.dtype and torch.equal(part, theirs), planned.suffix


@pytest.mark.parametrize(("file", "name"), CASES)
def test_recognised_by_the_package_s_own_configuration(file: str, name: str) -> None:
    kind, parts = case(file, name)
    if file == "gptq":
        about = {**told("gptq")["config.json"], "bits": kind.bits, "group_size": kind.group, "sym": kind.symmetric}
    elif file == "awq":
        about = {**told("awq")["config.json"], "group_size": kind.group, "zero_point": not kind.symmetric}
    else:
        about = told("compressed")["sym" if kind.symmetric else "asym"]
        weights = about["config_groups"]["group_0"]["weights"]
        whole = {"strategy": "channel", "group_size": None} if kind.group == -1 else {"group_size": kind.group}
        weights |= {"num_bits": kind.bits, **whole}
    assert formats.claims(about)
    stored = {suffix: Stored(DType.of(part.dtype), tuple(part.shape)) for suffix, part in parts.items()}
    suffixes = set(kind.suffixes)
    assert formats.detect({suffix: one for suffix, one in stored.items() if suffix in suffixes}, about) == kind


def test_configurations_say_what_the_packages_say() -> None:
    assert Awq(128).fragment()["quantization_config"] == told("awq")["config.json"]
    ours, theirs = Gptq(4, 128).fragment()["quantization_config"], told("gptq")["quantize_config.json"]
    assert {**theirs, **ours} == {**theirs, "checkpoint_format": "gptq"}
    assert theirs.keys() - ours.keys() == {"damp_percent", "is_marlin_format"}
    for symmetric, name in ((True, "sym"), (False, "asym")):
        ours, theirs = (
            PackedInts(4, 128, symmetric=symmetric).fragment()["quantization_config"],
            told("compressed")[name],
        )
        weights, their_weights = (one["config_groups"]["group_0"].pop("weights") for one in (ours, theirs))
        assert {**their_weights, **weights, "observer": 0} == {**their_weights, "observer": 0}
        assert {**theirs, **ours, "ignore": []} == {**theirs, "ignore": []}
