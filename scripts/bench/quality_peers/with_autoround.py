"""AutoRound: signed gradient descent on rounding and clipping, from a module that is loaded already."""

from __future__ import annotations

from collections.abc import Mapping

import dense
import torch
from auto_round import AutoRound
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {
    f"{grid}-{steps}": (grid == "sym", steps) for grid in ("sym", "asym") for steps in (200, 1000)
}  # of the grid and the steps of a layer


def quantized(asked: dense.Asked) -> Mapping[str, Tensor]:
    symmetric, steps = SCHEMES[asked.method]
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    rounder = AutoRound(
        model, AutoTokenizer.from_pretrained(asked.model), bits=dense.BITS, group_size=dense.GROUP, sym=symmetric,
        iters=steps, nsamples=len(asked.ids), seqlen=asked.ids.shape[1], dataset=list(asked.ids.split(1)),
        device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    model, _ = rounder.quantize()
    return dict(model.named_parameters())


if __name__ == "__main__":
    dense.run(dict.fromkeys(SCHEMES, quantized), "auto-round")
