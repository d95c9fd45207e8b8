"""Perplexity of 16 windows of 512 tokens under a model of 8x7B's width, read from disk a layer at a time.

    scripts/make_checkpoint --preset 8x7b --layers 2 --layout torrent MODEL
    python scripts/bench/perplexity.py MODEL [--threads N] [--rounds N]

The peer is transformers with the whole model in memory (its loading is not timed), in the same dtype, with the same
threads, and windows in batches of 1 and of 4 (the better one counts). Each side runs in processes of its own, in turn;
the best round counts. Memory is the largest resident size of the process; the bound is two layers and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _bench import write_result

from mixtools.checking import perplexity
from mixtools.inference.budget import layer_bytes
from mixtools.inference.stream import Stream, peak_memory_bytes
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import Role, Slot

WINDOWS, CTX = 16, 512
ROOM = 2_000_000_000


def windows(vocab: int) -> perplexity.Windows:
    ids = torch.randint(vocab, (WINDOWS * CTX,), generator=torch.Generator().manual_seed(1)).tolist()
    return perplexity.cut(ids, "gptq", bos_id=1, ctx=CTX)


def ours(model: Path, rounds: int) -> dict[str, object]:
    seconds, cpu = [], []
    for _ in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        checkpoint = open_checkpoint(model)
        found = perplexity.measure(Stream(checkpoint), windows(checkpoint.config.vocab_size))
        checkpoint.finish()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    mean = float(found.nll.mean())
    return {"seconds": seconds, "cpu_seconds": cpu, "ln_perplexity": mean, "peak_memory_bytes": peak_memory_bytes()}


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
def theirs(model: Path, rounds: int) -> dict[str, object]:
    checkpoint = open_checkpoint(model)
    loaded = held_in_memory(checkpoint)
    sequences = torch.stack(windows(checkpoint.config.vocab_size).sequences)
    seconds: dict[int, list[float]] = {1: [], 4: []}
    cpu: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(rounds):
        for batch, spent in seconds.items():
            start, busy, total = time.perf_counter(), time.process_time(), 0.0
            for ids in sequences.split(batch):
                logits = loaded(ids, use_cache=False).logits[:, :-1].float()
                total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            spent.append(time.perf_counter() - start)
            cpu[batch].append(time.process_time() - busy)
    best = min(seconds, key=lambda batch: min(seconds[batch]))
    mean = total / (sequences.numel() - len(sequences))
    return {
        "seconds": seconds[best], "cpu_seconds": cpu[best], "batch": best, "ln_perplexity": mean,
        "peak_memory_bytes": peak_memory_bytes(),
    }  # fmt: skip


def in_process(side: str, options: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, __file__, str(options.model), "--threads", str(options.threads), "--side", side]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="a checkpoint of 8x7B's width and 2 layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2, help="of both sides, in turn; each runs twice")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options.model, 2)))
        return
    runs = [(in_process("ours", options), in_process("theirs", options)) for _ in range(options.rounds)]
    config = open_checkpoint(options.model).config
    best, cpu = (
        [min(second for run in runs for second in run[side][kind]) for side in (0, 1)]
        for kind in ("seconds", "cpu_seconds")
    )
    peak = max(run[0]["peak_memory_bytes"] for run in runs)
    bound = 2 * layer_bytes(config, 2) + ROOM
    result = {
        "threads": options.threads, "layers": config.num_layers, "tokens": WINDOWS * CTX,
        "ours_seconds": best[0], "transformers_seconds": best[1], "ratio": best[1] / best[0],
        "ours_cpu_seconds": cpu[0], "transformers_cpu_seconds": cpu[1],
        "peak_memory_bytes": peak, "bound_bytes": bound, "transformers_peak_bytes": runs[0][1]["peak_memory_bytes"],
        "ln_perplexity": [runs[0][side]["ln_perplexity"] for side in (0, 1)], "rounds": runs,
    }  # fmt: skip
    print(
        f"{WINDOWS}x{CTX} tokens, {config.num_layers} layers, {options.threads} threads   ours {best[0]:.1f} s, "
        f"{peak / 1e9:.2f} GB of {bound / 1e9:.2f}   transformers {best[1]:.1f} s, in memory   "
        f"{best[1] / best[0]:.2f}x   CPU {cpu[0]:.1f} s, {cpu[1]:.1f} s"
    )
    if peak > bound:
        raise SystemExit("more memory than two layers and 2 GB")
    print(write_result("perplexity", result))


if __name__ == "__main__":
    main()
