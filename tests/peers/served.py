"""A folder in vLLM, in a process of its own: python -m peers.served FOLDER TEXTS.json OUT.json

What comes of it: for each token of a text but the first, the likeliest one there and the token's own log-probability.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


class RefusedError(Exception):
    """What vLLM said."""


class Served(NamedTuple):
    """By text, and token from the second on."""

    top: list[list[int]]
    logprobs: list[list[float]]


def served(folder: Path, texts: Sequence[Sequence[int]], work: Path) -> Served:
    """Raises RefusedError for a folder that it does not load."""
    asked, found = work / "texts.json", work / "served.json"
    asked.write_text(json.dumps([list(text) for text in texts]))
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "peers.served", str(folder), str(asked), str(found)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=work)
    if ran.returncode:
        raise RefusedError(ran.stdout + ran.stderr)
    return Served(**json.loads(found.read_text()))


def main(folder: str, asked: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    texts = json.loads(Path(asked).read_text())
    longest = max(map(len, texts))
    model = LLM(
        model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=longest + 8, max_num_seqs=1, seed=0,
        skip_tokenizer_init=True, logprobs_mode="raw_logprobs",
    )  # fmt: skip
    how = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    told = model.generate([{"prompt_token_ids": text} for text in texts], how)
    found = Served([], [])
    for text, one in zip(texts, told, strict=True):
        rest = list(zip(text[1:], one.prompt_logprobs[1:], strict=True))
        found.top.append([next(id for id, log in by_id.items() if log.rank == 1) for _, by_id in rest])
        found.logprobs.append([by_id[id].logprob for id, by_id in rest])
    Path(out).write_text(json.dumps(found._asdict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
