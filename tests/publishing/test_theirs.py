"""A card that lies on the Hub already, and ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.loopback import Hub
from publishing import made

import mixtools
from mixtools.publishing.theirs import placed
from mixtools.storage.sealed import seal, unsealed

REPO = "me/nano-GPTQ"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),
]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, hub: Hub, slept: list[float]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def held(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    return {path: blob.read() for path, blob in hub.repositories[repo].branches["main"].items()}


def test_a_card_that_somebody_wrote_on_the_hub_stays(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    hub.create(REPO, {"README.md": b"---\nlicense: mit\n---\n# Theirs\n"})
    done = mixtools.push([out], REPO)
    there = held(hub)
    assert there["README.md"] == b"---\nlicense: mit\n---\n# Theirs\n"
    assert there["README.mixtools.md"].startswith(b"---\n") and b"KL divergence" in there["README.mixtools.md"]
    assert done.sent[0].card == "README.mixtools.md"
    assert "README.md there is somebody's own and stays" in "\n".join(done.lines())
    commits = len(hub.repositories[REPO].commits)
    assert mixtools.push([out], REPO).sent[0].commits == 0 and len(hub.repositories[REPO].commits) == commits


def test_a_card_of_ours_that_was_edited_there_stays(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    mixtools.push([out], REPO)
    there = held(hub)
    edited = there["README.md"].replace(b"\n# ", b"\n# My ", 1)
    hub.repositories.pop(REPO)
    hub.create(REPO, {**there, "README.md": edited})
    mixtools.push([out], REPO)
    assert edited != there["README.md"] and held(hub)["README.md"] == edited and "README.mixtools.md" in held(hub)


def test_an_older_card_of_ours_is_replaced(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    mixtools.push([out], REPO)
    done = mixtools.push([out], REPO, quantized_by="me")
    assert b"quantized_by: me" in held(hub)["README.md"] and done.sent[0].card == "README.md"
    assert "README.mixtools.md" not in held(hub)


def test_what_the_form_for_a_new_repository_wrote_goes_into_ours(tmp_path: Path, hub: Hub) -> None:
    """The licence chosen there is kept, also the next time; one that the source tells goes before it."""
    out = made.gptq(tmp_path)
    (out / "README.md").unlink()
    hub.create(REPO, {"README.md": b"---\nlicense: mit\ntags:\n- x\n---\n"})
    for by in (None, "me"):
        mixtools.push([out], REPO, quantized_by=by)
        card = held(hub)["README.md"]
        assert unsealed(card) is not None and card.startswith(b"---\nlicense: mit\n") and b"- x\n" not in card
        assert "README.mixtools.md" not in held(hub)
    hub.create("me/other", {"README.md": b"---\nlicense: mit\n---\n"})
    mixtools.push([made.gptq(tmp_path / "whole")], "me/other")
    assert b"license: apache-2.0" in held(hub, "me/other")["README.md"]


def test_somebody_s_own_card_beside_the_output_goes_before_theirs(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    hub.create(REPO, {"README.md": b"# Theirs\n"})
    assert mixtools.push([out], REPO).sent[0].card == "README.md"
    assert held(hub)["README.md"].endswith(b"# Mine\n") and "README.mixtools.md" not in held(hub)


@pytest.mark.parametrize(
    "theirs", [b"", b"\n", b"---\r\nlicense: mit\r\n---\r\n", b"---\n: [\n---\n", b"---\nlicense: [a, b]\n---"]
)
def test_what_is_no_card_yet_is_replaced(theirs: bytes) -> None:
    path, data = placed(seal("---\ntags: []\n---\nours\n"), theirs)
    assert path == "README.md" and (text := unsealed(data)) is not None and text.endswith("---\nours\n")
    assert ("license: mit" in text) == (b"mit" in theirs)


@pytest.mark.parametrize("theirs", [b"words", b"---\nlicense: mit\n---\n\xff", seal("a\n") + b"more\n"])
def test_what_holds_a_word_stays(theirs: bytes) -> None:
    ours = seal("---\ntags: []\n---\nours\n")
    assert placed(ours, theirs) == ("README.mixtools.md", ours)
