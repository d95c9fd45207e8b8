"""org/name on the Hub: the real client against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import mixtools
from mixtools import errors
from mixtools.hub import fetch
from mixtools.hub.opening import locate
from mixtools.layouts.detect import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NANO = Path(__file__).parent.parent / "data" / "nano-mixtral"


class _Hub(BaseHTTPRequestHandler):
    """The three requests that a download makes: tree, HEAD and GET of a file. Holds one repository."""

    folder = NANO

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file for file in self.folder.iterdir()}
        if not f"{path}/".startswith(("/api/models/org/nano/", "/org/nano/")):
            self._send(404, b"{}", X_Error_Code="RepoNotFound")
        elif "/revision/" in path or path == "/api/models/org/nano":
            siblings = [{"rfilename": name} for name in files]
            self._send(200, json.dumps({"id": "org/nano", "sha": COMMIT, "siblings": siblings}).encode())
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": COMMIT} for n, f in files.items()]
            self._send(200, json.dumps(tree).encode())
        elif (name := path.rpartition("/")[2]) in files:
            body = files[name].read_bytes()
            tag = hashlib.sha1(body).hexdigest()
            self._send(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        else:
            self._send(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_of_the_hub_is_a_model_like_any_other(hub: str) -> None:
    folder = locate("org/nano")
    assert (folder / "consolidated.00.pth").read_bytes() == (NANO / "consolidated.00.pth").read_bytes()
    assert open_checkpoint(folder).layout.letter == "A"
    assert not (folder / "RELEASE").exists()  # only what a checkpoint needs is fetched


def test_an_unknown_repository_is_one_line(hub: str) -> None:
    with pytest.raises(errors.HubError, match=r"org/other: cannot be fetched from the Hub: .+") as raised:
        locate("org/other")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such", "./org/name", "org/na me"])
def test_what_cannot_be_a_hub_name_is_a_missing_path(name: str) -> None:
    with pytest.raises(errors.InputError, match="does not exist"):
        locate(name)


def test_one_layout_of_several_is_chosen() -> None:
    names = ["README.md", "config.json", "consolidated.safetensors", "params.json", "tokenizer.model"]
    hf = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert set(fetch.choose(names + hf, "r")) == {*hf, "README.md", "config.json", "tokenizer.model"}
    mistral = {"README.md", "consolidated.safetensors", "params.json", "tokenizer.model"}
    assert set(fetch.choose(names, "r")) == mistral
    with pytest.raises(errors.LayoutError, match="holds no Mixtral checkpoint"):
        fetch.choose(["README.md", "model.onnx"], "r")


@pytest.fixture
def quants(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of GGUF files, one of them in two parts, as those who publish quantizations have them."""
    folder = tmp_path / "quants"
    mixtools.quantize(NANO, folder, type=["Q8_0", "Q4_0"], name="nano")
    mixtools.quantize(NANO, folder, type=["Q5_0"], name="nano", max_shard_size="2MB")
    (folder / "nano.imatrix.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(_Hub, "folder", folder)
    return folder


def test_a_gguf_of_a_repository_is_named_behind_it(quants: Path) -> None:
    found = locate("org/nano/nano.Q4_0.gguf@main")
    assert found.read_bytes() == (quants / "nano.Q4_0.gguf").read_bytes()
    assert [path.name for path in found.parent.iterdir()] == ["nano.Q4_0.gguf"]  # gigabytes each: nothing else
    assert open_checkpoint(found).quantization == "Q4_0"


def test_all_parts_of_a_split_gguf_are_fetched(quants: Path) -> None:
    parts = sorted(path.name for path in quants.glob("nano.Q5_0-*"))
    assert len(parts) > 1
    found = locate(f"org/nano/{parts[1]}")
    assert sorted(path.name for path in found.parent.iterdir()) == parts
    assert open_checkpoint(found).quantization == "Q5_0"


def test_of_several_ggufs_one_must_be_named(quants: Path) -> None:
    with pytest.raises(
        errors.LayoutError, match=r"holds 3 GGUF files; name the one you mean, org/nano/nano.Q4_0.gguf: "
    ):
        locate("org/nano")
    with pytest.raises(
        errors.LayoutError, match=r"org/nano: has no nano.Q2_K.gguf; there is nano.Q4_0.gguf, nano.Q5_0"
    ):
        locate("org/nano/nano.Q2_K.gguf")


def test_the_only_gguf_of_a_repository_is_the_model(quants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in quants.glob("nano.Q[45]_0*"):
        path.unlink()
    assert open_checkpoint(locate("org/nano")).quantization == "Q8_0"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(locate("org/nano/nano.Q8_0.gguf")).quantization == "Q8_0"
    assert open_checkpoint(locate("org/nano")).quantization == "Q8_0"
    with pytest.raises(errors.HubError, match="HF_HUB_OFFLINE is set; and the copy in the cache is not whole"):
        locate("org/nano/nano.Q4_0.gguf")
