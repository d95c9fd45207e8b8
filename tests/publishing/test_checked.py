"""mixtools-check.json: what a check leaves for card and push."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from publishing import made

import mixtools
from mixtools import errors
from mixtools.publishing.outputs import find, judge
from mixtools.storage import checked, sealed


def verdicts(*places: Path) -> list[str]:
    return [one.verdict for one in judge(find(places))]


def test_a_check_leaves_its_verdict_and_every_hash(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    document = json.loads((out / checked.NAME).read_text())
    (told,) = document["outputs"].values()
    assert [*document["outputs"]] == ["."]
    assert told["verdict"] == "passed" and told["document"]["passed"] is True
    for name, file in told["files"].items():
        data = (out / name).read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < told["files"].keys()
    assert sum(name.endswith(".safetensors") for name in told["files"]) > 2
    assert not told["files"].keys() & {"README.md", "mixtools.json", checked.NAME, "quantize-report.json", "LICENSE"}
    assert told["document"]["text"]["name"] == "text.txt"
    assert str(made.source().parent) not in (out / checked.NAME).read_text()  # it is published
    assert verdicts(out) == ["passed"]


def test_several_files_of_a_folder_have_their_own(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    assert [*checked.load(out)] == ["nano.Q4_K_M.gguf", "nano.Q8_0.gguf"]
    assert verdicts(out) == ["passed", "passed"]
    mixtools.check(out / "nano.Q8_0.gguf", made.source(), gate={"kld_mean": 0.0}, **made.CHECK)
    assert verdicts(out) == ["passed", "failed"]
    (out / "nano.Q8_0.gguf").unlink()
    mixtools.check(out / "nano.Q4_K_M.gguf", made.source(), gate=made.GATES, **made.CHECK)
    assert [*checked.load(out)] == ["nano.Q4_K_M.gguf"]


@pytest.mark.parametrize("what", ["a weight", "a config", "a file more", "a file less", "no record"])
def test_other_bytes_were_not_checked(tmp_path: Path, what: str) -> None:
    out = made.gptq(tmp_path)
    shard = next(out.glob("*.safetensors"))
    if what == "a weight":
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
    elif what == "a config":
        (out / "config.json").write_text((out / "config.json").read_text() + " ")
    elif what == "a file more":
        (out / "chat_template.jinja").write_text("{{ messages }}")
    elif what == "a file less":
        (out / "generation_config.json").unlink()
    else:
        (out / checked.NAME).unlink()
    (judged,) = judge(find([out]))
    assert judged.verdict == "unchecked" and judged.document == {}
    assert ("was not checked" if what == "no record" else "check") in judged.why


def test_no_record_and_the_hubs_cache(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    (out / checked.NAME).unlink()
    mixtools.check(out, made.source(), gate=made.GATES, record=False, **made.CHECK)
    assert not (out / checked.NAME).exists()
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(out, snapshot)
    found = mixtools.check(snapshot, made.source(), gate=made.GATES, **made.CHECK)
    assert found.verdict == "passed" and not (snapshot / checked.NAME).exists()


def test_a_check_stands_though_its_record_cannot_be_written(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    (out / checked.NAME).unlink()
    (out / checked.NAME).mkdir()
    found = mixtools.check(out, made.source(), gate=made.GATES, **made.CHECK)
    (note,) = found.notes
    assert found.verdict == "passed" and "is not recorded" in note
    (out / checked.NAME).rmdir()
    (out / checked.NAME).write_text("{}")
    assert "is no record of a check" in str(mixtools.check(out, made.source(), **made.CHECK).notes)
    with pytest.raises(errors.FormatError, match="delete it"):
        find([out])


def test_sealed_texts_are_known_until_they_are_edited(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(sealed.seal("# Title\n\nwords\n"))
    assert sealed.is_sealed(card)
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    assert sealed.is_sealed(card)
    for before, after in ((b"words", b"other words"), (b"-->", b"-->\nmore")):
        card.write_bytes(sealed.seal("# Title\n\nwords\n").replace(before, after))
        assert not sealed.is_sealed(card)
    assert not sealed.is_sealed(tmp_path / "none") and not sealed.is_sealed(tmp_path)


def test_overwrite_replaces_what_check_and_card_left(tmp_path: Path) -> None:
    """And keeps a card that somebody edited."""
    out = made.gptq(tmp_path)
    mixtools.card([out])
    again = {"method": "gptq", "calibration": made.TEXT, "samples": 4, "seq_len": 64, "overwrite": True}
    mixtools.quantize(made.source(), out, **again)
    assert (out / "README.md").read_text() == made.SOURCE_CARD  # the source's, as it comes along
    assert not (out / checked.NAME).exists()
    (out / "README.md").write_text("mine")
    with pytest.raises(errors.OutputExists, match=r"README\.md"):
        mixtools.quantize(made.source(), out, **again)
    assert (out / "README.md").read_text() == "mine"


def test_where_it_came_from(tmp_path: Path) -> None:
    """A model of the Hub's cache is told by name, through another layout, and not through a method."""
    snapshot = tmp_path / "models--org--nano" / "snapshots" / ("b" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(made.NANO, snapshot)
    mixtools.convert(snapshot, tmp_path / "hf", "hf")
    mixtools.quantize(tmp_path / "hf", tmp_path / "q", type="Q8_0", name="n")
    mixtools.laser(tmp_path / "hf", tmp_path / "low", layers="0", targets="w2", rank_rule="energy=0.9")
    mixtools.quantize(tmp_path / "low", tmp_path / "q2", type="Q8_0", name="n")
    told = [find([tmp_path / name])[0].entry["source"].get("repository") for name in ("hf", "q", "low", "q2")]
    assert told == ["org/nano", "org/nano", "org/nano", None]
