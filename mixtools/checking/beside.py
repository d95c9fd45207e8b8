"""What lies beside the weights, against the source's: all that loaders act on, and which differences are meant.

    configuration   config.json as transformers 4 and 5, vLLM and llama.cpp read it, a missing key being its default;
                    generation_config.json
    tokenizer       each file, entry by entry; then what the two do: every id's piece, special tokens, what goes round a
                    text, the ids of every piece's text, the ids of conversations

A cast means its dtype, a format its quantization_config. What mistral's layouts cannot hold is meant, too: the
conversion says so. Everything else is a fault.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from .. import formats
from ..config import load_object
from ..documents import MAX_DOCUMENT, for_version_4, is_hf
from ..errors import ConfigError, MixtoolsError, TokenizerError
from ..layouts.checkpoint import Checkpoint
from ..layouts.gguf import KEPT
from ..text.declared import TEMPLATES, Added, Declared, has_tokenizer, model_file
from ..text.pieces import JSON_FILE, read_model, read_pieces
from ..text.tokenizer import Tokenizer

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
# transformers' MixtralConfig, 4.36 to 5.23: what a key means that is not there, beside those that config.py knows
_DEFAULTS: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "attention_dropout": 0.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": True,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "initializer_range": 0.02,
    "attention_bias": False,
}  # fmt: skip
_SPELLINGS = ("torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters")
_SILENT = ("transformers_version", "_name_or_path")  # where a file comes from, which no loader acts on
_SILENT_OF_TOKENIZERS = (*_SILENT, "name_or_path", "is_local", "local_files_only", "backend", "special_tokens_map_file")
_FILES = (JSON_FILE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_IN_GGUF = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling")
_SHOWN = 5  # differences of one part of a file, each; the rest are counted
_LONGEST = 120  # characters of a value
_ABSENT = "(not there)"

CONVERSATIONS: tuple[list[dict[str, object]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " What is 2 + 2?\n"}],
    [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": " b "},
        {"role": "user", "content": "c\n\nd"},
    ],
    [
        {"role": "system", "content": "S"}, {"role": "user", "content": "</s> [INST]"},
        {"role": "assistant", "content": "ü€"}, {"role": "user", "content": "<|im_end|>"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
)  # fmt: skip


class Difference(NamedTuple):
    """One value that is not the source's.

    `expected`: the transformation means it; `lost`: since the output's layout has no place for what was there.
    """

    file: str
    key: str
    source: object
    output: object
    expected: bool = False
    lost: bool = False

    def document(self) -> dict[str, Any]:
        return {**self._asdict(), "source": _short(self.source), "output": _short(self.output)}

    def problem(self, folder: Path, kind: type[MixtoolsError] = ConfigError) -> MixtoolsError:
        where = f"{self.key} is not the source's" if self.key else "is not as the source has it"
        return kind(where, file=folder / self.file, expected=_told(self.source), found=_told(self.output))


def section(differences: Iterable[Difference]) -> dict[str, Any]:
    """As a part of check's document."""
    told = [difference.document() for difference in differences]
    return {"passed": all(one["expected"] for one in told), "differences": told}


def _short(value: object) -> object:
    """A value that a document can carry: long ones are cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return value if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _told(value: object) -> str:
    return str(_short(value) if isinstance(value, str) else _short(json.dumps(value, ensure_ascii=False)))


# --- the configuration ---


def configuration(source: Checkpoint, output: Checkpoint) -> list[Difference]:
    """Raises ConfigError for a generation_config.json that is none."""
    ours, theirs = _canonical(source), _canonical(output)
    losing = _is_losing(source, output)
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        if output.gguf is not None and not is_hf(source) and key not in (*typed_keys(source), *_IN_GGUF):
            continue  # neither has it: what one says there is made
        a, b = ours.get(key, _DEFAULTS.get(key)), theirs.get(key, _DEFAULTS.get(key))
        if _same(key, a, b):
            continue
        kept = output.gguf is not None and key in _IN_GGUF
        lost = losing and not kept and key not in typed_keys(source)
        meant = lost or _is_meant(key, a, b, source, output)
        found.append(Difference(CONFIG, key, a, None if lost else b, meant, lost))
    if is_hf(output) or losing:
        before, after = _generation(source, ours), _generation(output, theirs)
        for key in dict.fromkeys([*before, *after]):
            a, b = before.get(key), after.get(key)
            if not _same(key, a, b):
                found.append(Difference(GENERATION, key, a, None if losing else b, losing, losing))
    return found


def _is_of_gguf(checkpoint: Checkpoint) -> bool:
    return checkpoint.gguf is not None or (checkpoint.folder / KEPT).is_file()


def _is_losing(source: Checkpoint, output: Checkpoint) -> bool:
    """To a layout that has no place for most of what a config.json says."""
    to_gguf = source.gguf is None and output.gguf is not None
    return is_hf(source) and (to_gguf or not is_hf(output))


def typed_keys(checkpoint: Checkpoint) -> set[str]:
    """Keys that MixtralConfig carries: integrity.compare_configs has words for them."""
    return {*checkpoint.config.to_hf("")} - _DEFAULTS.keys() - {*_SPELLINGS} | {"rope_theta", "rope_scaling"}


def _canonical(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json in one spelling; of a torrent the one that is made of its params.json."""
    dtype = checkpoint.main_dtype().torch_name if not checkpoint.problems else None
    made = checkpoint.config.to_hf(dtype or "")
    document = checkpoint.document if is_hf(checkpoint) else made
    rest = {key: value for key, value in document.items() if key not in (*_SPELLINGS, *_SILENT)}
    scaling = checkpoint.config.rope_scaling
    return {
        **rest,
        **{key: made[key] for key in typed_keys(checkpoint) if key in made},
        "dtype": document.get("dtype", document.get("torch_dtype", dtype)),
        "rope_theta": checkpoint.config.rope_theta,
        "rope_scaling": asdict(scaling) if scaling else None,
    }


def _same(key: str, a: object, b: object) -> bool:
    if key == "eos_token_id":
        a, b = (value if isinstance(value, list) else [value] for value in (a, b))
    return a == b and (isinstance(a, bool) == isinstance(b, bool))


def _is_meant(key: str, a: object, b: object, source: Checkpoint, output: Checkpoint) -> bool:
    if output.problems:
        return False
    if key == "dtype":  # a cast means its own
        return source.main_dtype() is not output.main_dtype() and b == output.main_dtype().torch_name
    if key == "quantization_config":
        known = a is None or (isinstance(a, Mapping) and formats.claims(a))
        return known and (b is None or _tells(b, output))
    if key == "tie_word_embeddings":  # written apart, or the source's head was not the embedding in spite of it
        return a is True and b is False
    return False


def _tells(quantization: object, of: Checkpoint) -> bool:
    """Whether it is that of matrices which are there: loaders stumble over one without them."""
    there = {type(of.format(slot)) for slot in of.slots()}
    return isinstance(quantization, Mapping) and any(kind.claims(quantization) for kind in there)


def _generation(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json, over what config.json says of it."""
    ends = {key: config.get(key, _DEFAULTS[key]) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own = load_object(checkpoint.beside / GENERATION, MAX_DOCUMENT)
    silent = (*_SILENT, "_from_model_config")
    return {**ends, **{key: value for key, value in own.items() if key not in silent}}


# --- the tokenizer ---


def tokenizer(source: Checkpoint, output: Checkpoint) -> list[Difference]:
    """Raises TokenizerError or ConfigError for a file of either that cannot be read."""
    ours, theirs = source.beside, output.beside
    if not has_tokenizer(ours):
        return []
    losing = is_hf(source) and not is_hf(output)
    if _is_of_gguf(source) != _is_of_gguf(output):  # of a GGUF's metadata the files are made anew
        if not has_tokenizer(theirs):
            return [Difference("tokenizer", "", "there", _ABSENT)]
        return list(_behaviour(Tokenizer.from_folder(ours), Tokenizer.from_folder(theirs), False, {}))
    if not has_tokenizer(theirs):
        lost = losing and model_file(ours) is None
        return [Difference("tokenizer", "", "there", _ABSENT, lost, lost)]
    found = list(_files(ours, theirs, losing, made=not is_hf(source)))
    if found or not _all_equal(ours, theirs):
        added = Declared.of(ours).added if losing else {}
        found += _behaviour(Tokenizer.from_folder(ours), Tokenizer.from_folder(theirs), losing, added)
    return found


def _names(folder: Path) -> list[str]:
    model = model_file(folder)
    others = sorted(f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja"))
    return [name for name in (*_FILES, *others) if (folder / name).is_file()] + ([model.name] if model else [])


def _all_equal(ours: Path, theirs: Path) -> bool:
    names = _names(ours)
    return names == _names(theirs) and all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


def _files(ours: Path, theirs: Path, losing: bool, made: bool) -> Iterator[Difference]:
    """`losing`: the output's layout has no place for most; `made`: the source's had none, so they are made."""
    here, there = _names(ours), _names(theirs)
    for name in dict.fromkeys([*here, *there]):
        if name not in there:
            yield Difference(name, "", "there", _ABSENT, losing, losing)
        elif name not in here:
            yield Difference(name, "", _ABSENT, "there", made or name == JSON_FILE)
        elif (ours / name).read_bytes() != (theirs / name).read_bytes():
            yield from _compared(name, ours / name, theirs / name)


def _compared(name: str, ours: Path, theirs: Path) -> Iterator[Difference]:
    """Two files of one name that are not equal byte for byte."""
    if name == JSON_FILE:
        read: Callable[[Path], object] = _tokenizer_json
    elif name == TOKENIZER_CONFIG:
        read = _tokenizer_config
    elif name.endswith(".json"):
        read = partial(load_object, limit=MAX_DOCUMENT)
    elif name.endswith(".jinja"):
        read = partial(Path.read_text, encoding="utf-8")
    else:
        read = _pieces
    yield from (Difference(name, key, a, b) for key, a, b in _counted(_walk(read(ours), read(theirs), "")))


def _tokenizer_json(path: Path) -> object:
    """By id what stands by piece, merges in the old spelling, so that each entry has a name of its own."""
    document = dict(load_object(path, MAX_DOCUMENT))
    model = document.get("model")
    if isinstance(model, dict):
        model = dict(model)
        if isinstance(vocabulary := model.get("vocab"), dict):
            model["vocab"] = {str(index): piece for piece, index in vocabulary.items()}
        if isinstance(merges := model.get("merges"), list):
            model["merges"] = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
        document["model"] = model
    if isinstance(added := document.get("added_tokens"), list):
        document["added_tokens"] = {str(token.get("id")): token for token in added if isinstance(token, dict)}
    return document


def _tokenizer_config(path: Path) -> object:
    document = for_version_4(load_object(path, MAX_DOCUMENT))
    return {key: value for key, value in document.items() if key not in _SILENT_OF_TOKENIZERS}


def _pieces(path: Path) -> object:
    data = read_model(path)
    found = {str(n): [piece.text, piece.score, piece.kind.name] for n, piece in enumerate(read_pieces(data, path).all)}
    return {"pieces": found, "sha256": hashlib.sha256(data).hexdigest()}


def _walk(a: object, b: object, key: str) -> Iterator[tuple[str, object, object]]:
    """Where two documents differ: the key in them, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _walk(a.get(name, _ABSENT), b.get(name, _ABSENT), inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for at, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _walk(x, y, f"{key}[{at}]")
    elif isinstance(a, list) and isinstance(b, list) and a[: len(b)] != b[: len(a)]:
        at = next(at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        yield f"{key}[{at}]", a[at], b[at]
        yield f"{key} (length)", len(a), len(b)
    elif isinstance(a, list) and isinstance(b, list):
        yield f"{key} (length)", len(a), len(b)
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield key, a, b


def _counted(found: Iterator[tuple[str, object, object]]) -> Iterator[tuple[str, object, object]]:
    first = list(islice(found, _SHOWN))
    yield from first
    if more := sum(1 for _ in found):
        yield "(further entries)", f"{more} more", f"{more} more that differ"


def _behaviour(ours: Tokenizer, theirs: Tokenizer, losing: bool, added: Mapping[int, Added]) -> Iterator[Difference]:
    """What the two do, whatever files say it.

    `losing`: added tokens and the template have no place in the output; `added`: those by id, of which a fine-tune may
    have some in the place of pieces, such as an </s> that is no longer special.
    """
    name = theirs.file.name
    count = min(len(ours.meanings), len(theirs.meanings)) if losing else max(len(ours.meanings), len(theirs.meanings))
    pieces = (
        (f"id {at}", _at(ours.meanings, at), _at(theirs.meanings, at))
        for at in range(count)
        if at not in added and _at(ours.meanings, at) != _at(theirs.meanings, at)
    )
    yield from (Difference(name, *one) for one in _counted(pieces))
    if len(ours.meanings) != len(theirs.meanings):
        yield Difference(name, "number of tokens", len(ours.meanings), len(theirs.meanings), losing, losing)
    for text in dict.fromkeys([*ours.special, *theirs.special]):
        a, b = ours.special.get(text), theirs.special.get(text)
        if a != b:
            yield Difference(name, f"special token {text}", a, b, losing and b is None, losing and b is None)
    if (around := ours.encode("")) != theirs.encode(""):
        yield Difference(name, "what goes round a text", around, theirs.encode(""))
    skipped = [token.content for token in added.values()]
    yield from islice((Difference(name, *one) for one in _ids(ours, theirs, losing, skipped)), 1)
    yield from islice((Difference(name, *one, losing, losing) for one in _chats(ours, theirs)), 1)


def _at(meanings: Any, index: int) -> object:
    """As JSON: text, a byte's number, None for what is never printed."""
    if index >= len(meanings):
        return _ABSENT
    meaning = meanings[index]
    return list(meaning) if isinstance(meaning, bytes | bytearray) else meaning


def _ids(ours: Tokenizer, theirs: Tokenizer, losing: bool, skipped: list[str]) -> Iterator[tuple[str, object, object]]:
    """Of every piece's text, alone and before the one before it; none that holds a text of `skipped`."""
    spelled = [ours.decode([at]) for at in range(len(theirs.meanings) if losing else len(ours.meanings))]
    for text in (*spelled, *(second + first for first, second in pairwise(spelled))):
        a, b = ours.encode(text, bos=False), theirs.encode(text, bos=False)
        if a != b and not any(word in text for word in skipped):
            yield f"ids of {text!r}", a, b


def _chats(ours: Tokenizer, theirs: Tokenizer) -> Iterator[tuple[str, object, object]]:
    for number, messages in enumerate(CONVERSATIONS, 1):
        a, b = (_conversed(tokenizer, messages) for tokenizer in (ours, theirs))
        if a != b:
            yield f"ids of conversation {number}", a, b


def _conversed(tokenizer: Tokenizer, messages: list[dict[str, object]]) -> object:
    """Its ids, or that it is refused, whatever the words."""
    try:
        return tokenizer.encode_chat(messages)
    except TokenizerError:
        return "refused"
