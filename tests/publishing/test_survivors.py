"""What a fault planted in card or push got past the other tests with: each test here is one that catches it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.loopback import Hub, Repository
from matplotlib.figure import Figure
from publishing import made

import mixtools
from mixtools import errors
from mixtools.checking import recording
from mixtools.publishing import card as cards
from mixtools.publishing import outputs as found
from mixtools.publishing import push as pushing
from mixtools.publishing.outputs import find
from mixtools.publishing.picture import Point, png
from mixtools.publishing.ways import Subject, ways
from mixtools.storage import checked

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
REPO = "me/nano"
OPENS = {"config.json", "model.safetensors.index.json"}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, hub: Hub, slept: list[float]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def held(hub: Hub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    return {path: blob.read() for path, blob in hub.repositories[repo].branches[branch].items()}


def states(kept: Repository, since: int) -> list[dict[str, str]]:
    """After each commit from the `since`th: the file's hash by its path."""
    return [{path: blob.etag for path, blob in kept.snapshots[one.oid].items()} for one in kept.commits[since:]]


def changed(*files: Path) -> None:
    """The last byte of each: a weight."""
    for file in files:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("| ") and name in line.split("|")[1])
    return [cell.strip() for cell in line.split("|")[1:-1]]


# --- push: what is there in between ---


def test_nothing_opens_the_weights_of_two_models(tmp_path: Path, hub: Hub) -> None:
    """Shards of the same names, other bytes: config and index go first, and come back last."""
    out = made.gptq(tmp_path)
    mixtools.push([out], REPO)
    kept = hub.repositories[REPO]
    since, old = len(kept.commits), {path: blob.etag for path, blob in kept.branches["main"].items()}
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    changed(*(out / name for name in shards))
    done = mixtools.push([out], REPO, unchecked=True)
    new = {path: blob.etag for path, blob in kept.branches["main"].items()}
    assert all(old[name] != new[name] for name in shards) and new.keys() >= OPENS
    first, *between, last = states(kept, since)
    assert not OPENS & first.keys() and {name: first[name] for name in shards} == {name: old[name] for name in shards}
    assert len(between) == len(shards) and all(not OPENS & state.keys() for state in between)
    assert last.keys() >= OPENS and done.sent[0].commits == len(shards) + 2


def test_parts_of_a_gguf_are_never_of_two(tmp_path: Path, hub: Hub) -> None:
    mixtools.quantize(made.source(), tmp_path / "set", type="Q8_0", name="nano", max_shard_size="2MB")
    parts = sorted((tmp_path / "set").glob("*-of-*.gguf"))
    assert len(parts) > 2
    mixtools.push(tmp_path / "set", REPO, unchecked=True)
    kept = hub.repositories[REPO]
    since, old = len(kept.commits), {path: blob.etag for path, blob in kept.branches["main"].items()}
    changed(*parts[-2:])
    mixtools.push(tmp_path / "set", REPO, unchecked=True)
    new = {path: blob.etag for path, blob in kept.branches["main"].items()}
    names = [path.name for path in parts]
    for state in states(kept, since):
        there = [state.get(name) for name in names]
        assert None in there or there in ([old[name] for name in names], [new[name] for name in names])


def test_a_whole_gguf_is_replaced_at_once(tmp_path: Path, hub: Hub) -> None:
    out = made.gguf(tmp_path)
    mixtools.push(out, REPO)
    kept = hub.repositories[REPO]
    since = len(kept.commits)
    changed(out / "nano.Q8_0.gguf")
    mixtools.push(out, REPO, unchecked=True)
    assert all("nano.Q8_0.gguf" in state for state in states(kept, since))
    assert not any(commit.deleted for commit in kept.commits[since:])


def test_a_gguf_takes_nothing_away(tmp_path: Path, hub: Hub) -> None:
    mixtools.push([made.gptq(tmp_path)], REPO)
    before = held(hub).keys()
    mixtools.push(made.gguf(tmp_path), REPO)
    assert before <= held(hub).keys()


def test_a_branch_starts_empty(tmp_path: Path, hub: Hub) -> None:
    """And not from what main holds by now."""
    hub.create(REPO, {"theirs.bin": b"x"})
    mixtools.push([made.gptq(tmp_path)], REPO, branch="new")
    assert "theirs.bin" in held(hub) and "theirs.bin" not in held(hub, branch="new")


def test_a_withdrawal_whose_answer_was_lost(tmp_path: Path, hub: Hub) -> None:
    """It was made: not again, since what is gone cannot be deleted. It was not: it is made."""
    for number, drop in enumerate((True, False)):
        out, repo = made.gptq(tmp_path / str(number)), f"me/nano-{number}"
        mixtools.push([out], repo)
        changed(*out.glob("*.safetensors"))
        hub.fail("POST", r"/commit/", **({"drop": True} if drop else {"status": 503}))
        mixtools.push([out], repo, unchecked=True)
        told = [one for one in hub.repositories[repo].commits if one.deleted]
        assert len(told) == 1 and {*told[0].deleted} >= OPENS


def test_each_wait_is_longer(tmp_path: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("GET", "whoami", status=503, times=3)
    mixtools.push([made.gptq(tmp_path)], REPO)
    assert [seconds for seconds in slept if seconds > 0][:3] == [2, 4, 8]


# --- push: what is fit ---


def test_unjudged_says_nothing_of_what_was_not_checked(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / checked.NAME).unlink()
    with pytest.raises(errors.CheckFailed, match="was not checked"):
        mixtools.push([out], REPO, unjudged=True)
    assert not hub.requests


def test_every_one_is_judged(tmp_path: Path, hub: Hub) -> None:
    one, other, files = made.gptq(tmp_path), made.gptq(tmp_path, 8, 32), made.gguf(tmp_path)
    changed(next(other.glob("*.safetensors")), files / "nano.Q8_0.gguf")
    for outputs in ([one, other], [files]):
        with pytest.raises(errors.CheckFailed, match="has changed since it was checked"):
            mixtools.push(outputs, REPO)
    assert not hub.requests


def test_what_was_changed_while_it_was_checked_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made.gptq(tmp_path)
    (out / checked.NAME).unlink()
    read = recording.hashes

    def meanwhile(paths: list[Path], *rest: Any) -> Any:
        told = read(paths, *rest)
        changed(next(out.glob("*.safetensors")))
        return told

    monkeypatch.setattr(recording, "hashes", meanwhile)
    done = mixtools.check(out, made.source(), gate=made.GATES, **made.CHECK)
    assert "was changed while it was checked" in str(done.notes) and not (out / checked.NAME).exists()


# --- pull requests ---

TITLE = "Add model-00001-of-00004.safetensors and 3 more"


@pytest.mark.parametrize(
    ("asked", "continued"),
    [
        ((TITLE, "me", "draft"), True), ((TITLE, "me", "open"), True), ((TITLE, "me", "closed"), False),
        ((TITLE, "me", "merged"), False), ((TITLE, "somebody", "draft"), False),
        (("Add another", "me", "draft"), False),
    ],
)  # fmt: skip
def test_which_pull_request_is_continued(tmp_path: Path, hub: Hub, asked: tuple[str, ...], continued: bool) -> None:
    title, author, status = asked
    kept = hub.create(REPO, {"config.json": b"{}"})
    kept.propose(title, author, status, "main")
    done = mixtools.push([made.gptq(tmp_path)], REPO, create_pr=True)
    assert done.sent[0].revision == ("refs/pr/1" if continued else "refs/pr/2")
    assert len(kept.pull_requests) == (1 if continued else 2)
    assert ("README.md" in kept.branches["refs/pr/1"]) == continued


# --- which files, which branch ---


@pytest.mark.parametrize(
    ("group", "ordered", "name"),
    [
        (-1, False, "gptq-4bit-rows"), (128, True, "gptq-4bit-128g-actorder_True"), (128, False, "gptq-4bit-128g"),
    ],
)  # fmt: skip
def test_a_branch_is_called_by_its_configuration(tmp_path: Path, group: int, ordered: bool, name: str) -> None:
    out = made.gptq(tmp_path, group=group)
    for file in (out / "config.json", out / "quantize_config.json"):
        document = json.loads(file.read_text())
        document.get("quantization_config", document)["desc_act"] = ordered
        file.write_text(json.dumps(document))
    (output,) = find([out])
    assert pushing.branch_name(output) == name


def test_a_branch_of_compressed_tensors_says_so(tmp_path: Path) -> None:
    given = {"calibration": made.TEXT, "samples": 4, "seq_len": 64, "format": "compressed-tensors"}
    mixtools.quantize(made.source(), tmp_path / "ct", method="gptq", **given)
    assert pushing.branch_name(*find([tmp_path / "ct"])) == "gptq-4bit-128g-compressed-tensors"


def test_what_goes_with_one_file_of_a_set(tmp_path: Path, hub: Hub) -> None:
    """Its own reports and the set's importance matrix; not those of files that stay, and nothing hidden."""
    out = made.gguf(tmp_path)
    for name in ("nano.Q8_0.quantize-report.json", "nano.Q4_K_M.quantize-report.json"):
        (out / name).write_text("{}")
    shutil.copy(out / "nano.Q8_0.gguf", out / "nano.imatrix.gguf")
    (out / ".secret").write_text("x")
    (out / "own.txt").write_text("x")
    done = mixtools.push([out / "nano.Q8_0.gguf"], REPO)
    there = held(hub).keys()
    assert {"nano.Q8_0.gguf", "nano.Q8_0.quantize-report.json", "nano.imatrix.gguf"} <= there
    assert not there & {"nano.Q4_K_M.gguf", "nano.Q4_K_M.quantize-report.json", ".secret", "own.txt"}
    assert done.branches[0].left_out == ("own.txt",)


def test_importance_matrix_and_later_parts_are_no_outputs(tmp_path: Path) -> None:
    mixtools.quantize(made.source(), tmp_path / "set", type="Q8_0", name="nano", max_shard_size="2MB")
    first = min((tmp_path / "set").glob("*.gguf"))
    shutil.copy(first, tmp_path / "set" / "nano.imatrix.gguf")
    assert [output.name for output in find([tmp_path / "set"])] == [first.name]


def test_one_repository_is_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = made.gptq(tmp_path), made.gptq(tmp_path, 8, 32)
    sizes = {one: (1,), other: (2,)}
    monkeypatch.setattr(found, "_sizes", lambda output: sizes[output.folder])
    with pytest.raises(errors.LayoutError, match="is a model of other sizes"):
        mixtools.card([one, other])
    monkeypatch.undo()
    files, more = made.gguf(tmp_path), made.gguf(tmp_path / "more")
    with pytest.raises(errors.UsageError, match="lie in several folders"):
        mixtools.card([files / "nano.Q8_0.gguf", more / "nano.Q4_K_M.gguf"])


# --- card: figures ---


def told(out: Path, name: str, **figures: Any) -> None:
    """Other figures in the record of a check, whose bytes stay."""
    file = out / checked.NAME
    document = json.loads(file.read_text())
    for key, value in figures.items():
        document["outputs"][name]["document"][key].update(value)
    file.write_text(json.dumps(document))


def test_each_figure_of_a_row(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    told(out, "nano.Q8_0.gguf", perplexity={"source": 10.0, "output": 11.0}, kld={"mean": 0.25, "stderr": 0.125})
    text = mixtools.card([out], repository="me/nano").text
    size = (out / "nano.Q8_0.gguf").stat().st_size
    parameters = mixtools.open(out / "nano.Q8_0.gguf").config.num_parameters
    link, kind, bits, _, ram, perplexity, kld, same, _ = row(text, "nano.Q8_0.gguf")
    assert link == "[nano.Q8_0.gguf](https://huggingface.co/me/nano/blob/main/nano.Q8_0.gguf)" and kind == "Q8_0"
    assert bits == f"{8 * size / parameters:.2f}" and 8 < float(bits) < 9
    assert ram == f"{(size + 2.5e9) / 1e9:.2f} GB"
    assert (perplexity, kld) == ("11.0000 (+10.00 %)", "0.25000 ± 0.12500")
    assert same == f"{100 * checked.load(out)['nano.Q8_0.gguf'].document['same_top']:.2f} %"


def test_which_file_is_recommended(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    for small, large, wanted in ((0.009, 0.001, "Q4_K_M"), (0.011, 0.001, "Q8_0"), (0.02, 0.03, "")):
        told(out, "nano.Q4_K_M.gguf", kld={"mean": small})
        told(out, "nano.Q8_0.gguf", kld={"mean": large})
        text = mixtools.card([out]).text
        said = re.findall(r"`nano\.(\w+)\.gguf` is the smallest", text)
        assert said == ([wanted] if wanted else [])
    told(out, "nano.Q4_K_M.gguf", kld={"mean": 0.001})
    document = json.loads((out / checked.NAME).read_text())
    document["outputs"]["nano.Q4_K_M.gguf"]["verdict"] = "failed"
    (out / checked.NAME).write_text(json.dumps(document))
    told(out, "nano.Q8_0.gguf", kld={"mean": 0.002})
    assert "`nano.Q8_0.gguf` is the smallest" in mixtools.card([out]).text


def test_what_was_measured_otherwise_is_told_of_whom(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    assert "`nano.Q8_0.gguf`: perplexity over" not in mixtools.card([out]).text
    told(out, "nano.Q8_0.gguf", perplexity={"ctx": 77})
    text = mixtools.card([out]).text
    (line,) = [line for line in text.splitlines() if "windows of 77 tokens" in line]
    assert line.startswith("- `nano.Q8_0.gguf`: perplexity over")


def test_a_card_links_a_relation_to_a_base_alone(tmp_path: Path) -> None:
    """That of the source's card is the source's base, and not ours."""
    text = mixtools.card([made.gptq(tmp_path)]).text
    assert "base_model" not in text.split("\n---\n")[0]


def test_hashes_are_told_by_branch(tmp_path: Path) -> None:
    one, other = made.gptq(tmp_path), made.gptq(tmp_path, 8, 32)
    text = mixtools.card([one, other]).text
    for branch, folder in (("gptq-4bit-128g", one), ("gptq-8bit-32g", other)):
        digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        assert f"{digest}  {branch}/config.json" in text


def test_a_licence_with_its_link(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = Path(shutil.copytree(made.source(), tmp_path / "source"))
    head = "license: other\nlicense_name: mine\nlicense_link: LICENSE"
    (source / "README.md").write_text(f"---\n{head}\n---\n# Nano\n")
    mixtools.quantize(source, out, type="Q8_0", name="nano")
    text = mixtools.card([out]).text
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "mine", "LICENSE")
    assert "other, as the source's card says (LICENSE)." in text


def test_a_cell_keeps_its_column() -> None:
    assert cards._cell("a|b") == "a\\|b"


# --- card: picture ---


def test_points_are_sizes_and_divergences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = made.gguf(tmp_path), []

    def drawn(points: Sequence[Point], source: str) -> bytes:
        seen.extend(points)
        return png(points, source)

    monkeypatch.setattr(cards, "png", drawn)
    mixtools.card([out])
    means = {name: record.document["kld"]["mean"] for name, record in checked.load(out).items()}
    assert sorted(seen) == [
        Point(type, (out / name).stat().st_size, means[name])
        for type, name in (("Q4_K_M", "nano.Q4_K_M.gguf"), ("Q8_0", "nano.Q8_0.gguf"))
    ]


def test_axes_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw))[1])
    png([Point("large", 28_000_000_000, 0.006), Point("small", 17_000_000_000, 0.06)], "nano")
    (axes,) = drawn[0].axes
    for line in axes.lines:
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([17.0, 28.0], [0.06, 0.006])
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("small", (17.0, 0.06)), ("large", (28.0, 0.006))]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("size, GB", "log")
    assert "KL divergence from nano" in axes.get_ylabel()


# --- card: how to run it ---


def test_ways_name_branch_and_template() -> None:
    for format in ("dense", "auto-gptq"):
        subject = Subject("me/x", format, bits=4, symmetric=True, revision="b", chat=False)
        for way in ways(subject):
            named = 'revision="b"' in way.code or "--revision b" in way.code or "me/x@b" in way.code
            assert named, way
            assert "apply_chat_template" not in way.code and "--chat" not in way.code
    codes = [way.code for way in ways(Subject("me/x", "GGUF", "", file="x.gguf", kind="Q8_0", chat=False))]
    assert any("-no-cnv" in code for code in codes)
    codes = [way.code for way in ways(Subject("me/x", "GGUF", "", file="x.gguf", kind="Q8_0", chat=True))]
    assert not any("-no-cnv" in code for code in codes)
