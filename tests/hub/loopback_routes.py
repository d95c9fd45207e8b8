"""What the loopback Hub answers about users, repositories, files and pull requests.

The interface is the Hub's (https://huggingface.co/docs/hub/api) as far as huggingface_hub 2.4 asks for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml
from hub.loopback_http import Answer, Ask, refused, route
from hub.loopback_store import WHEN, PullRequest, Refusal, Repository

if TYPE_CHECKING:
    from hub.loopback import Hub

CARD_TEXTS = ("license", "license_name", "library_name", "pipeline_tag", "model_name")
CARD_LISTS = ("tags", "language", "base_model", "datasets", "metrics")  # a text or a list of texts
RELATIONS = ("adapter", "merge", "quantized", "finetune")


@route("GET", "/api/whoami-v2")
def _whoami(hub: Hub, ask: Ask) -> Answer:
    user = hub.user(ask)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in sorted(hub.orgs.get(user, ()))]
    token = {"displayName": "test", "role": "read" if hub.token(ask) in hub.readers else "write", "createdAt": WHEN}
    auth = {"type": "access_token", "accessToken": token}
    return Answer({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": auth})


@route("GET", "/api/agent-harnesses")
def _harnesses(hub: Hub, ask: Ask) -> Answer:
    """The client asks this once for the words in its User-Agent."""
    return Answer({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/repos/create")
def _create(hub: Hub, ask: Ask) -> Answer:
    user, wanted = hub.writer(ask), ask.json()
    space = wanted.get("organization") or user
    if not hub.member(user, space):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{space}"')
    if wanted.get("type", "model") != "model":
        raise Refusal(501, "The loopback Hub holds models only")
    name = f"{space}/{wanted['name']}"
    found = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        raise Refusal(409, "You already created this model repo", **found)
    hub.create(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return Answer(found)


def _metadata(text: str) -> Any:
    """What the front matter of a card says; None without one. Raises YAMLError."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


@route("POST", "/api/validate-yaml")
def _validate(hub: Hub, ask: Ask) -> Answer:
    try:
        card = _metadata(ask.json()["content"])
    except yaml.YAMLError as error:
        return Answer({"errors": [{"message": f"YAML metadata error: {error}"}], "warnings": []}, 400)
    if card is None:
        return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    wrong = [] if isinstance(card, dict) else ["YAML metadata must be a mapping"]
    for name, value in card.items() if isinstance(card, dict) else ():
        items = value if isinstance(value, list) and name in CARD_LISTS else [value]
        if name in CARD_TEXTS + CARD_LISTS and not all(isinstance(item, str) for item in items):
            wrong.append(f'"{name}" must be {"a string or a list of strings" if name in CARD_LISTS else "a string"}')
        if name == "base_model_relation" and value not in RELATIONS:
            wrong.append(f'"{name}" must be one of {", ".join(RELATIONS)}')
    return Answer({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)


@route("GET", "/api/models/ID(/revision/REV)?")
def _info(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    oid, files = repository.resolve(ask.parts.get("revision", "main"))
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(files.items()):
        siblings.append({"rfilename": path})
        if ask.flag("blobs"):
            listed = blob.listed(path)
            siblings[-1] |= {"size": blob.size, "blobId": blob.oid}
            if "lfs" in listed:
                siblings[-1]["lfs"] = {**listed["lfs"], "sha256": blob.sha256}
    space = repository.id.partition("/")[0]
    info = {"id": repository.id, "modelId": repository.id, "author": space, "sha": oid, "private": repository.private}
    info |= {"gated": False, "disabled": False, "lastModified": WHEN, "createdAt": WHEN, "siblings": siblings}
    card = _metadata(files["README.md"].read().decode()) if "README.md" in files else None
    return Answer({**info, "downloads": 0, "likes": 0, "tags": [], **({"cardData": card} if card else {})})


@route("GET", "/api/models/ID/auth-check(?P<write>/write)?")
def _auth(hub: Hub, ask: Ask) -> Answer:
    if ask.parts.get("write"):
        hub.writable(ask)
    else:
        hub.readable(ask)
    return Answer({})


@route("GET", "/api/models/ID/refs")
def _refs(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for name, oid in repository.heads.items():
        pull = name.startswith("refs/pr/")
        place = found["pullRequests" if pull else "branches"]
        place.append({"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": oid})
    found["tags"] = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repository.tags.items()]
    return Answer(found)


@route("GET", "/api/models/ID/commits/REV")
def _commits(hub: Hub, ask: Ask) -> Answer:
    found = hub.readable(ask).history(ask["revision"])
    keys = ("id", "title", "message", "date", "authors")
    rows = [(one.oid, one.message, one.description, WHEN, [{"user": one.author}]) for one in found]
    return Answer([dict(zip(keys, row, strict=True)) for row in rows])


@route("POST", "/api/models/ID/branch/REV")
def _branch(hub: Hub, ask: Ask) -> Answer:
    repository, name = hub.writable(ask), ask["revision"]
    if name in repository.heads or name in repository.tags:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repository.branch_off(name, ask.json().get("startingPoint", "main"))
    return Answer({})


@route("POST", "/api/models/ID/tag/REV")
def _tag(hub: Hub, ask: Ask) -> Answer:
    repository, name = hub.writable(ask), ask.json()["tag"]
    oid, _ = repository.resolve(ask["revision"])
    if name in repository.heads or name in repository.tags:
        raise Refusal(409, f"Tag reference exists already: refs/tags/{name}")
    repository.tags[name] = oid
    return Answer({})


@route("GET", "/api/models/ID/tree/REV(/(?P<path>.+))?")
def _tree(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    _, files = repository.resolve(ask["revision"])
    above = f"{ask['path'].strip('/')}/" if "path" in ask.parts else ""
    found = [one for one in repository.entries(files, expand=ask.flag("expand")) if one["path"].startswith(above)]
    if above and not found:
        raise Refusal(404, f"{ask['path']} does not exist on {ask['revision']}", "EntryNotFound")
    return Answer([one for one in found if ask.flag("recursive") or "/" not in one["path"][len(above) :]])


@route("POST", "/api/models/ID/paths-info/REV")
def _paths_info(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    form = parse_qs(ask.body.decode())
    _, files = repository.resolve(ask["revision"])
    expand = form.get("expand") == ["true"]
    return Answer([one for one in repository.entries(files, expand=expand) if one["path"] in form.get("paths", [])])


@route("GET", "/ID/resolve/REV/(?P<path>.+)")
def _file(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    oid, files = repository.resolve(ask["revision"])
    blob = files.get(ask["path"])
    headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    if blob is None:
        answer = refused(Refusal(404, "Entry not found", "EntryNotFound"))
        answer.headers |= headers
        return answer
    headers["ETag"] = f'"{blob.etag}"'
    if blob.sha256:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    if blob.xet:
        route = f"{hub.url}/api/models/{quote(repository.id)}/xet-read-token/{oid}"
        headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": route}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
    if asked is None:
        return Answer(blob.read(), headers=headers)
    first, last = int(asked[1]), min(int(asked[2] or blob.size), blob.size - 1)
    if first > last:
        return Answer(status=416, headers={**headers, "Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
    return Answer(blob.read()[first : last + 1], 206, headers)


def _request(repository: Repository, ask: Ask) -> PullRequest:
    for request in repository.pull_requests:
        if str(request.number) == ask["number"]:
            return request
    raise Refusal(404, "Discussion not found")


@route("GET", "/api/models/ID/discussions")
def _discussions(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    kind, status, author = ask.asked("type") or "all", ask.asked("status") or "all", ask.asked("author")
    wanted = {"all": {"draft", "open", "closed", "merged"}, "open": {"draft", "open"}, "closed": {"closed", "merged"}}
    found = [
        request.listed(repository.id)
        for request in repository.pull_requests
        if kind != "discussion" and request.status in wanted[status] and author in {"", request.author}
    ]
    return Answer({"discussions": found, "count": len(found), "start": 0})


@route("POST", "/api/models/ID/discussions")
def _propose(hub: Hub, ask: Ask) -> Answer:
    repository, wanted = hub.writable(ask, pull=True), ask.json()
    if not wanted.get("pullRequest"):
        raise Refusal(501, "The loopback Hub knows pull requests only")
    if len(wanted["title"]) < 3:
        raise Refusal(400, "The title must have at least 3 characters")
    request = repository.propose(wanted["title"], hub.writer(ask), "draft", "main", wanted.get("description", ""))
    address = f"{hub.url}/{repository.id}/discussions/{request.number}"
    return Answer({"num": request.number, "pullRequest": True, "url": address})


@route("GET", "/api/models/ID/discussions/(?P<number>[0-9]+)")
def _discussion(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    request = _request(repository, ask)
    changes = {"base": "refs/heads/main", **({"mergeCommitId": request.merged_as} if request.merged_as else {})}
    more = {"events": request.events, "changes": changes, "filesWithConflicts": [], "diff": ""}
    return Answer({**request.listed(repository.id), **more})


@route("POST", "/api/models/ID/discussions/(?P<number>[0-9]+)/(?P<what>status|comment|merge)")
def _discuss(hub: Hub, ask: Ask) -> Answer:
    repository = hub.readable(ask)
    request, user, wanted = _request(repository, ask), hub.writer(ask), ask.json()
    if ask["what"] == "comment":
        words = {"latest": {"raw": wanted["comment"], "html": wanted["comment"], "updatedAt": WHEN}, "history": []}
        return Answer({"newMessage": request.happened("comment", user, {"edited": False, "hidden": False, **words})})
    hub.writable(ask, request.ref if ask["what"] == "status" else None)
    if request.status == "merged":
        raise Refusal(409, "This pull request is merged already")
    if ask["what"] == "merge":
        main, files = repository.branches["main"], repository.branches[request.ref]
        added = {path: blob for path, blob in files.items() if main.get(path) != blob}
        done = repository.commit("main", f"{request.title} (#{request.number})", added, main.keys() - files.keys())
        request.status, request.merged_as = "merged", done.oid
    else:
        request.status = wanted["status"]
    return Answer({"newStatus": request.happened("status-change", user, {"status": request.status})})
