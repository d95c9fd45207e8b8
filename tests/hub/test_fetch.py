"""org/name on the Hub: the real client against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mixtools import errors
from mixtools.hub import fetch
from mixtools.hub.opening import locate
from mixtools.layouts.detect import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NANO = Path(__file__).parent.parent / "data" / "nano-mixtral"


class _Hub(BaseHTTPRequestHandler):
    """The three requests that a download makes: tree, HEAD and GET of a file. Holds one repository."""

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file for file in NANO.iterdir()}
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
