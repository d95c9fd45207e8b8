"""Files come into the loopback Hub and out of it as the real client sends and asks for them, faults included."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub import loopback_client
from hub.loopback import Hub
from hub.loopback_client import WEIGHTS, add, push, sums
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

client, hub, api, slept = loopback_client.client, loopback_client.hub, loopback_client.api, loopback_client.slept

# The client's own way of sending a file, which its HTTP library would like to be another.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = {"Authorization": "Bearer hf_good"}


def test_a_large_object_is_sent_once(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    """However the first try ended: what arrived is there for the next, of this branch or another."""
    (tmp_path / "m.safetensors").write_bytes(WEIGHTS)
    api.create_repo("me/x")
    hub.fail("POST", "/commit/main$", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_commit("me/x", [add("m.safetensors", tmp_path / "m.safetensors")], commit_message="first")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert list(hub.repositories["me/x"].objects) == [sha256] and hub.paths("PUT") == [f"/lfs/me/x/{sha256}"]
    api.create_branch("me/x", branch="b")
    for revision in ("main", "b"):
        operations = [add("m.safetensors", tmp_path / "m.safetensors")]
        api.create_commit("me/x", operations, commit_message="again", revision=revision)
        assert sums(api, "me/x", revision)["m.safetensors"] == sha256
    assert len(hub.paths("PUT")) == 1
    (sent,) = (one for one in hub.requests if one.method == "PUT")
    assert sent.size == len(WEIGHTS) and sent.authorization is None


def test_a_cut_in_the_middle_of_a_large_object(hub: Hub, api: HfApi, slept: list[float], tmp_path: Path) -> None:
    weights = WEIGHTS * 30  # more than sockets hold
    (tmp_path / "m.gguf").write_bytes(weights)
    api.create_repo("me/x")
    hub.fail("PUT", "^/lfs/", after=1_000_000)
    api.create_commit("me/x", [add("m.gguf", tmp_path / "m.gguf")], commit_message="retried by the client itself")
    assert [one.size for one in hub.requests if one.method == "PUT"] == [1_000_000, len(weights)] and slept == [1]
    assert api.get_paths_info("me/x", "m.gguf")[0].lfs.sha256 == hashlib.sha256(weights).hexdigest()

    (tmp_path / "n.gguf").write_bytes(weights[::-1])
    hub.fail("PUT", "^/lfs/", after=100, times=6)
    with pytest.raises(RuntimeError, match="Error while uploading 'n.gguf'"):
        api.create_commit("me/x", [add("n.gguf", tmp_path / "n.gguf")], commit_message="given up")
    assert len(hub.repositories["me/x"].objects) == 1 and not api.file_exists("me/x", "n.gguf")


@pytest.mark.parametrize("fault", ["", "cut", "refused", "lost"])
def test_a_large_object_in_parts(fault: str, hub: Hub, api: HfApi, slept: list[float], tmp_path: Path) -> None:
    hub.part_size = 70_000
    (tmp_path / "m.gguf").write_bytes(WEIGHTS)
    api.create_repo("me/x")
    if fault:
        told = {"cut": {"after": 10}, "refused": {"status": 500}, "lost": {"status": 504, "drop": True}}[fault]
        hub.fail("PUT", "^/lfs/", skip=2, **told)
    api.create_commit("me/x", [add("m.gguf", tmp_path / "m.gguf")], commit_message="parts")
    sizes = [one.size for one in hub.requests if one.method == "PUT"]
    again = {"": [], "cut": [10], "refused": [70_000], "lost": [70_000]}[fault]  # a part is sent again from its start
    assert sizes == [70_000, 70_000, *again, 70_000, 70_000, 20_000]
    assert hub.repositories["me/x"].branches["main"]["m.gguf"].read() == WEIGHTS


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_planted_answer(status: int, hub: Hub, api: HfApi) -> None:
    repository = hub.create("me/x")
    hub.fail("POST", "/api/models/me/x/commit/main$", status=status, headers={"X-Note": "here"})
    with pytest.raises(HfHubHTTPError) as caught:
        push(api, "me/x", {"a.txt": "a"})
    assert caught.value.response.status_code == status and caught.value.response.headers["X-Note"] == "here"
    assert not isinstance(caught.value, RepositoryNotFoundError)  # a token that died, as the Hub says it
    assert len(repository.commits) == 1
    push(api, "me/x", {"a.txt": "a"})
    assert len(repository.commits) == 2


def test_the_client_waits_as_long_as_it_is_told(hub: Hub, api: HfApi, slept: list[float]) -> None:
    hub.create("me/x")
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "7"}, times=2, skip=1)
    push(api, "me/x", {"a.txt": "a"})
    assert slept == []
    push(api, "me/x", {"b.txt": "b"})
    assert slept == [8, 8]


def test_an_answer_that_is_lost(hub: Hub, api: HfApi) -> None:
    repository = hub.create("me/x")
    hub.fail("POST", "/commit/", drop=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        push(api, "me/x", {"a.txt": "a"})
    hub.fail("POST", "/commit/", drop=True, status=504)
    with pytest.raises(HfHubHTTPError, match="504"):
        push(api, "me/x", {"b.txt": "b"})
    assert [one.added for one in repository.commits[1:]] == [["a.txt"], ["b.txt"]]


def test_a_fault_is_one_thing(hub: Hub) -> None:
    with pytest.raises(ValueError, match="a fault has"):
        hub.fail("PUT", "/", after=3, drop=True)
    with pytest.raises(ValueError, match="a fault has"):
        hub.fail("PUT", "/")


def test_large_objects_are_proved(hub: Hub, api: HfApi) -> None:
    hub.create("me/x")
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    wanted = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(WEIGHTS)}]}
    told = httpx2.post(f"{hub.url}/me/x.git/info/lfs/objects/batch", json=wanted, headers=TOKEN).json()
    actions = told["objects"][0]["actions"]
    verify = {"oid": oid, "size": len(WEIGHTS)}
    assert httpx2.post(actions["verify"]["href"], json=verify, headers=TOKEN).status_code == 404
    place = actions["upload"]["href"]
    assert httpx2.put(place.partition("?")[0], content=WEIGHTS).status_code == 403
    assert httpx2.put(place, content=WEIGHTS, headers=TOKEN).status_code == 403  # no token leaves the Hub
    assert httpx2.put(place, content=WEIGHTS[:-1]).status_code == 400
    operation = add("m.gguf", WEIGHTS)
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit("me/x", [operation], commit_message="too early")
    assert httpx2.put(place, content=iter([WEIGHTS[:99], WEIGHTS[99:]])).status_code == 200  # in chunks
    assert httpx2.post(actions["verify"]["href"], json=verify, headers=TOKEN).status_code == 200
    assert httpx2.post(actions["verify"]["href"], json={**verify, "size": 1}, headers=TOKEN).status_code == 404
    api.create_commit("me/x", [operation], commit_message="now")


def test_parts_are_proved(hub: Hub) -> None:
    hub.create("me/x")
    hub.part_size = 200_000
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    wanted = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": oid, "size": len(WEIGHTS)}]}
    told = httpx2.post(f"{hub.url}/me/x.git/info/lfs/objects/batch", json=wanted, headers=TOKEN).json()
    upload = told["objects"][0]["actions"]["upload"]
    tags = []
    for number, piece in (("00001", WEIGHTS[:200_000]), ("00002", WEIGHTS[200_000:])):
        tags.append(httpx2.put(upload["header"][number], content=piece).headers["ETag"])
        parts = [{"partNumber": at + 1, "etag": tag} for at, tag in enumerate(tags)]
        done = httpx2.post(upload["href"], json={"oid": oid, "parts": parts})
        assert done.status_code == (400 if number == "00001" else 200)
    swapped = [{"partNumber": 1, "etag": tags[1]}, {"partNumber": 2, "etag": tags[0]}]
    assert httpx2.post(upload["href"], json={"oid": oid, "parts": swapped}).status_code == 400


def test_a_file_that_is_stored_damaged(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"config.json": "{}", "m.gguf": WEIGHTS, "n.gguf": WEIGHTS[1:], "empty.txt": ""}
    api.create_repo("me/x")
    hub.corrupt |= {"config.json", "m.gguf", "empty.txt"}
    push(api, "me/x", files)
    local = tmp_path / "local"
    for name, content in files.items():
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_bytes(content.encode() if isinstance(content, str) else content)
    told = api.verify_repo_checksums("me/x", local_dir=local)
    assert {one["path"]: one["algorithm"] for one in told.mismatches} == {
        "config.json": "git-sha1",
        "m.gguf": "sha256",
        "empty.txt": "git-sha1",
    }
    assert told.missing_paths == [".gitattributes"]
    hub.corrupt.clear()
    push(api, "me/x", files)
    assert api.verify_repo_checksums("me/x", local_dir=local).mismatches == []


def test_downloads(hub: Hub, api: HfApi, slept: list[float], tmp_path: Path) -> None:
    hub.create("me/x", {"config.json": b"{}", "sub dir/m.gguf": WEIGHTS}, private=True)
    hub.fail("GET", r"/resolve/.*/m\.gguf$", after=100_000)
    hub.fail("GET", r"/resolve/.*/m\.gguf$", status=429, headers={"Retry-After": "3"})
    assert Path(api.hf_hub_download("me/x", "sub dir/m.gguf")).read_bytes() == WEIGHTS
    assert slept == [1, 4]  # after the cut, and as long as it was told and one more
    ranges = [one for one in hub.requests if one.method == "GET" and one.path.endswith(".gguf")]
    assert len(ranges) == 3
    folder = Path(api.snapshot_download("me/x"))
    assert {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()} == {
        ".gitattributes": hub.repositories["me/x"].branches["main"][".gitattributes"].content,
        "config.json": b"{}",
        "sub dir/m.gguf": WEIGHTS,
    }
    assert folder.name == hub.repositories["me/x"].heads["main"]
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("me/x", "none.json")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("me/x", "config.json", revision="none")
    place = f"{hub.url}/me/x/resolve/main/sub%20dir/m.gguf"
    part = httpx2.get(place, headers={**TOKEN, "Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, WEIGHTS[5:10])
    assert part.headers["Content-Range"] == f"bytes 5-9/{len(WEIGHTS)}"
    assert httpx2.get(place, headers={**TOKEN, "Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416
    head = httpx2.head(place, headers=TOKEN)
    assert head.headers["X-Linked-Size"] == head.headers["Content-Length"] == str(len(WEIGHTS)) and not head.content


def test_a_client_that_dies_leaves_nothing(hub: Hub, api: HfApi) -> None:
    repository = hub.create("me/x")
    oid, host = hashlib.sha256(WEIGHTS).hexdigest(), hub.url.removeprefix("http://")
    path = f"/lfs/me/x/{oid}?signature={hub.signature('me/x', oid)}"
    with socket.create_connection(("127.0.0.1", int(host.partition(":")[2]))) as line:
        line.sendall(f"PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(WEIGHTS)}\r\n\r\n".encode())
        line.sendall(WEIGHTS[:-1])
        line.shutdown(socket.SHUT_WR)
        assert line.recv(1) == b""
    assert repository.objects == {} and hub.unknown == []


def test_through_xet(client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client's other transport, whose store is a folder."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (tmp_path / "m.gguf").write_bytes(WEIGHTS)
    with Hub(xet=tmp_path / "store") as hub:
        loopback_client.connect(monkeypatch, hub)
        api = HfApi(hub.url, token="hf_good")
        api.create_repo("me/x")
        operations = [add("m.gguf", tmp_path / "m.gguf"), add("n.safetensors", WEIGHTS[::-1]), add("a.txt", "a")]
        api.create_commit("me/x", operations, commit_message="xet")
        assert not hub.paths("PUT") and any("xet-write-token" in path for path in hub.paths("GET"))
        assert sums(api, "me/x")["m.gguf"] == hashlib.sha256(WEIGHTS).hexdigest()
        (info,) = api.get_paths_info("me/x", "m.gguf")
        assert len(info.xet_hash) == 64
        assert Path(api.hf_hub_download("me/x", "n.safetensors")).read_bytes() == WEIGHTS[::-1]
        assert any("xet-read-token" in path for path in hub.paths("GET"))
        with pytest.raises(HfHubHTTPError, match="403"):
            push(api, "me/x", {"o.gguf": WEIGHTS[1:]}, token="hf_reader")
        assert hub.unknown == []


@pytest.mark.parametrize("xet", [False, True])
def test_a_client_in_a_process_of_its_own(xet: bool, client: None, tmp_path: Path) -> None:
    weights = bytes(500_000) + WEIGHTS + bytes(100) + WEIGHTS  # what compresses, and what comes twice
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.gguf").write_bytes(weights)
    (tmp_path / "out" / "a.txt").write_bytes(b"a")
    program = (
        "import sys, huggingface_hub as hub\n"
        "hub.create_repo('me/x', exist_ok=True)\n"
        "hub.upload_folder(repo_id='me/x', folder_path=sys.argv[1])\n"
        "print(hub.snapshot_download('me/x'))\n"
    )
    with Hub(xet=tmp_path / "store" if xet else None) as hub:
        more = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "HF_HUB_DISABLE_XET": "" if xet else "1"}
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "out")]
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
        blob = hub.repositories["me/x"].branches["main"]["m.gguf"]
        assert blob.read() == weights and (blob.xet is not None) == xet == (hub.paths("PUT") == [])
        assert (Path(done.stdout.strip()) / "m.gguf").read_bytes() == weights
        assert hub.unknown == []


def test_what_is_a_large_object(hub: Hub) -> None:
    limit = 10 * 2**20
    files = {"a.bin": b"", "b.bin": b"b", "c.txt": bytes(limit), "d.txt": bytes(limit + 1)}
    stored = hub.create("me/x", files).branches["main"]
    assert [path for path in files if stored[path].sha256] == ["b.bin", "d.txt"]
    assert set(hub.repositories["me/x"].objects) == {stored["b.bin"].sha256, stored["d.txt"].sha256}


def line(key: str, **value: object) -> str:
    return json.dumps({"key": key, "value": value})


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([line("file", path="a", content="")], "header"),
        ([line("header", summary="s")], "at least one operation"),
        ([line("header"), line("file", path="a", content="")], "needs a summary"),
        ([line("header", summary="s"), line("other", path="a")], "Unknown operation other"),
        ([line("header", summary="s"), line("lfsFile", path="a", oid="SUM", size=3)], "3 bytes announced, 1 are there"),
        ([line("header", summary="s"), line("file", path="a", content="A" * 15_000_000)], "must be large objects"),
        ([], "application/x-ndjson"),
    ],
)
def test_a_commit_that_is_no_commit(lines: list[str], reason: str, hub: Hub) -> None:
    repository = hub.create("me/x", {"m.gguf": b"m"})
    body = "\n".join(lines).replace("SUM", hashlib.sha256(b"m").hexdigest())
    kind = {"Content-Type": "application/x-ndjson"} if lines else {}
    told = httpx2.post(f"{hub.url}/api/models/me/x/commit/main", content=body.encode(), headers={**TOKEN, **kind})
    assert told.status_code == 400 and reason in told.json()["error"]
    assert len(repository.commits) == 2
