"""The main job on the embedded model: inspect, convert, check, generate; then one table. Run by scripts/demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "data" / "nano-mixtral"
OUTPUT = ROOT / "demo-output"
TEXT = ROOT / "tests" / "data" / "text.txt"
PROMPTS = ROOT / "tests" / "data" / "prompts.json"
PROMPT = "The installer asks for the name of"


def mixtools(*arguments: object) -> tuple[dict[str, Any], float]:
    """Run a command as a user would, shown; its JSON document and its seconds."""
    words = [str(argument) for argument in arguments]
    print("$ mixtools " + " ".join(f'"{word}"' if " " in word else word.replace(f"{ROOT}/", "") for word in words))
    began = time.monotonic()
    command = [sys.executable, "-m", "mixtools", *words, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout), time.monotonic() - began


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    hf = OUTPUT / "nano-hf"
    found, inspecting = mixtools("inspect", SOURCE, "--verify")
    done, converting = mixtools("convert", "torrent-to-hf", SOURCE, hf)
    text = ("--text", TEXT, "--ctx", 256, "--prompts", PROMPTS)
    proof, checking = mixtools("check", hf, "--against", SOURCE, *text, "--report", OUTPUT / "report")
    said, generating = mixtools("generate", hf, "--prompt", PROMPT, "--max-new-tokens", 24)
    config = found["config"]
    experts = f"{config['num_layers']} layers x {config['num_experts']} experts"
    same = f"{proof['generation']['identical']} of {proof['generation']['prompts']} continuations identical"
    perplexity = proof["perplexity"]
    ppl = f"perplexity {perplexity['source']:.4f} -> {perplexity['output']:.4f}"
    rows = [
        ("inspect", inspecting, f"{found['title']}, {found['parameters']:,} parameters, {experts}, every byte read"),
        ("convert", converting, f"{done['tensors']} tensors, {done['bytes'] / 1e6:.1f} MB -> {done['files'][0]}"),
        ("check", checking, f"{proof['verdict'].upper()}: {ppl}, KLD {proof['kld']['mean']:.1e}, {same}"),
        ("generate", generating, f"{PROMPT}{said['text']}".replace("\n", " ")),
    ]
    print()
    for name, seconds, what in rows:
        print(f"{name:<9} {seconds:5.1f} s  {what}")
    print(f"\nThe checkpoint is in {hf.relative_to(ROOT)}; open {OUTPUT.relative_to(ROOT)}/report/report.html")


if __name__ == "__main__":
    main()
