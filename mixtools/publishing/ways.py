"""How to run what was made, by the programs that load it (loaders.py), as a card shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from . import loaders
from .loaders import LEGACY

_QUESTION = "What is your favourite condiment?"


class Way(NamedTuple):
    """`code` in `language`, and what it is for."""

    title: str
    language: str
    code: str


class Subject(NamedTuple):
    """What is to be run. `format`, `names`: loaders.py's, or "torrent", "factored"; `chat`: it has a template."""

    repository: str
    format: str
    names: str = LEGACY
    revision: str = ""
    file: str = ""
    kind: str = ""
    bits: int = 0
    symmetric: bool = False
    chat: bool = True


def ways(subject: Subject) -> Iterator[Way]:
    """The commands and scripts, those that most people use first."""
    repository = subject.repository
    if subject.format == "GGUF":
        yield from _gguf(subject)
    elif subject.format == "torrent":
        yield Way("mistral-inference, on the folder downloaded to `model`:", "bash", _mistral(repository, subject.chat))
    elif subject.format == "factored":
        code = f"mixtools convert to-hf {repository} dense"
        yield Way("The factors are multiplied for other programs by mixtools; then as any Mixtral:", "bash", code)
    else:
        yield from _by_loader(subject)
    told = "--chat --prompt" if subject.chat else "--prompt"
    model = f"{repository}/{subject.file}" if subject.file else repository
    at = f"@{subject.revision}" if subject.revision else ""
    yield Way("mixtools:", "bash", f'mixtools generate {model}{at} {told} "{_QUESTION}" --max-new-tokens 64')


def _gguf(subject: Subject) -> Iterator[Way]:
    chat = "" if subject.chat else " -no-cnv"
    code = f'llama-cli -hf {subject.repository}:{subject.kind}{chat} -p "{_QUESTION}" -n 64'
    yield Way("llama.cpp, which fetches the file by its type:", "bash", code)
    code = f"llama-server -m {subject.file} -c 4096"
    yield Way("or its server, on a file that lies there:", "bash", code)


def _by_loader(subject: Subject) -> Iterator[Way]:
    row = loaders.of(subject.format, subject.names)
    loads = row.loads if row else ""
    if subject.format == "dense" and row is not None:
        yield Way("transformers (and accelerate):", "python", _transformers(subject))
    if subject.format == "compressed-tensors" and "transformers 5" in loads and subject.symmetric:
        needs = "`pip install transformers compressed-tensors accelerate`"
        yield Way(f"transformers ({needs}):", "python", _transformers(subject))
    if subject.format in ("nf4", "int8") and "transformers 4" in loads:
        needs = "`pip install 'transformers<5' bitsandbytes accelerate`"
        yield Way(f"transformers 4 ({needs}; version 5 does not load it):", "python", _transformers(subject))
    if subject.format == "compressed-tensors" and not subject.symmetric and "4.57" in loads:
        needs = "`pip install 'transformers<5' compressed-tensors accelerate`"
        yield Way(f"transformers 4 ({needs}; version 5 refuses it):", "python", _transformers(subject))
    if "auto-gptq" in loads:
        yield Way("auto-gptq 0.7.1:", "python", _auto_gptq(subject))
    if "autoawq" in loads:
        yield Way("autoawq 0.2.9:", "python", _autoawq(subject))
    if "GPTQModel" in loads and (subject.symmetric or subject.format == "autoawq"):
        yield Way("GPTQModel:", "python", _gptqmodel(subject))
    if "vLLM" in loads and (subject.format == "dense" or (subject.bits == 4 and subject.symmetric)):
        at = f" --revision {subject.revision}" if subject.revision else ""
        yield Way("vLLM:", "bash", f"vllm serve {subject.repository}{at}")


def _transformers(subject: Subject) -> str:
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{subject.repository}"
tokenizer = AutoTokenizer.from_pretrained(name{_at(subject)})
model = AutoModelForCausalLM.from_pretrained(name{_at(subject)}, device_map="auto")
{_generate(subject)}"""


def _auto_gptq(subject: Subject) -> str:
    return f"""from auto_gptq import AutoGPTQForCausalLM
from transformers import AutoTokenizer

name = "{subject.repository}"
tokenizer = AutoTokenizer.from_pretrained(name{_at(subject)})
model = AutoGPTQForCausalLM.from_quantized(name{_at(subject)}, device="cuda:0", use_safetensors=True)
{_generate(subject)}"""


def _autoawq(subject: Subject) -> str:
    return f"""from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

name = "{subject.repository}"
tokenizer = AutoTokenizer.from_pretrained(name{_at(subject)})
model = AutoAWQForCausalLM.from_quantized(name{_at(subject)}, fuse_layers=False)
{_generate(subject)}"""


def _gptqmodel(subject: Subject) -> str:
    return f"""from gptqmodel import GPTQModel

model = GPTQModel.load("{subject.repository}"{_at(subject)})
tokenizer = model.tokenizer
{_generate(subject)}"""


def _generate(subject: Subject) -> str:
    if subject.chat:
        made = f"""messages = [{{"role": "user", "content": "{_QUESTION}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
    else:
        made = f'inputs = tokenizer("{_QUESTION}", return_tensors="pt")'
    return f"""{made}
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def _mistral(repository: str, chat: bool) -> str:
    command = "mistral-chat model --instruct --max_tokens 256" if chat else "mistral-demo model"
    return f"hf download {repository} --local-dir model\npip install mistral-inference\n{command}"


def _at(subject: Subject) -> str:
    return f', revision="{subject.revision}"' if subject.revision else ""
