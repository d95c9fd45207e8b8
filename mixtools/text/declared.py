"""What a model's folder says of its tokenizer beside the vocabulary: special tokens, BOS rule, template, ends.

The rules are those of transformers 5 (tokenization_utils_base.py and tokenization_utils_tokenizers.py in
https://github.com/huggingface/transformers):
- added tokens are tokenizer_config.json's `added_tokens_decoder`, else added_tokens.json, where those are special that
  tokenizer_config.json or special_tokens_map.json name. The latter counts only without an `added_tokens_decoder`.
- a template in chat_template.jinja goes before tokenizer_config.json's; of several, the one named "default" is meant.
- generation ends at generation_config.json's `eos_token_id`, else config.json's; one number or a list.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import load_object
from ..errors import ConfigError, TokenizerError
from .pieces import JSON_FILE, MODEL_FILE, read_model

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder of others than the default, since transformers 4.52
_MAX_BYTES = 1 << 24  # tokens by the thousand, and a template
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_VERSION = re.compile(re.escape(MODEL_FILE) + r"\.v(\d+)")
_NEWEST = 3  # the last version of mistral's tokenizers that a Mixtral has


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text itself. `lstrip`, `rstrip`: it takes the blanks on that side with it."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Declared:
    """`config`: tokenizer_config.json. `names`: "bos_token" and the like, where they are set. `extra`: further special
    tokens. `added`: by id. `ids`: config.json's ids of "bos_token" and "eos_token". `ends`: ids that end generation."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    added: Mapping[int, Added] = field(default_factory=dict)
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Declared:
        """Read the documents. Raises ConfigError or TokenizerError for one that is damaged; each may be missing."""
        config = _read(folder / CONFIG_FILE)
        model, generation = _read(folder / "config.json"), _read(folder / "generation_config.json")
        told = dict(config)
        if "added_tokens_decoder" not in config:
            told |= _read(folder / "special_tokens_map.json")
        names = {key: text for key in _NAMED if (text := _content(told.get(key), key, folder))}
        listed = told.get("extra_special_tokens") or told.get("additional_special_tokens") or ()
        listed = listed.values() if isinstance(listed, dict) else listed
        extra = tuple(text for token in listed if (text := _content(token, "extra_special_tokens", folder)))
        ids = {name: _ids(model, f"{name}_id", folder / "config.json") for name in ("bos_token", "eos_token")}
        ends = _ids(generation, "eos_token_id", folder / "generation_config.json") or ids["eos_token"]
        return cls(folder, config, names, extra, _added(folder, config, {*names.values(), *extra}), ids, ends)

    @property
    def is_mistrals(self) -> bool:
        """No document of Hugging Face's is there: mistral's own layouts have tokenizer.model and params.json alone."""
        return not any((self.folder / name).exists() for name in (CONFIG_FILE, JSON_FILE, TEMPLATE_FILE, "config.json"))

    def template(self) -> str | None:
        """The model's own chat template, None without one. Raises TokenizerError if it is there and no text."""
        if (file := self.folder / TEMPLATE_FILE).exists():
            try:
                return file.read_text("utf-8")
            except (OSError, ValueError) as error:
                raise TokenizerError(f"cannot be read ({error})", file=file) from None
        found = self.config.get("chat_template")
        file = self.folder / CONFIG_FILE
        if isinstance(found, list):
            try:
                named = {str(one["name"]): one["template"] for one in found}
            except (TypeError, KeyError):
                raise TokenizerError("chat_template lists something other than named templates", file=file) from None
            if "default" not in named:
                raise TokenizerError(f"has the chat templates {', '.join(named)}, and no default", file=file)
            found = named["default"]
        if found is not None and not isinstance(found, str):
            raise TokenizerError(f"chat_template is {reprlib.repr(found)}, not a text", file=file)
        return found


def model_file(folder: Path) -> Path | None:
    """The folder's tokenizer.model, also as tokenizer.model.v1 to v3, mistral's names for it; None without one.

    Raises TokenizerError for a later version alone, and for several that differ.
    """
    if (file := folder / MODEL_FILE).exists():
        return file
    found = sorted(path for path in folder.glob(f"{MODEL_FILE}.v*") if _VERSION.match(path.name))
    known = [path for path in found if int(_VERSION.match(path.name)[1]) <= _NEWEST]  # type: ignore[index]  # matched
    if found and not known:
        raise TokenizerError(f"is of a version later than v{_NEWEST}, which no Mixtral uses", file=found[0])
    if len({read_model(path) for path in known}) > 1:
        names = ", ".join(path.name for path in known)
        raise TokenizerError(f"holds {names}, which differ; rename the model's own to {MODEL_FILE}", file=folder)
    return known[0] if known else None


def has_tokenizer(folder: Path) -> bool:
    """Whether Tokenizer.from_folder has something to read."""
    return (folder / JSON_FILE).exists() or any(folder.glob(f"{MODEL_FILE}*"))


def _read(file: Path) -> dict[str, Any]:
    return load_object(file, _MAX_BYTES)


def _content(value: object, key: str, folder: Path) -> str | None:
    """The text of a token: itself, or an AddedToken's."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value or None
    raise TokenizerError(f"{key} is {reprlib.repr(value)}, not a token", file=folder / CONFIG_FILE)


def _ids(document: Mapping[str, Any], key: str, file: Path) -> tuple[int, ...]:
    value = document.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in values):
        raise ConfigError(f"{key} is {reprlib.repr(value)}, not a number or a list of numbers", file=file)
    return tuple(values)


def _added(folder: Path, config: Mapping[str, Any], special: set[str]) -> dict[int, Added]:
    file = folder / CONFIG_FILE
    try:
        if "added_tokens_decoder" in config:
            flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
            return {
                int(index): Added(str(token["content"]), *(bool(token.get(flag, False)) for flag in flags))
                for index, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
            }
        file = folder / "added_tokens.json"
        found = {int(index): text for text, index in _read(file).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"the added tokens are not what they should be ({error!r})", file=file) from None
    return {
        index: Added(text, special=text in special, normalized=text not in special)
        for index, text in sorted(found.items())
    }
