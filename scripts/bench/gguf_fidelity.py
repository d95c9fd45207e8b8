"""What each GGUF type loses, by `check`: perplexity, KL divergence and same top token against the source.

    python scripts/bench/gguf_fidelity.py MODEL... --text eval_en.txt --calibration calibration.txt [--max-tokens 10240]

Each model's own importance matrix is made of the calibration text, which should not hold the other. Small models, such
as tests/data/nano-mixtral, lose more than large ones by the same type; a model with outlier channels loses most.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _bench import write_result

import mixtools

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip


def measured(model: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """For each type the figures without and with an importance matrix."""
    imatrix = work / "imatrix.gguf"
    mixtools.imatrix(model, imatrix, text=args.calibration, ctx=512, overwrite=True)
    found: dict[str, Any] = {"F16": {}, "BF16": {}, **{name: {} for name in (*TYPES, "Q2_K_S")}}
    for how, matrix, types in (("plain", None, (*TYPES, "BF16", "F16")), ("imatrix", imatrix, (*TYPES[1:], "Q2_K_S"))):
        made = mixtools.quantize(model, work / how, type=list(types), name="m", imatrix=matrix)
        for row in made.rows:
            document = mixtools.check(
                made.output / row.file, model, text=args.text, ctx=args.ctx, max_tokens=args.max_tokens, new_tokens=0
            ).document
            found[row.type][how] = {
                "bits_per_weight": round(row.bits_per_weight, 3),
                "ln_ratio": round(document["perplexity"]["ln_ratio"], 6),
                "kld_mean": round(document["kld"]["mean"], 6), "same_top": round(document["same_top"], 4),
            }  # fmt: skip
            print(Path(model).parent.name, how, row.type, found[row.type][how], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=10240)
    args = parser.parse_args()
    results: dict[str, Any] = {"ctx": args.ctx, "max_tokens": args.max_tokens, "models": {}}
    for model in args.models:
        with tempfile.TemporaryDirectory() as work:
            results["models"][Path(model).parent.name] = measured(model, args, Path(work))
    print(write_result("gguf-fidelity", results))


if __name__ == "__main__":
    main()
