"""The Hub's cache without the Hub: offline, unreachable, and named by its folder; in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mixtools import errors
from mixtools.hub import cache, fetch
from mixtools.hub.opening import locate, open_model
from mixtools.layouts.detect import open_checkpoint

FIRST, SECOND = "a" * 40, "b" * 40
NANO = Path(__file__).parent.parent / "data" / "nano-mixtral"
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def add(hub: Path, commit: str = FIRST, *refs: str, leave_out: str = "") -> Path:
    """A snapshot of the nano model under org/nano, as huggingface_hub lays it: links to blobs."""
    root = hub / "models--org--nano"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for path in NANO.iterdir():
        if path.name != leave_out:
            shutil.copy(path, root / "blobs" / f"{path.name} of {commit}")
            (folder / path.name).symlink_to(Path("../../blobs") / f"{path.name} of {commit}")
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return folder


def inspect(model: str | Path, hub: Path | None, environment: dict[str, str]) -> tuple[int, dict]:
    """Exit code and document of `mixtools inspect`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    process = subprocess.run(
        [sys.executable, "-m", "mixtools", "inspect", str(model), "--json"],
        env={**inherited, **({"HF_HUB_CACHE": str(hub)} if hub else {}), **environment},
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return process.returncode, json.loads(process.stdout)


@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_is_in_the_cache_is_read(tmp_path: Path, environment: dict[str, str]) -> None:
    hub = tmp_path / "hub"
    first, second = add(hub, FIRST, "v1", "pr/1"), add(hub, SECOND, "main")
    wanted = {"": second, "@main": second, "@v1": first, "@pr/1": first, f"@{FIRST}": first}
    for revision, folder in wanted.items() if environment is OFFLINE else [("@v1", first)]:
        code, document = inspect("org/nano" + revision, hub, environment)
        assert (code, document["path"]) == (0, str(folder)), document
        (*remark,) = document["remarks"]
        assert len(remark) == (environment is UNREACHABLE)
        assert not remark or ("the Hub could not be reached" in remark[0] and str(folder) in remark[0])


def test_home_is_where_the_cache_lies(tmp_path: Path) -> None:
    folder = add(tmp_path / "home" / "hub", FIRST, "main")
    code, document = inspect("org/nano", None, {**OFFLINE, "HF_HOME": str(tmp_path / "home")})
    assert (code, document["path"]) == (0, str(folder)), document


@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_what_is_not_is_told(tmp_path: Path, environment: dict[str, str]) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    code, document = inspect("org/nano", hub, environment)
    assert code == 7
    assert ("HF_HUB_OFFLINE is set" if environment is OFFLINE else "cannot be fetched") in document["error"]["message"]
    assert f"the cache {hub} has no copy" in document["error"]["message"]
    add(hub, FIRST, "main", leave_out="params.json")
    code, document = inspect("org/nano", hub, environment)
    assert code == 7
    assert "the copy in the cache is not whole" in document["error"]["message"]
    assert "params.json" in document["error"]["message"]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_lost_blob_is_told(offline: Path) -> None:
    folder = add(offline, FIRST, "main")
    (folder / "consolidated.00.pth").resolve().unlink()
    with pytest.raises(errors.HubError, match=r"not whole: .*consolidated\.00\.pth"):
        locate("org/nano")


@pytest.mark.parametrize("revision", ["v2", SECOND, "../refs/main", "main/", "..", "a//b"])
def test_a_revision_that_the_cache_does_not_know(offline: Path, revision: str) -> None:
    """Another one in its place would be another model."""
    add(offline, FIRST, "main")
    with pytest.raises((errors.HubError, errors.InputError)) as caught:
        locate(f"org/nano@{revision}")
    assert "has no copy" in str(caught.value) or "does not exist" in str(caught.value)


@pytest.mark.parametrize("commit", ["../..", "/etc", "c" * 40, "", "a" * 10_000, "\0"])
def test_a_ref_that_leads_elsewhere(offline: Path, commit: str) -> None:
    add(offline, FIRST, "main")
    (offline / "models--org--nano" / "refs" / "main").write_text(commit)
    with pytest.raises(errors.HubError, match="names the snapshot") as caught:
        locate("org/nano")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "refused"), [(401, True), (403, True), (404, True), (500, False), (503, False)])
def test_an_answer_that_refuses_is_no_silence(
    offline: Path, monkeypatch: pytest.MonkeyPatch, status: int, refused: bool
) -> None:
    """A repository that the Hub says is not there, or closed, is not read from the cache; of a sick Hub's it is."""
    from huggingface_hub import constants

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    folder = add(offline, FIRST, "main")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            if refused:
                with pytest.raises(errors.HubError, match="cannot be fetched from the Hub: "):
                    locate("org/nano")
            else:
                checkpoint = open_model("org/nano")
                assert checkpoint.folder == folder
                assert checkpoint.remarks[0].startswith("the Hub could not be reached (")
        finally:
            server.shutdown()
            thread.join()


def test_a_repositorys_folder_is_its_snapshot(tmp_path: Path) -> None:
    first, root = add(tmp_path), tmp_path / "models--org--nano"
    assert locate(root) == first  # the only one
    second = add(tmp_path, SECOND)
    with pytest.raises(errors.LayoutError, match="holds 2 snapshots and no refs/main") as caught:
        locate(root)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(SECOND)
    assert locate(root) == second
    moved = root.rename(tmp_path / "moved")
    checkpoint = open_model(moved)
    assert checkpoint.folder == moved / "snapshots" / SECOND and checkpoint.layout.letter == "A"
    expected = torch.load(NANO / "consolidated.00.pth", weights_only=True)["norm.weight"]
    assert torch.equal(checkpoint.read(list(checkpoint.slots())[-2]), expected)


def test_a_repositorys_folder_without_snapshots(tmp_path: Path) -> None:
    (tmp_path / "models--org--nano" / "snapshots").mkdir(parents=True)
    with pytest.raises(errors.LayoutError, match="without a snapshot"):
        locate(tmp_path / "models--org--nano")


def test_a_folder_of_snapshots_is_no_repository(tmp_path: Path) -> None:
    """Training loops name folders so, too."""
    shutil.copytree(NANO, tmp_path / "run")
    (tmp_path / "run" / "snapshots" / "step-1").mkdir(parents=True)
    assert not cache.is_repository(tmp_path / "run")
    assert open_checkpoint(locate(tmp_path / "run")).layout.letter == "A"


def test_a_link_to_nothing_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("nowhere")
    with pytest.raises(errors.InputError, match=r"is a link that leads nowhere \(to nowhere\)"):
        locate(tmp_path / "model")


NAMES = [
    "README.md", "LICENSE", "LICENSE.txt", "NOTICE", "config.json", "generation_config.json", "params.json",
    "tokenizer.model", "tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "merges.txt", "mixtools.json", "laser-report.html", "plot.png",
    "images/loss.svg", "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
LEFT = [
    "modeling_mixtral.py", "scripts/run.sh", "original/params.json", "original/tokenizer.model", "flax_model.msgpack",
    "model.onnx", "model.Q4_K_M.gguf", "optimizer.pt", "training_args.bin", "data.parquet", ".gitattributes",
    "runs/events.out", "adapter_model.safetensors", "logs/notes.md",
]  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BINS = ["pytorch_model.bin", "pytorch_model.bin.index.json"]


def test_what_goes_with_a_model_is_fetched() -> None:
    others = ["consolidated.safetensors", *BINS, *LEFT]
    beside = set(NAMES) - {"params.json"}
    assert set(fetch.choose([*NAMES, *SHARDS, *others], "r")) == {*SHARDS, *beside}
    mistral = set(NAMES) - {"config.json"} | {"consolidated.safetensors"}
    assert set(fetch.choose([*NAMES, *others], "r")) == mistral
    assert set(fetch.choose([*NAMES, *BINS, *LEFT], "r")) == {"pytorch_model.bin", *beside}


def test_of_a_whole_file_and_shards_one_is_fetched() -> None:
    """The one that would be read."""
    names = ["config.json", "model.safetensors", *SHARDS]
    assert set(fetch.choose(names, "r")) == {"config.json", "model.safetensors"}


def test_an_adapter_of_the_hub_is_named_as_one() -> None:
    with pytest.raises(errors.LayoutError, match="r: is a LoRA adapter, not a model; merge it"):
        fetch.choose(["adapter_config.json", "adapter_model.safetensors", "README.md"], "r")
