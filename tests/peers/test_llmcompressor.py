"""What llm-compressor writes, in our reading: packed integers under names of its own, half legacy and half v5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from peers import made
from transformers import AutoModelForCausalLM

import mixtools
from mixtools.formats import PackedInts
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage.dtypes import DType

pytestmark = [
    pytest.mark.peers("llmcompressor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SCHEMES = {
    "W4A16": PackedInts(4, 128),
    "W4A16_ASYM": PackedInts(4, 128, symmetric=False),
    "W8A16": PackedInts(8, 128),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_its_folder_is_the_model_that_it_made(scheme: str, dtype: str, tmp_path: Path) -> None:
    texts, kind = made.windows(), {"f16": DType.F16, "bf16": DType.BF16}[dtype]
    mixtools.convert(made.NANO, tmp_path / "source", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=kind.torch())
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*gate$"])
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "out"))
    found = open_checkpoint(tmp_path / "out")
    assert found.quantized() == [SCHEMES[scheme].to(kind)]
    ours = made.ours(tmp_path / "out", texts)
    made.expect_equal(made.theirs(model.float(), texts), ours, made.Arithmetic(1e-3, 1e-4))
    golden = json.loads((Path(__file__).parents[1] / "golden" / "compressed-config.json").read_text("utf-8"))
    about = made.config(tmp_path / "out")["quantization_config"]
    assert isinstance(about, dict) and about.keys() == golden["sym"].keys()


def test_its_own_words_are_the_golden_ones(tmp_path: Path) -> None:
    """Every key of a scheme, but for the list of modules, which names two layers here."""
    mixtools.convert(made.NANO, tmp_path / "source", dtype="f16")
    golden = json.loads((Path(__file__).parents[1] / "golden" / "compressed-config.json").read_text("utf-8"))
    for scheme, name in (("W4A16", "sym"), ("W4A16_ASYM", "asym")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float16)
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*gate$"])
        oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / name))
        about = made.config(tmp_path / name)["quantization_config"]
        assert isinstance(about, dict)
        assert {**about, "ignore": None} == {**golden[name], "ignore": None}
