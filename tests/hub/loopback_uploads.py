"""How files come into the loopback Hub: git-lfs in one part or several, Xet, commits.

git-lfs: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, with the Hub's own way to send an object in
parts (`chunk_size` and an address a part in the header of its upload).
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

from hub.loopback_http import Answer, Ask, route
from hub.loopback_store import Blob, Refusal, Repository, ignored, is_large, read_commit

if TYPE_CHECKING:
    from hub.loopback import Hub


@route("POST", "/api/models/ID/preupload/REV")
def _preupload(hub: Hub, ask: Ask) -> Answer:
    repository = hub.writable(ask, ask["revision"], pull=ask.flag("create_pr"))
    _, files = repository.resolve(ask["revision"])
    rules = ask.json().get("gitIgnore")
    if rules is None:
        rules = files[".gitignore"].read().decode() if ".gitignore" in files else ""
    found = []
    for wanted in ask.json()["files"]:
        path = wanted["path"]
        mode = "lfs" if is_large(path, wanted["size"]) else "regular"
        found.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored(path, rules)})
        if path in files:
            found[-1]["oid"] = files[path].etag
    return Answer({"files": found})


@route("POST", r"/ID\.git/info/lfs/objects/batch")
def _batch(hub: Hub, ask: Ask) -> Answer:
    wanted = ask.json()
    revision = wanted.get("ref", {}).get("name")
    repository = hub.writable(ask, revision, pull=revision is None)  # without a ref it is for a pull request to come
    if wanted["operation"] != "upload" or wanted.get("hash_algo", "sha256") != "sha256":
        raise Refusal(501, "The loopback Hub takes uploads named by sha256 only")
    found = []
    for item in wanted["objects"]:
        oid, size = item["oid"], item["size"]
        found.append({"oid": oid, "size": size})
        if oid in repository.objects:
            continue
        place = f"{hub.url}/lfs/{repository.id}/{oid}"
        sign = f"signature={hub.signature(repository.id, oid)}"
        upload: dict[str, Any] = {"href": f"{place}?{sign}"}
        if hub.part_size and size > hub.part_size and "multipart" in wanted["transfers"]:
            parts = -(-size // hub.part_size)
            addresses = {f"{part:05d}": f"{place}?{sign}&part={part}" for part in range(1, parts + 1)}
            upload = {"href": f"{place}/complete?{sign}", "header": {"chunk_size": str(hub.part_size), **addresses}}
        verify = {"href": f"{hub.url}/{repository.id}.git/info/lfs/objects/verify"}
        found[-1]["actions"] = {"upload": upload, "verify": verify}
    return Answer({"transfer": "basic", "objects": found})


def _signed(hub: Hub, ask: Ask) -> Repository:
    """These addresses are another company's: they know no token, only what the Hub signed."""
    if ask.request.authorization or ask.asked("signature") != hub.signature(ask["id"], ask["oid"]):
        raise Refusal(403, "The signature does not match, or there is an Authorization header beside it")
    return hub.repositories[ask["id"]]


def _keep(repository: Repository, oid: str, content: bytes) -> Answer:
    stored = hashlib.sha256(content).hexdigest()
    if stored != oid:
        raise Refusal(400, f"BadDigest: {len(content)} bytes of sha256 {stored} came as {oid}")
    repository.objects[oid] = content
    return Answer()


@route("PUT", "/lfs/ID/(?P<oid>[0-9a-f]{64})")
def _put(hub: Hub, ask: Ask) -> Answer:
    repository, part = _signed(hub, ask), ask.asked("part")
    if not part:
        return _keep(repository, ask["oid"], ask.body)
    hub.pieces.setdefault((ask["id"], ask["oid"]), {})[int(part)] = ask.body
    return Answer(headers={"ETag": f'"{hashlib.md5(ask.body).hexdigest()}"'})


@route("POST", "/lfs/ID/(?P<oid>[0-9a-f]{64})/complete")
def _complete(hub: Hub, ask: Ask) -> Answer:
    repository, pieces = _signed(hub, ask), hub.pieces.get((ask["id"], ask["oid"]), {})
    told = [(part["partNumber"], part["etag"].strip('"')) for part in ask.json()["parts"]]
    if told != [(number, hashlib.md5(piece).hexdigest()) for number, piece in sorted(pieces.items())]:
        raise Refusal(400, "InvalidPart: the parts told are not the parts that came")
    return _keep(repository, ask["oid"], b"".join(piece for _, piece in sorted(pieces.items())))


@route("POST", r"/ID\.git/info/lfs/objects/verify")
def _verify(hub: Hub, ask: Ask) -> Answer:
    hub.writer(ask)
    content = hub.readable(ask).objects.get(ask.json()["oid"])
    if content is None or len(content) != ask.json()["size"]:
        raise Refusal(404, "No such object, or one of another size")
    return Answer({})


@route("GET", "/api/models/ID/xet-(?P<right>read|write)-token/REV")
def _xet_token(hub: Hub, ask: Ask) -> Answer:
    if hub.xet is None:
        raise Refusal(501, "This loopback Hub has no Xet store; set HF_HUB_DISABLE_XET, or use Hub(xet=FOLDER)")
    if ask["right"] == "write":
        hub.writable(ask, ask["revision"], pull=ask.flag("create_pr"))
    else:
        hub.readable(ask)
    address, until = f"local://{hub.xet.folder}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
    return Answer({"casUrl": address, "accessToken": "xet", "exp": until}, headers=headers)


@route("POST", "/api/models/ID/commit/REV")
def _commit(hub: Hub, ask: Ask) -> Answer:
    pull, branch = ask.flag("create_pr"), ask["revision"]
    repository = hub.writable(ask, branch, pull=pull)
    head, files = repository.resolve(branch)
    if ask.headers.get("Content-Type") != "application/x-ndjson":
        raise Refusal(400, "A commit is sent as application/x-ndjson")
    if branch not in repository.heads:
        raise Refusal(400, f"{branch} is no branch")
    fetch = hub.xet.fetch if hub.xet else _nothing
    header, added, deleted = read_commit(ask.body, repository, files, fetch, hub.corrupt)
    if not head.startswith(header.get("parentCommit", "")):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    user, title, words = hub.writer(ask), header["summary"], header.get("description", "")
    found: dict[str, Any] = {"success": True, "hookOutput": ""}
    if pull:
        request = repository.propose(title, user, "open", branch, words)
        branch = request.ref
        found["pullRequestUrl"] = f"{hub.url}/{repository.id}/discussions/{request.number}"
    done = repository.commit(branch, title, added, deleted, author=user, description=words)
    for request in repository.pull_requests:
        if request.ref == branch:
            request.happened("commit", user, {"subject": title, "oid": done.oid})
    return Answer({**found, "commitOid": done.oid, "commitUrl": f"{hub.url}/{repository.id}/commit/{done.oid}"})


def _nothing(sha256: str) -> Blob | None:
    return None
