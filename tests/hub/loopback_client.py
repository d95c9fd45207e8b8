"""The real client beside a loopback Hub: fixtures, which a test module takes over by name, and what tests say often."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.loopback import Hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.hf_api import RepoFile  # by this name in 0.36, too, which some peers pin

WEIGHTS = random.Random(0).randbytes(300_000)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client that keeps everything in a folder of this test and knows no token; without Xet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # for hf_xet, and for processes that a test starts
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Makes this Hub the client's own, as HF_ENDPOINT does for a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        connect(monkeypatch, hub)
        yield hub
        assert hub.unknown == []


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(hub.url, token="hf_good")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited, one after the other."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def add(path: str, content: bytes | str | Path) -> CommitOperationAdd:
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def push(api: HfApi, name: str, files: dict[str, bytes | str], **options: Any) -> str:
    """Commits these files; returns the commit."""
    operations = [add(path, content) for path, content in files.items()]
    oid: str = api.create_commit(name, operations, commit_message="push", **options).oid
    return oid


def sums(api: HfApi, name: str, revision: str | None = None) -> dict[str, str]:
    """git's sum of each file, sha256 of a large one."""
    files = api.list_repo_tree(name, recursive=True, revision=revision)
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in files if isinstance(one, RepoFile)}
