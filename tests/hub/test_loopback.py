"""The loopback Hub is what the real client takes it for: users, repositories, commits, pull requests, cards."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from hub import loopback_client
from hub.loopback import Hub
from hub.loopback_client import WEIGHTS, add, push, sums
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

client, hub, api = loopback_client.client, loopback_client.hub, loopback_client.api

# The client's own way of sending a file, which its HTTP library would like to be another.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: apache-2.0\nlanguage: [en, fr]\nbase_model: me/big\nbase_model_relation: quantized\n---\n# Card\n"


def test_a_token_is_somebody_or_refused(hub: Hub) -> None:
    hub.orgs["me"] = {"guild"}
    told = HfApi(hub.url).whoami("hf_good")
    assert (told["name"], told["orgs"][0]["name"]) == ("me", "guild")
    assert told["auth"]["accessToken"]["role"] == "write"
    assert HfApi(hub.url).whoami("hf_reader")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        HfApi(hub.url).whoami("hf_wrong")
    assert caught.value.response.status_code == 401
    assert httpx2.get(f"{hub.url}/api/whoami-v2").status_code == 401
    wanted = ["Bearer hf_good", "Bearer hf_reader", "Bearer hf_wrong", None]
    assert [one.authorization for one in hub.requests if "whoami" in one.path] == wanted


def test_a_repository_is_made_once_and_in_an_own_namespace(hub: Hub, api: HfApi) -> None:
    hub.orgs["me"] = {"guild"}
    assert api.create_repo("me/one").repo_id == "me/one"
    assert api.create_repo("two", private=True).repo_id == "me/two"
    assert api.create_repo("guild/three").repo_id == "guild/three"
    assert {name: one.private for name, one in hub.repositories.items()} == {
        "me/one": False,
        "me/two": True,
        "guild/three": False,
    }
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo("me/one")
    assert caught.value.response.status_code == 409
    assert api.create_repo("me/one", exist_ok=True).repo_id == "me/one"
    with pytest.raises(HfHubHTTPError, match="403 Forbidden.*namespace"):
        api.create_repo("you/one", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="write token"):
        api.create_repo("me/four", token="hf_reader")
    assert api.create_repo("me/one", exist_ok=True, token="hf_reader").repo_id == "me/one"
    with pytest.raises(HfHubHTTPError, match="401") as caught:
        api.create_repo("me/four", token=False)
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert set(hub.repositories) == {"me/one", "me/two", "guild/three"}


def test_a_private_repository_is_hidden(hub: Hub, api: HfApi) -> None:
    hub.tokens["hf_other"] = "you"
    hub.create("me/open", {"a.txt": b"a"})
    hub.create("me/shut", {"a.txt": b"a"}, private=True)
    assert HfApi(hub.url, token=False).file_exists("me/open", "a.txt")
    for token, status in ((False, 401), ("hf_other", 404)):
        for name in ("me/shut", "me/none"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                HfApi(hub.url, token=token).model_info(name)
            assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(hub.url, token="hf_wrong").model_info("me/open")
    assert api.model_info("me/shut").private and HfApi(hub.url, token="hf_reader").model_info("me/shut").private
    assert not api.repo_exists("me/none") and api.repo_exists("me/shut")
    api.auth_check("me/shut", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.auth_check("me/shut", write=True, token="hf_reader")


def test_nothing_is_written_without_a_token_that_may(hub: Hub, api: HfApi) -> None:
    hub.tokens["hf_other"] = "you"
    repository = hub.create("me/x", {"old.txt": b"old"})
    before = list(repository.commits)
    for token, status in ((False, 401), ("hf_wrong", 401), ("hf_reader", 403), ("hf_other", 403)):
        stranger = HfApi(hub.url, token=token)
        for call in (
            lambda: push(stranger, "me/x", {"a.txt": "a"}),  # noqa: B023  called in this round
            lambda: push(stranger, "me/x", {"a.gguf": WEIGHTS}),  # noqa: B023
            lambda: stranger.delete_file("old.txt", "me/x"),  # noqa: B023
            lambda: stranger.create_branch("me/x", branch="b"),  # noqa: B023
            lambda: stranger.create_tag("me/x", tag="t"),  # noqa: B023
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                call()
            assert caught.value.response.status_code == status
            assert isinstance(caught.value, RepositoryNotFoundError) == (token is False)
    raw = httpx2.post(f"{hub.url}/me/x.git/info/lfs/objects/verify", json={"oid": "0" * 64, "size": 1})
    assert raw.status_code == 401
    assert repository.commits == before and not repository.tags and not repository.objects


def test_branches_and_tags(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")
    first = push(api, "me/x", {"a.txt": "a"})
    api.create_branch("me/x", branch="gptq-4bit-128g")
    api.create_branch("me/x", branch="empty", revision=api.list_repo_commits("me/x")[-1].commit_id)
    push(api, "me/x", {"b.txt": "b"}, revision="gptq-4bit-128g")
    api.create_tag("me/x", tag="v1", revision="gptq-4bit-128g")
    push(api, "me/x", {"c.txt": "c"}, revision="gptq-4bit-128g")
    with pytest.raises(HfHubHTTPError, match="Reference already exists") as caught:
        api.create_branch("me/x", branch="empty")
    assert caught.value.response.status_code == 409
    api.create_branch("me/x", branch="empty", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/x", tag="v1")
    api.create_tag("me/x", tag="v1", exist_ok=True)
    for revision, more in (("main", "a"), ("empty", ""), ("v1", "ab"), ("gptq-4bit-128g", "abc"), (first[:7], "a")):
        assert api.list_repo_files("me/x", revision=revision) == [".gitattributes", *(f"{name}.txt" for name in more)]
    refs = api.list_repo_refs("me/x")
    assert [one.name for one in refs.branches] == ["main", "gptq-4bit-128g", "empty"]
    assert [(one.ref, one.target_commit) for one in refs.tags] == [
        ("refs/tags/v1", hub.repositories["me/x"].tags["v1"])
    ]
    assert api.revision_exists("me/x", "empty") and not api.revision_exists("me/x", "none")
    with pytest.raises(RevisionNotFoundError):
        api.create_branch("me/x", branch="other", revision="none")
    with pytest.raises(RevisionNotFoundError):
        push(api, "me/x", {"d.txt": "d"}, revision="none")
    with pytest.raises(BadRequestError, match="v1 is no branch"):
        push(api, "me/x", {"d.txt": "d"}, revision="v1")


def test_commits_hold_what_git_would(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("me/x")
    start = api.model_info("me/x").sha
    first = push(api, "me/x", {"config.json": "{}", "sub/model.safetensors": WEIGHTS, "empty.bin": b""})
    operations = [add("config.json", "{ }"), add("sub/notes.txt", "n"), CommitOperationDelete("empty.bin")]
    second = api.create_commit(
        "me/x", operations, commit_message="second", commit_description="more", parent_commit=first
    )
    api.create_commit("me/x", [CommitOperationCopy("sub/model.safetensors", "two.gguf")], commit_message="copy")
    kept = hub.repositories["me/x"]
    assert [(one.message, one.branch, one.added, one.deleted) for one in kept.commits[1:]] == [
        ("push", "main", ["config.json", "empty.bin", "sub/model.safetensors"], []),
        ("second", "main", ["config.json", "sub/notes.txt"], ["empty.bin"]),
        ("copy", "main", ["two.gguf"], []),
    ]
    assert [one.parent for one in kept.commits] == [None, start, first, second.oid]
    assert [one.title for one in api.list_repo_commits("me/x")] == ["copy", "second", "push", "initial commit"]
    assert api.list_repo_commits("me/x")[1].message == "more"

    # git is the judge of its sums: of a file, and of the pointer to a large one.
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(WEIGHTS).hexdigest()}\n"
    for path, content in (
        ("config.json", b"{ }"),
        ("sub/model.safetensors", f"{pointer}size {len(WEIGHTS)}\n".encode()),
    ):
        told = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
        assert kept.branches["main"][path].oid == told.stdout.decode().strip()
    (weights,) = api.get_paths_info("me/x", "sub/model.safetensors")
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (
        len(WEIGHTS),
        len(WEIGHTS),
        hashlib.sha256(WEIGHTS).hexdigest(),
    )
    top = {one.path: type(one).__name__ for one in api.list_repo_tree("me/x")}
    assert top == {".gitattributes": "RepoFile", "config.json": "RepoFile", "sub": "RepoFolder", "two.gguf": "RepoFile"}
    assert [one.path for one in api.list_repo_tree("me/x", "sub")] == ["sub/model.safetensors", "sub/notes.txt"]
    (config,) = api.get_paths_info("me/x", ["config.json", "none"], expand=True)
    assert config.last_commit.oid == second.oid and config.last_commit.title == "second"
    blobs = {one.rfilename: one for one in api.model_info("me/x", files_metadata=True).siblings}
    assert blobs["two.gguf"].lfs.sha256 == weights.lfs.sha256 and blobs["config.json"].lfs is None
    assert "config.json" in sums(api, "me/x", first) and "empty.bin" in sums(api, "me/x", first)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("me/x", "nowhere"))


def test_deletions_and_clashes(hub: Hub, api: HfApi) -> None:
    hub.create("me/x", {"a/b.txt": b"b", "a/c/d.txt": b"d", "ab.txt": b"ab"})
    head = api.model_info("me/x").sha
    api.delete_folder("a", "me/x")
    assert api.list_repo_files("me/x") == [".gitattributes", "ab.txt"]
    for gone in ("a/b.txt", "a/"):
        with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
            api.create_commit("me/x", [CommitOperationDelete(gone)], commit_message="again")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, "me/x", {"e.txt": "e"}, parent_commit=head)
    assert caught.value.response.status_code == 412
    assert len(hub.repositories["me/x"].commits) == 3


def test_a_commit_that_changes_nothing_is_not_sent(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")
    files: dict[str, bytes | str] = {"config.json": "{}", "m.gguf": WEIGHTS, "README.md": CARD}
    oid = push(api, "me/x", files)
    assert push(api, "me/x", files) == oid
    assert len(hub.paths("PUT")) == 1 and len([path for path in hub.paths("POST") if "/commit/" in path]) == 1


def test_pull_requests(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.tokens["hf_other"] = "you"
    repository = hub.create("me/x", {"a.txt": b"a", "gone.txt": b"g"})
    other = HfApi(hub.url, token="hf_other")
    operations = [add("m.gguf", WEIGHTS), CommitOperationDelete("gone.txt")]
    done = other.create_commit("me/x", operations, commit_message="Add weights", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1") and done.pr_url == f"{hub.url}/me/x/discussions/1"
    push(other, "me/x", {"b.txt": "b"}, revision="refs/pr/1")
    draft = api.create_pull_request("me/x", "Drafted", description="why")
    assert (draft.num, draft.status, draft.git_reference, draft.events[0].content) == (2, "draft", "refs/pr/2", "why")
    push(api, "me/x", {"c.txt": "c"}, revision="refs/pr/2")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(other, "me/x", {"d.txt": "d"}, revision="refs/pr/2")
    for ref, status in ((None, 200), ("refs/pr/1", 200), ("main", 403), ("refs/pr/2", 403)):
        wanted = {"operation": "upload", "transfers": [], "objects": [], **({"ref": {"name": ref}} if ref else {})}
        told = httpx2.post(
            f"{hub.url}/me/x.git/info/lfs/objects/batch", json=wanted, headers={"Authorization": "Bearer hf_other"}
        )
        assert told.status_code == status
    twice = f"{hub.url}/api/models/me/x/revision/refs%252Fpr%252F1"  # quoted once too often
    assert httpx2.get(twice).headers["X-Error-Code"] == "RevisionNotFound"
    assert api.list_repo_files("me/x") == [".gitattributes", "a.txt", "gone.txt"]
    assert api.list_repo_files("me/x", revision="refs/pr/1") == [".gitattributes", "a.txt", "b.txt", "m.gguf"]
    assert [one.number for one in repository.pull_requests] == [1, 2]
    assert [(one.branch, one.author) for one in repository.commits[2:]] == [
        ("refs/pr/1", "you"),
        ("refs/pr/1", "you"),
        ("refs/pr/2", "me"),
    ]

    assert [(one.num, one.title, one.status, one.author) for one in api.get_repo_discussions("me/x")] == [
        (1, "Add weights", "open", "you"),
        (2, "Drafted", "draft", "me"),
    ]
    assert [one.num for one in api.get_repo_discussions("me/x", author="me", discussion_type="pull_request")] == [2]
    assert api.change_discussion_status("me/x", 2, "open").new_status == "open"
    assert api.change_discussion_status("me/x", 2, "closed", comment="no").new_status == "closed"
    assert [one.num for one in api.get_repo_discussions("me/x", discussion_status="open")] == [1]
    with pytest.raises(HfHubHTTPError, match="403"):
        other.change_discussion_status("me/x", 2, "open")
    assert api.comment_discussion("me/x", 1, "Well done").content == "Well done"
    refs = api.list_repo_refs("me/x", include_pull_requests=True)
    assert [one.name for one in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"] and len(refs.branches) == 1

    with pytest.raises(HfHubHTTPError, match="403"):
        other.merge_pull_request("me/x", 1)
    api.merge_pull_request("me/x", 1)
    told = api.get_discussion_details("me/x", 1)
    assert (told.status, told.merge_commit_oid) == ("merged", api.model_info("me/x").sha)
    assert [one.type for one in told.events] == ["comment", "commit", "commit", "comment", "status-change"]
    assert api.list_repo_files("me/x") == [".gitattributes", "a.txt", "b.txt", "m.gguf"]
    with pytest.raises(HfHubHTTPError, match="merged already"):
        api.merge_pull_request("me/x", 1)
    with pytest.raises(BadRequestError, match="at least 3 characters"):
        api.create_pull_request("me/x", "No")
    with pytest.raises(HfHubHTTPError, match="write token"):
        api.create_pull_request("me/x", "By a reader", token="hf_reader")


def test_a_card_is_read(hub: Hub, api: HfApi) -> None:
    ModelCard(CARD).validate()
    for text in ("---\n- a\n---\n", "---\nlanguage: [no]\n---\n", "---\na: b: c\n---\n", "---\nlicense: 2\n---\n"):
        with pytest.raises(ValueError, match="must be|YAML"):
            api._validate_yaml(text)
    with pytest.raises(ValueError, match="base_model_relation"):
        api._validate_yaml(CARD.replace("quantized", "converted"))
    hub.create("me/x")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push(api, "me/x", {"README.md": "---\ntags: 1\n---\n"})
    push(api, "me/x", {"README.md": CARD})
    assert api.model_info("me/x").card_data.base_model == "me/big"
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, "me/x", {"README.md": "# Nothing above\n"})


def test_a_folder_with_things_to_leave_out(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    for name in ("a.txt", "b.tmp", "m.gguf", "old.gguf", "sub/c.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(name.encode())
    (tmp_path / "out" / ".gitignore").write_text("*.tmp\nold.gguf\n")
    api.create_repo("me/x")
    api.upload_folder(repo_id="me/x", folder_path=tmp_path / "out", path_in_repo="v1")
    sent = {"v1/.gitignore", "v1/a.txt", "v1/b.tmp", "v1/m.gguf", "v1/old.gguf", "v1/sub/c.txt"}
    assert set(api.list_repo_files("me/x")) == {".gitattributes", *sent}
    api.upload_folder(repo_id="me/x", folder_path=tmp_path / "out")
    top = {path for path in api.list_repo_files("me/x") if not path.startswith("v1/")}
    assert top == {".gitattributes", ".gitignore", "a.txt", "m.gguf", "sub/c.txt"}


def test_what_it_does_not_know_is_told(client: None) -> None:
    with Hub() as hub:
        assert httpx2.get(f"{hub.url}/api/datasets/me/x").status_code == 501
        api = HfApi(hub.url, token="hf_good")
        hub.create("me/x")
        with pytest.raises(HfHubHTTPError, match="501"):
            api.delete_repo("me/x")
        with pytest.raises(HfHubHTTPError, match="models only"):
            api.create_repo("me/y", repo_type="dataset")
        broken = httpx2.post(f"{hub.url}/api/repos/create", content=b"{", headers={"Authorization": "Bearer hf_good"})
        assert broken.status_code == 500
        asked = [told.partition(": ")[0] for told in hub.unknown]
        assert asked == [
            "GET /api/datasets/me/x",
            "DELETE /api/repos/delete",
            "POST /api/repos/create",
            "POST /api/repos/create",
        ]


def test_many_at_once(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")

    def one(number: int) -> None:
        api.create_branch("me/x", branch=f"b{number}")
        content = WEIGHTS[number:]
        push(api, "me/x", {"m.gguf": content, "n.txt": f"{number}"}, revision=f"b{number}")
        push(api, "me/x", {f"{number}.txt": "main"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(16)))
    for number in range(16):
        assert sums(api, "me/x", f"b{number}")["m.gguf"] == hashlib.sha256(WEIGHTS[number:]).hexdigest()
    assert len(api.list_repo_files("me/x")) == 17 and len(api.list_repo_commits("me/x")) == 17


def test_it_ends_with_its_threads(client: None) -> None:
    before = threading.active_count()
    with httpx2.Client() as session:
        with Hub() as hub:
            session.get(f"{hub.url}/api/whoami-v2")  # and keeps the connection
            line = socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])))  # never says a word
            assert threading.active_count() > before
        assert threading.active_count() == before
        line.close()
