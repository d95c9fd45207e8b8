"""How fast a GPU decodes, reads prompts, encodes, decomposes and calibrates, against limits measured in the same run.

    python scripts/bench/on_gpu.py PART [--small]

Each part prints one JSON document; scripts/gpu_check runs them all. Models are 8x7B's in shape, of random bits made on
the card. --small: shapes that an interpreter gets through on a CPU, to see that a part runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bench import ROOT
from gpu.random_planes import make
from torch import Tensor

from mixtools import rates
from mixtools.config import MixtralConfig
from mixtools.errors import MixtoolsError
from mixtools.inference.generate import prefill
from mixtools.inference.loading import PlanesMixtral
from mixtools.inference.model import Cache
from mixtools.inference.planes import PlanesHead, PlanesLayer
from mixtools.ops.gpu.planes import Planes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv": 8, "head": 128, "experts": 8, "vocab": 32000}
SMALL = {"layers": 1, "hidden": 256, "ffn": 32, "heads": 4, "kv": 2, "head": 64, "experts": 2, "vocab": 32}
DECODED = ("bf16", "int4 g128", "Q4_K", "int4 g128 asym", "Q8_0", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "nf4")
TARGETS = {"bf16": 0.70, "int4 g128": 0.55, "Q4_K": 0.55}
ENOUGH = {"decode": 90, "encode": 40}  # seconds from which on no other format is begun: to compile one takes some
SPARE = 8e9  # bytes of the card beside the weights


def config_of(sizes: dict[str, int]) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], intermediate_size=sizes["ffn"],
        num_layers=sizes["layers"], num_heads=sizes["heads"], num_kv_heads=sizes["kv"], head_dim=sizes["head"],
        num_experts=sizes["experts"], experts_per_token=2, rms_norm_eps=1e-5, rope_theta=1e6,
        max_position_embeddings=32768,
    )  # fmt: skip


def layer_of(config: MixtralConfig, kind: str) -> PlanesLayer:
    """One of random bits; down has rows that blocks fit into, whatever --small makes of them."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    small = f % 256 != 0
    made = PlanesLayer(
        config, 0, torch.bfloat16, qkv=[make(kind, width, d, DEVICE)], o=make(kind, d, heads, DEVICE, seed=1),
        gate_up=make(kind, f, d, DEVICE, matrices=2 * config.num_experts, seed=2),
        down=make("bf16" if small else kind, d, f, DEVICE, matrices=config.num_experts, seed=3),
    )  # fmt: skip
    made.attention_norm.fill_(1)
    made.ffn_norm.fill_(1)
    made.router.normal_(generator=torch.Generator(DEVICE).manual_seed(4)).mul_(0.02)
    return made


def again(layer: PlanesLayer, index: int) -> PlanesLayer:
    """The same bits in memory of their own."""

    def copy(one: Planes) -> Planes:
        return replace(one, parts=tuple(part.clone() for part in one.parts))

    made = PlanesLayer(layer.config, index, torch.bfloat16, qkv=[*map(copy, layer.qkv)], o=copy(layer.o),
                       gate_up=copy(layer.gate_up), down=copy(layer.down))  # fmt: skip
    for name in ("attention_norm", "ffn_norm", "router"):
        getattr(made, name).copy_(getattr(layer, name))
    return made


def model_of(config: MixtralConfig, kind: str) -> PlanesMixtral:
    """As many layers as the card holds."""
    first = layer_of(config, kind)
    size = sum(one.nbytes for one in (*first.qkv, first.o, first.gate_up, first.down))
    layers = config.num_layers
    if DEVICE.type == "cuda":
        layers = min(layers, int((torch.cuda.mem_get_info()[0] + size - SPARE) // size))
    config = replace(config, num_layers=layers)
    first.config = config
    table = torch.randn(config.vocab_size, config.hidden_size, device=DEVICE).to(torch.bfloat16)
    norm = torch.ones(config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    head = PlanesHead(config, norm, make("Q6_K" if kind.startswith("Q") else "bf16", config.vocab_size,
                                         config.hidden_size, DEVICE, seed=5))  # fmt: skip
    return PlanesMixtral(table, [first, *(again(first, index) for index in range(1, layers))], head)


def seconds_of(run: Callable[[], object], least: float = 1.0, rounds: int = 3) -> float:
    """Median over rounds of a run's seconds, each of as many as take so long, together."""

    def timed(count: int) -> float:
        _wait()
        began = time.perf_counter()
        for _ in range(count):
            run()
        _wait()
        return (time.perf_counter() - began) / count

    one = timed(1)
    count = max(1, int(least / max(timed(1), 1e-6)))
    return sorted(timed(count) for _ in range(rounds))[rounds // 2] if DEVICE.type == "cuda" else one


def tell(found: dict[str, Any]) -> None:
    """What there is so far: a part that takes too long loses nothing of it."""
    print(json.dumps(found), flush=True)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# --- the parts -------------------------------------------------------------------------------------------------------


def machine(small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    if DEVICE.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "multiprocessors": about.multi_processor_count, "memory_bytes": about.total_memory,
                  "capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda}  # fmt: skip
        import triton

        found["triton"] = triton.__version__
    return found


def limits(small: bool) -> dict[str, Any]:
    return {} if small else rates.measure(DEVICE)


def decode(small: bool, kinds: tuple[str, ...] = DECODED, batches: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    """Tokens a second by the graph, and what share that is of what a copy's bandwidth allows."""
    config = config_of(SMALL if small else SIZES)
    bandwidth = rates.measure(DEVICE)["copy_bytes_per_second"] if not small else 1e9
    found: dict[str, Any] = {"copy_bytes_per_second": bandwidth}
    began = time.perf_counter()
    for kind in kinds[:2] if small else kinds:
        if time.perf_counter() - began > ENOUGH["decode"]:
            found["left_out"] = [one for one in kinds if one not in found]
            break
        model = model_of(config, kind)
        found[kind] = {"layers": model.config.num_layers}
        for batch in batches[:1] if small else batches:
            found[kind][f"batch {batch}"] = _decoded(model, batch, bandwidth)
        if kind in TARGETS:
            found[kind]["target_share"] = TARGETS[kind]
        tell(found)
        del model
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _decoded(model: PlanesMixtral, batch: int, bandwidth: float) -> dict[str, float | None]:
    kept, length = Cache(model, batch, 1024 if DEVICE.type == "cuda" else 16), 8 // batch
    # eight tokens in all, whatever the batch: what is compiled for them is what a batch of 8 takes
    ids = torch.randint(model.config.vocab_size, (batch, length), device=DEVICE)
    model(ids, kept)
    token = ids[:, 0]

    def step() -> None:
        kept.used = length if kept.used == kept.capacity else kept.used
        model.step(token, kept)

    step()
    step()  # now it is a graph
    seconds = seconds_of(step, least=0.3)
    read = _bytes_a_token(model)
    return {
        "tokens_per_second": batch / seconds, "seconds_a_step": seconds, "weight_bytes_a_token": read,
        "share_of_copy": read / bandwidth / seconds if batch == 1 else None,
    }  # fmt: skip


def _bytes_a_token(model: PlanesMixtral) -> float:
    """Of weights that one token alone needs."""
    layer, head = model.layers[0], model.head
    assert isinstance(layer, PlanesLayer) and isinstance(head, PlanesHead)
    share = model.config.experts_per_token / model.config.num_experts
    each = sum(one.nbytes for one in (*layer.qkv, layer.o)) + share * (layer.gate_up.nbytes + layer.down.nbytes)
    return model.config.num_layers * each + head.planes.nbytes


def prompts(small: bool) -> dict[str, Any]:
    """16 x 2048 tokens through all layers and the head, against the rate of a bf16 product."""
    config, (texts, length) = (config_of(SMALL), (2, 40)) if small else (config_of(SIZES), (16, 2048))
    rate = 1e9 if small else rates.measure(DEVICE)["products_per_second"]["bfloat16"]
    found: dict[str, Any] = {"products_per_second": rate, "tokens": texts * length}
    for kind, target in (("bf16", 0.55), ("int4 g128", 0.45), ("Q4_K", 0.45)):
        model = model_of(config, kind)
        ids = torch.randint(config.vocab_size, (texts, length), device=DEVICE)

        run = partial(_through, model, ids)
        seconds = seconds_of(run, least=0.1)
        operations = 2 * texts * length * _operations(model.config)
        found[kind] = {
            "layers": model.config.num_layers, "seconds": seconds, "tokens_per_second": texts * length / seconds,
            "share_of_products": operations / rate / seconds, "target_share": target,
        }  # fmt: skip
        tell(found)
        del model, run
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _through(model: PlanesMixtral, ids: Tensor) -> None:
    """All tokens [B, T], 8192 in a pass."""
    at_once = max(1, 8192 // ids.shape[1])
    for start in range(0, len(ids), at_once):
        hidden = model.hidden(ids[start : start + at_once])
        for _, logits in model.head.chunks(hidden.flatten(0, 1), 2048):
            logits.logsumexp(-1)


def _operations(config: MixtralConfig) -> float:
    """Weights that a token is multiplied with; attention's own products are left out."""
    d, f = config.hidden_size, config.intermediate_size
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.num_layers * (heads * d + config.experts_per_token * 3 * f * d) + config.vocab_size * d


def encode(small: bool) -> dict[str, Any]:
    """Elements a second from bf16 on the card, the bytes held against the CPU's on some rows."""
    from mixtools.ops.encode import encode as on_cpu
    from mixtools.ops.gpu.encoding import encode as on_card
    from mixtools.storage.dtypes import DType

    rows, columns = (8, 256) if small else (8192, 14336)
    weight = (torch.randn(rows, columns, device=DEVICE) * 0.02).to(torch.bfloat16)
    found: dict[str, Any] = {"target_elements_per_second": {"Q4_K": 1e10}}
    began = time.perf_counter()
    for type in (
        (DType.Q4_K, DType.Q8_0)
        if small
        else (DType.Q4_K, DType.Q6_K, DType.Q8_0, DType.Q5_K, DType.Q4_0, DType.Q2_K, DType.Q3_K)
    ):
        if time.perf_counter() - began > ENOUGH["encode"]:
            found.setdefault("left_out", []).append(type.value)
            continue
        made = on_card(weight, type)
        some = weight[:8].cpu().view(torch.int16).numpy()
        try:
            same: bool | None = bool((made[:8].cpu().numpy() == on_cpu(some, DType.BF16, type)).all())
        except MixtoolsError:  # the CPU's kernels could not be built here
            same = None
        seconds = seconds_of(lambda type=type: on_card(weight, type), least=0.2)
        found[type.value] = {"elements_per_second": weight.numel() / seconds, "bytes_as_on_cpu": same}
        tell(found)
    return found


def spectra(small: bool) -> dict[str, Any]:
    """The singular values of a layer's expert matrices for LASER, taken together, and one rebuilt at a lower rank,
    against this machine's CPU, which takes one after the other."""
    from mixtools.linalg.gram import gram
    from mixtools.linalg.spectrum import decompose, decompose_batch, spectrum

    shape, count, rank = ((24, 64), 2, 5) if small else ((14336, 4096), 24, 1024)
    weights = [(torch.randn(shape, device=DEVICE) * 0.02).to(torch.bfloat16) for _ in range(count)]
    alone = weights[0].cpu()
    found: dict[str, Any] = {"cpu_threads": torch.get_num_threads(), "matrices_together": count, "target_ratio": 20}
    found["spectrum"] = {"seconds_a_matrix": seconds_of(lambda: decompose_batch(weights), least=0.1) / count}
    tell(found)
    found["spectrum"] |= {
        "seconds_by_itself": seconds_of(lambda: spectrum(weights[0]), least=0.1),
        "gram_seconds": seconds_of(lambda: gram(weights[0]), least=0.1),
    }
    some = decompose_batch(weights[:2])[1]
    found["rebuilt"] = {"rank": rank, "seconds_beside_spectrum": seconds_of(lambda: some.project(rank), least=0.1)}
    tell(found)
    began = time.perf_counter()
    values = spectrum(alone).values
    cpu = time.perf_counter() - began
    ours = decompose_batch(weights[:2])[0]
    found["spectrum"] |= {
        "cpu_seconds_a_matrix": cpu, "ratio": cpu / found["spectrum"]["seconds_a_matrix"],
        "farthest_from_cpu": float(abs(ours.values - values).max() / values[0]),
    }  # fmt: skip
    tell(found)
    began = time.perf_counter()
    theirs = decompose(alone).project(rank, torch.float64)
    cpu = time.perf_counter() - began
    whole = found["spectrum"]["seconds_a_matrix"] + found["rebuilt"]["seconds_beside_spectrum"]
    far = (ours.project(rank, torch.float64).cpu() - theirs).abs().max() / theirs.abs().max()
    found["rebuilt"] |= {"cpu_seconds_a_matrix": cpu, "ratio": cpu / whole, "farthest_from_cpu": float(far)}
    return found


def calibrated(small: bool) -> dict[str, Any]:
    """One full-width layer by `quantize`, 128 x 2048 tokens of random ids; before it a small one, for which the kernels
    are compiled."""
    import mixtools

    found: dict[str, Any] = {"target_seconds": 20}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _checkpoint(work / "small", {"hidden": 1024, "ffn": 1024, "heads": 8, "kv-heads": 2, "experts": 2})
        if not small:
            _checkpoint(work / "model", {})
        text = work / "text.txt"
        text.write_text((ROOT / "tests" / "data" / "text.txt").read_text("utf-8") * (1 if small else 200), "utf-8")
        methods: dict[str, dict[str, Any]] = {"gptq": {"method": "gptq"}}
        if not small:
            methods["Q4_K_M"] = {"type": ["Q4_K_M"]}
        for name, options in methods.items():
            found[name] = {}
            for model, samples, length in (("small", 2, 32), *([("model", 128, 2048)] if not small else [])):
                out, began = work / f"{name}-{model}", time.perf_counter()
                mixtools.quantize(work / model, out, calibration=str(text), samples=samples, seq_len=length,
                                  device=DEVICE.type, **options)  # fmt: skip
                found[name][model] = {"seconds": time.perf_counter() - began}
                for report in out.glob("*quantize-report.json"):
                    found[name][model]["stages"] = json.loads(report.read_text("utf-8"))["seconds"]
                tell(found)
    return found


def _checkpoint(to: Path, sizes: dict[str, int]) -> None:
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    tokenizer = ROOT / "tests" / "data" / "nano-mixtral" / "tokenizer.model"
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_checkpoint", to, "--preset", "8x7b", "--layers", "1", "--vocab",
         "2048", "--layout", "hf", "--quiet", "--tokenizer", tokenizer, *words],
        check=True, stdout=subprocess.DEVNULL,  # where the figures go
    )  # fmt: skip


def generation(small: bool) -> dict[str, Any]:
    """Time to the first token of a prompt of 512 tokens, packed and not."""
    config = config_of(SMALL if small else SIZES)
    found: dict[str, Any] = {}
    for kind in ("int4 g128", "Q4_K"):
        model = model_of(config, kind)
        prompt = torch.randint(config.vocab_size, (40 if small else 512,)).tolist()
        found[kind] = {"seconds": seconds_of(partial(prefill, model, [prompt], 8), least=0.2)}
        tell(found)
        del model
    return found


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "machine": machine, "limits": limits, "decode": decode, "prompts": prompts, "generation": generation,
    "encode": encode, "spectra": spectra, "calibrated": calibrated,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tell(PARTS[args.part](args.small))


if __name__ == "__main__":
    main()
