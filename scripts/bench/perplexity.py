"""Perplexity of 16 windows of 512 tokens under a model of 8x7B's width, read from disk a layer at a time.

    scripts/make_checkpoint --preset 8x7b --layers 4 --layout torrent MODEL
    python scripts/bench/perplexity.py MODEL [--threads N] [--rounds N]

The peer is transformers with the whole model in memory (its loading is not timed), in the same dtype, with the same
threads, and windows in batches of 1 and of 4 (the better one counts). Each side runs in processes of its own, in turn;
the best run counts. Memory is the largest resident size of the process; the bound is two layers and 2 GB.

Rates are compared, in tokens a second. On a machine without 16-bit instructions the peer takes 45 minutes a run on one
thread: --peer-windows 1 gives it the first window only (it reads nothing, so its rate is the same), and --sides
measures one side, beside what the results hold of the other. results/perplexity-L-layers-N-threads.json tells when,
where, how often and on which commit each side was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _bench import RESULTS, machine, write_result

from mixtools.checking import perplexity
from mixtools.inference import products
from mixtools.inference.budget import layer_bytes
from mixtools.inference.stream import Stream
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.machine import peak_memory
from mixtools.names import Role, Slot

WINDOWS, CTX = 16, 512
ROOM = 2_000_000_000


def windows(vocab: int, count: int) -> perplexity.Windows:
    """The first `count` of the 16."""
    ids = torch.randint(vocab, (WINDOWS * CTX,), generator=torch.Generator().manual_seed(1)).tolist()
    return perplexity.cut(ids, "gptq", bos_id=1, ctx=CTX, max_tokens=count * CTX)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Reading included, from opening to the last checksum."""
    seconds, cpu = [], []
    for _ in range(options.runs):
        start, busy = time.perf_counter(), time.process_time()
        checkpoint = open_checkpoint(options.model)
        found = perplexity.measure(Stream(checkpoint), windows(checkpoint.config.vocab_size, options.windows))
        checkpoint.finish()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    way = "native" if products.native(torch.bfloat16) else "widened"
    return {"products": f"bf16, {way}", "seconds": seconds, "cpu_seconds": cpu, "nll_by_window": found.by_window()}


def held_in_memory(reader: Checkpoint) -> torch.nn.Module:
    """transformers' Mixtral in bf16, filled tensor by tensor."""
    import transformers

    config = transformers.MixtralConfig(**reader.config.to_hf("bfloat16"))
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    names = {
        Role.EMBED: "model.embed_tokens.weight", Role.NORM: "model.norm.weight", Role.HEAD: "lm_head.weight",
        Role.ATTENTION_NORM: "input_layernorm.weight", Role.FFN_NORM: "post_attention_layernorm.weight",
        Role.Q: "self_attn.q_proj.weight", Role.K: "self_attn.k_proj.weight", Role.V: "self_attn.v_proj.weight",
        Role.O: "self_attn.o_proj.weight", Role.ROUTER: "mlp.gate.weight", Role.DOWN: "mlp.experts.down_proj",
    }  # fmt: skip
    state = {
        ("" if slot.layer is None else f"model.layers.{slot.layer}.") + names[slot.role]: reader.read(slot)
        for slot in reader.slots()
        if slot.expert is None
    }
    experts = range(reader.config.num_experts)
    for layer in range(reader.config.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        both = [torch.cat([reader.read(Slot(role, layer, e)) for role in (Role.GATE, Role.UP)]) for e in experts]
        state[prefix + "gate_up_proj"] = torch.stack(both)
        del both
        state[prefix + "down_proj"] = torch.stack([reader.read(Slot(Role.DOWN, layer, e)) for e in experts])
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no weight and stays fp32
    return model.eval()


@torch.no_grad()
def theirs(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = open_checkpoint(options.model)
    loaded = held_in_memory(checkpoint)
    sequences = torch.stack(windows(checkpoint.config.vocab_size, options.peer_windows).sequences)
    batches = [batch for batch in (1, 4) if batch <= len(sequences)]
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    cpu: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(options.runs):
        for batch in batches:
            start, busy, nll = time.perf_counter(), time.process_time(), []
            for ids in sequences.split(batch):
                logits = loaded(ids, use_cache=False).logits[:, :-1].float()
                each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                nll += each.view(len(ids), -1).double().mean(1).tolist()
            seconds[batch].append(time.perf_counter() - start)
            cpu[batch].append(time.process_time() - busy)
    best = min(seconds, key=lambda batch: min(seconds[batch]))
    return {"batch": best, "seconds": seconds[best], "cpu_seconds": cpu[best], "nll_by_window": nll}


SIDES = {"ours": ours, "transformers": theirs}


def in_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side's runs, in a process of its own."""
    given = ("threads", "windows", "peer_windows", "runs")
    command = [sys.executable, __file__, str(options.model), "--inside", side]
    command += [part for name in given for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What counts of a side's rounds, where and when, and the rounds themselves."""
    best = min(second for found in rounds for second in found["seconds"])
    return {
        "tokens": tokens, "seconds": best, "tokens_per_second": tokens / best,
        "cpu_seconds": min(second for found in rounds for second in found["cpu_seconds"]),
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in rounds),
        "machine": machine(), "rounds": rounds,
    }  # fmt: skip


def earlier(name: str, sides: list[str]) -> dict[str, Any]:
    """The sides that are not measured now, from the results, if this machine measured them."""
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}
    found = {side: held[side] for side in SIDES if side in held and side not in sides}
    here = machine()
    return {side: one for side, one in found.items() if one["machine"]["cpu"] == here["cpu"]}


def tell(results: dict[str, Any]) -> None:
    for side in SIDES:
        if found := results.get(side):
            print(
                f"{side:13} {found['tokens']} tokens in {found['seconds']:.1f} s, {found['tokens_per_second']:.1f} a "
                f"second, CPU {found['cpu_seconds']:.1f} s, {found['peak_memory_bytes'] / 1e9:.2f} GB, ln perplexity "
                f"of the first window {found['rounds'][0]['nll_by_window'][0]:.5f}"
            )
    if "ratio" in results:
        print(f"ratio {results['ratio']:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="a checkpoint of 8x7B's width")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {CTX} tokens, at most {WINDOWS}")
    parser.add_argument("--peer-windows", type=int, help="how many of them the peer gets (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="of each side, in turn, each a process of its own")
    parser.add_argument("--runs", type=int, default=2, help="of each process")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="what to measure now")
    parser.add_argument("--inside", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.peer_windows = options.peer_windows or options.windows
    torch.set_num_threads(options.threads)
    return options


def main() -> None:
    options = parse()
    if options.inside:
        found = SIDES[options.inside](options)
        print(json.dumps({**found, "peak_memory_bytes": peak_memory()}))
        return
    config = open_checkpoint(options.model).config
    name = f"perplexity-{config.num_layers}-layers-{options.threads}-thread{'s'[: options.threads - 1]}"
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side, found in rounds.items():
            found.append(in_process(side, options))
    tokens = {"ours": options.windows * CTX, "transformers": options.peer_windows * CTX}
    sides = {side: measured(found, tokens[side]) for side, found in rounds.items()}
    bound = 2 * layer_bytes(config, 2) + ROOM
    results = {"threads": options.threads, "layers": config.num_layers, "bound_bytes": bound}
    results |= earlier(name, options.sides) | sides
    if all(side in results for side in SIDES):
        results["ratio"] = results["ours"]["tokens_per_second"] / results["transformers"]["tokens_per_second"]
    tell(results)
    print(write_result(name, results))
    if "ours" in sides and sides["ours"]["peak_memory_bytes"] > bound:
        raise SystemExit("more memory than two layers and 2 GB")


if __name__ == "__main__":
    main()
