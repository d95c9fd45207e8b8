"""How fast llama.cpp continues a prompt: `time_llama.py MODEL.gguf IDS TOKENS THREADS`. Writes a JSON object."""

from __future__ import annotations

import json
import resource
import sys
import time

import llama_cpp


def main(file: str, prompt: str, tokens: str, threads: str) -> None:
    ids, count = json.loads(prompt), int(tokens)
    model = llama_cpp.Llama(
        file, n_ctx=len(ids) + count + 8, n_threads=int(threads), n_threads_batch=int(threads), n_batch=512,
        verbose=False,
    )  # fmt: skip
    model.eval([1])  # the weights are read once before the time begins
    model.reset()
    began = time.perf_counter()
    model.eval(ids)
    token = model.sample(temp=0)
    first = time.perf_counter()
    for _ in range(count - 1):
        model.eval([token])
        token = model.sample(temp=0)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {"prompt_seconds": first - began, "tokens_per_second": (count - 1) / (done - first), "peak_bytes": peak}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
