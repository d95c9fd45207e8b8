"""mixtools push with the real client against a Hub on this machine: commits, resuming, faults, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub.loopback import Hub
from hub.loopback_client import connect
from huggingface_hub import constants
from publishing import made

import mixtools
from mixtools import errors
from mixtools.cli.main import main
from mixtools.publishing import client as hub_client
from mixtools.storage import checked

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
REPO = "me/nano-GPTQ"
SHARDS = 4


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, hub: Hub, slept: list[float]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def held(hub: Hub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    blobs = hub.repositories[repo].branches[branch]
    return {
        path: Path(b.content).read_bytes() if isinstance(b.content, Path) else b.content for path, b in blobs.items()
    }


def messages(hub: Hub, repo: str = REPO) -> list[str]:
    return [commit.message for commit in hub.repositories[repo].commits]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--json", "--quiet"])
    out = capsys.readouterr()
    assert "hf_good" not in out.out + out.err
    return int(caught.value.code or 0), json.loads(out.out)


def test_a_commit_for_each_weight_file_and_the_card_last(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / "notes.txt").write_text("mine")
    done = mixtools.push([out], REPO, base_model="org/nano", private=True)
    there, here = held(hub), made.read(out)
    assert hub.repositories[REPO].private
    weights = sorted(name for name in here if name.endswith(".safetensors"))
    assert len(weights) == SHARDS
    assert messages(hub)[-1 - SHARDS :] == [f"Add {name}" for name in weights] + [
        f"Add documents and card of {SHARDS} weight files"
    ]
    assert {name: there[name] for name in here if name in there} == {n: d for n, d in here.items() if n in there} | {
        "README.md": there["README.md"]
    }
    assert there.keys() - here.keys() <= {".gitattributes", "mixtools-card.png"}
    assert here.keys() - there.keys() == {"notes.txt"}
    assert {"LICENSE", "mixtools.json", checked.NAME, "quantize-report.html", "tokenizer.json"} < there.keys()
    assert b"base_model: org/nano" in there["README.md"]
    (branch,) = done.document["branches"]
    assert branch["left_out"] == ["notes.txt"] and (branch["sent"], branch["skipped"]) == (len(branch["files"]), 0)
    hashes = {file["path"]: file["sha256"] for file in branch["files"]}
    assert all(hashlib.sha256(there[path]).hexdigest() == told for path, told in hashes.items())


def test_again_sends_nothing(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    mixtools.push([out], REPO)
    commits, puts = len(messages(hub)), len(hub.paths("PUT"))
    done = mixtools.push([out], REPO)
    assert (len(messages(hub)), len(hub.paths("PUT"))) == (commits, puts)
    assert done.sent[0].sent == 0 and done.sent[0].skipped == len(done.branches[0].items)


def test_own_files_go_along_when_named(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / "notes.txt").write_text("mine")
    mixtools.push([out], REPO, include=["notes.txt"])
    assert held(hub)["notes.txt"] == b"mine"
    with pytest.raises(errors.InputError, match=r"other\.txt: does not exist"):
        mixtools.push([out], REPO, include=["other.txt"])


def test_a_recipe_that_names_this_machines_folders_stays(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    for told, goes in (("src: /home/me/nano", False), ("src: '~/nano'", False), ("src: nano # and/or", True)):
        (out / "recipe.yaml").write_text(f"steps:\n- do: quantize\n  {told}\n")
        done = mixtools.push([out], REPO)
        assert ("recipe.yaml" in {item.path for item in done.branches[0].items}) == goes
        assert ("recipe.yaml" in done.branches[0].left_out) != goes
        assert ("recipe lies beside" in held(hub)["README.md"].decode()) == goes
    (out / "recipe.yaml").write_text("src: /home/me/nano\n")
    assert "recipe.yaml" in {
        item.path for item in mixtools.push([out], REPO, include=["recipe.yaml"]).branches[0].items
    }


def test_through_xet(tmp_path: Path, client: None, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """The Hub's newer transport: no file is put, and all is there, and nothing is sent again."""
    out = made.gptq(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with Hub(xet=tmp_path / "store") as hub:
        connect(monkeypatch, hub)
        mixtools.push([out], REPO)
        assert not hub.paths("PUT")
        assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")}.items() <= held(hub).items()
        before = len(messages(hub))
        assert mixtools.push([out], REPO).sent[0].sent == 0 and len(messages(hub)) == before
        assert hub.unknown == []


def test_several_go_to_branches_by_their_kind(tmp_path: Path, hub: Hub) -> None:
    one, other = made.gptq(tmp_path), made.gptq(tmp_path, 8, 32)
    done = mixtools.push([one, other], REPO)
    branches = hub.repositories[REPO].branches
    assert {"main", "gptq-4bit-128g", "gptq-8bit-32g"} <= branches.keys()
    assert held(hub) == held(hub, branch="gptq-4bit-128g")
    assert held(hub, branch="gptq-8bit-32g").keys() - {".gitattributes", "README.md", "mixtools-card.png"} <= {
        *made.read(other)
    }
    config = json.loads(held(hub, branch="gptq-8bit-32g")["config.json"])["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (8, 32, False)
    card = held(hub)["README.md"].decode()
    assert "gptq-8bit-32g" in card and card == held(hub, branch="gptq-8bit-32g")["README.md"].decode()
    assert [branch.name for branch in done.branches] == ["main", "gptq-4bit-128g", "gptq-8bit-32g"]


def test_a_set_of_ggufs_grows(tmp_path: Path, hub: Hub) -> None:
    out = made.gguf(tmp_path)
    mixtools.push([out / "nano.Q8_0.gguf"], REPO)
    assert not any("Q4_K_M" in path for path in held(hub))
    mixtools.push(out, REPO)
    there = held(hub)
    assert {"nano.Q8_0.gguf", "nano.Q4_K_M.gguf", "README.md", "mixtools-card.png", checked.NAME} <= there.keys()
    assert sum(message == "Add nano.Q8_0.gguf" for message in messages(hub)) == 1


def test_a_pull_request_is_a_draft_until_it_is_whole(
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = made.gptq(tmp_path)
    kept = hub.create("me/nano-GPTQ", {"config.json": b"{}"})
    before = dict(kept.branches["main"])
    hub.fail("POST", r"/commit/", status=400, skip=2)
    with pytest.raises(errors.HubError):
        mixtools.push([out], REPO, create_pr=True)
    (request,) = kept.pull_requests
    assert request.status == "draft"
    done = mixtools.push([out], REPO, create_pr=True)
    (request,) = kept.pull_requests
    assert (request.status, done.sent[0].revision, done.sent[0].skipped) == ("open", "refs/pr/1", 2)
    assert kept.branches["main"] == before and "README.md" in kept.branches["refs/pr/1"]


def test_a_changed_model_is_never_half_of_two(tmp_path: Path, hub: Hub) -> None:
    """Between the first new shard and the last commit, nothing there opens what lies beside it."""
    old, new = made.gptq(tmp_path, 8, 32), made.gptq(tmp_path)
    mixtools.push([old], REPO)
    mixtools.push([new], REPO)
    kept = hub.repositories[REPO]
    there = held(hub)
    assert {name for name in there if name.endswith(".safetensors")} == {p.name for p in new.glob("*.safetensors")}
    names = {path.name for path in old.iterdir()} & {path.name for path in new.iterdir() if "safetensors" in path.name}
    opened = {"config.json", "model.safetensors.index.json"}
    at = next(i for i, one in enumerate(kept.commits) if one.message.startswith("Withdraw")) if names - opened else None
    if at is not None:
        assert opened <= {*kept.commits[at].deleted}


# --- faults ---


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("where", ["whoami", "repos/create", "/tree/", "objects/batch", "/commit/", "preupload"])
def test_what_passes_is_waited_for(tmp_path: Path, hub: Hub, slept: list[float], status: int, where: str) -> None:
    out = made.gptq(tmp_path)
    method = "GET" if where in ("whoami", "/tree/") else "POST"
    hub.fail(method, where, status=status, headers={"Retry-After": "7"} if status == 429 else {})
    done = mixtools.push([out], REPO)
    assert done.sent[0].commits == SHARDS + 1 and len(messages(hub)) >= SHARDS + 1
    assert slept
    if status == 429:
        assert max(slept) >= 7


@pytest.mark.parametrize("where", ["/commit/", "whoami"])
def test_what_does_not_pass_is_told(tmp_path: Path, hub: Hub, where: str) -> None:
    out = made.gptq(tmp_path)
    hub.fail("POST" if "commit" in where else "GET", where, status=503, times=100)
    with pytest.raises(errors.HubError, match="503") as caught:
        mixtools.push([out], REPO)
    assert "\n" not in str(caught.value)


def test_a_hub_that_asks_for_an_hour(tmp_path: Path, hub: Hub, slept: list[float]) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "3600"}, times=100)
    with pytest.raises(errors.HubError, match="asks to wait 3600 s"):
        mixtools.push([made.gptq(tmp_path)], REPO)
    assert max(slept, default=0) < 3600


@pytest.mark.parametrize("number", range(SHARDS + 1))
def test_a_commit_whose_answer_was_lost_is_not_made_twice(tmp_path: Path, hub: Hub, number: int) -> None:
    hub.fail("POST", r"/commit/", drop=True, skip=number)
    done = mixtools.push([made.gptq(tmp_path)], REPO)
    told = messages(hub)
    assert len(told) == len(set(told)) and done.sent[0].commits == SHARDS + 1


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_else_was_quicker(tmp_path: Path, hub: Hub, status: int) -> None:
    hub.fail("POST", r"/commit/", status=status, times=2, skip=1)
    mixtools.push([made.gptq(tmp_path)], REPO)
    assert "README.md" in held(hub)


def test_a_cut_within_a_large_file(tmp_path: Path, hub: Hub) -> None:
    """Every upload of the third file is cut: what came before is there, and stays when it is pushed again."""
    out = made.gptq(tmp_path)
    third = sorted(out.glob("*.safetensors"))[2]
    sha = hashlib.sha256(third.read_bytes()).hexdigest()
    hub.fail("PUT", sha, after=1000, times=100)
    with pytest.raises(errors.HubError, match="the same command continues"):
        mixtools.push([out], REPO)
    there = held(hub)
    assert sum(name.endswith(".safetensors") for name in there) == 2
    assert "config.json" not in there and "README.md" not in there and not any("index" in name for name in there)
    hub._faults.clear()
    done = mixtools.push([out], REPO)
    assert done.sent[0].skipped == 2
    assert sum(message.startswith("Add model") for message in messages(hub)) == SHARDS


def test_one_cut_is_survived(tmp_path: Path, hub: Hub) -> None:
    hub.fail("PUT", ".", after=1000)
    done = mixtools.push([made.gptq(tmp_path)], REPO)
    assert done.sent[0].commits == SHARDS + 1


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "tokenizer.json", "tokenizer.model"])
def test_what_came_damaged_is_told_and_mended(tmp_path: Path, hub: Hub, name: str) -> None:
    out = made.gptq(tmp_path)
    hub.corrupt.add(name)
    with pytest.raises(errors.HubError, match="is not what was sent") as caught:
        mixtools.push([out], REPO)
    assert name in str(caught.value)
    hub.corrupt.clear()
    mixtools.push([out], REPO)
    assert held(hub)[name] == (out / name).read_bytes()


def test_killed_in_the_middle_and_pushed_again(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtools", "push", out, REPO, "--quiet"], env=environment,
        cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (REPO in hub.repositories and len(messages(hub)) >= 2) and time.monotonic() < deadline:
        time.sleep(0) if process.poll() is None else pytest.fail("it ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = mixtools.push([out], REPO)
    assert done.sent[0].skipped >= 1
    told = [message for message in messages(hub) if message.startswith("Add model")]
    assert len(told) == len(set(told)) == SHARDS
    assert {name: data for name, data in held(hub).items() if name.endswith(".safetensors")} == {
        path.name: path.read_bytes() for path in out.glob("*.safetensors")
    }


# --- who may ---


def test_no_token_and_a_wrong_one(
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = made.gptq(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.HubError, match=r"no token: run `hf auth login`, or set HF_TOKEN"):
        mixtools.push([out], REPO)
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    code, document = command(capsys, "push", out, REPO)
    assert code == 7 and "hf auth login" in document["error"]["message"]
    assert "hf_wrong_secret" not in json.dumps(document)
    assert not hub.repositories


@pytest.mark.parametrize(("repo", "told"), [("somebody/nano", "may not write"), (REPO, "may not write")])
def test_somebody_elses(
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    repo: str,
    told: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good" if repo != REPO else "hf_reader")
    with pytest.raises(errors.HubError, match=told):
        mixtools.push([made.gptq(tmp_path)], repo)


def test_a_token_in_an_error_is_hidden(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    client_ = hub_client.Client.connect(REPO)
    assert "hf_good" not in client_._line(RuntimeError("Bearer hf_good was refused"))


def test_offline(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubError, match="HF_HUB_OFFLINE"):
        mixtools.push([made.gptq(tmp_path)], REPO)


# --- what is fit to be published ---


def test_what_is_not_fit_is_refused_unless_told(tmp_path: Path, hub: Hub) -> None:
    out, low = made.gptq(tmp_path), made.laser(tmp_path)
    with pytest.raises(errors.CheckFailed, match="no gate judged it.*--unjudged"):
        mixtools.push([low], REPO)
    with pytest.raises(errors.CheckFailed, match="no gate judged it"):
        mixtools.push([low], REPO, unchecked=True)
    mixtools.check(out, made.source(), gate={"kld_mean": 1e-9}, **made.CHECK)
    with pytest.raises(errors.CheckFailed, match=r"failed its check \(kld_mean\)"):
        mixtools.push([out], REPO, unjudged=True)
    (out / checked.NAME).unlink()
    with pytest.raises(errors.CheckFailed, match="was not checked: mixtools check .*--unchecked"):
        mixtools.push([out], REPO)
    assert not hub.requests
    mixtools.push([low], "me/low", unjudged=True)
    mixtools.push([out], REPO, unchecked=True)
    assert "not checked" in held(hub)["README.md"].decode()
    assert "intact, not judged" in held(hub, "me/low")["README.md"].decode()


def test_a_folder_that_mixtools_did_not_write(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / "mixtools.json").unlink()
    (out / checked.NAME).unlink()
    with pytest.raises(errors.CheckFailed, match="was not checked"):
        mixtools.push([out], REPO)
    mixtools.push([out], REPO, unchecked=True)
    assert {path.name for path in out.glob("*.safetensors")} < held(hub).keys()


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata")
def test_a_card_that_somebody_wrote_is_published_as_it_is(tmp_path: Path, hub: Hub) -> None:
    out = made.gptq(tmp_path)
    (out / "README.md").write_text("# Mine\n")
    done = mixtools.push([out], REPO)
    assert held(hub)["README.md"] == b"# Mine\n" and "as it is" in done.notes[0]


def test_a_dry_run_asks_nobody(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    out = made.gptq(tmp_path)
    code, document = command(capsys, "push", out, REPO, "--dry-run")
    assert code == 0 and not hub.requests and document["dry_run"]
    (branch,) = document["branches"]
    assert branch["name"] == "main" and branch["bytes"] == sum(file["bytes"] for file in branch["files"])
    assert {file["path"] for file in branch["files"]} >= {path.name for path in out.glob("*.safetensors")}
    assert (out / "README.md").read_text() == made.SOURCE_CARD


@pytest.mark.parametrize("name", ["nano", "a/b/c", "me/", "/nano", "me/nano..x", "me/na no", "me/nano.git"])
def test_names_that_no_repository_has(tmp_path: Path, hub: Hub, name: str) -> None:
    with pytest.raises(errors.UsageError, match="is no repository"):
        mixtools.push([made.gptq(tmp_path)], name)


def test_what_does_not_belong_together(tmp_path: Path, hub: Hub) -> None:
    one, files = made.gptq(tmp_path), made.gguf(tmp_path)
    same = made.gptq(tmp_path / "again")
    for outputs, options, told in (
        ([one, files], {}, "repositories of their own"),
        ([one, one], {}, "named twice"),
        ([one, same], {}, "two of them would be the branch gptq-4bit-128g"),
        ([one, made.gptq(tmp_path, 8, 32)], {"branch": "x"}, "--branch names the place of one output"),
        ([one, tmp_path / "gptq-8-32"], {"create_pr": True}, "--create-pr"),
    ):
        with pytest.raises(errors.UsageError, match=told):
            mixtools.push(outputs, REPO, **options)
    with pytest.raises(errors.InputError, match="does not exist"):
        mixtools.push([tmp_path / "none"], REPO)
    assert not hub.requests
