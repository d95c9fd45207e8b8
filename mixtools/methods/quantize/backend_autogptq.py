"""The driver of auto-gptq: runs in that package's own environment (backends.py), as `python backend_autogptq.py JOB`.

JOB is a JSON file: source, out, bits, group_size, sym, damp_percent, desc_act, static_groups, sequences (token ids).
Standard output gets a line of JSON a layer. Nothing of mixtools is there, and nothing in mixtools imports this.

auto-gptq 0.7.1 asks for a graphics card where it needs none: its own loader refuses to start without one, and it waits
for the card after each matrix. Without one the model is built around the loader and the waiting is left out.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any


class Layers(logging.Handler):
    """Tells of each layer that auto-gptq's own log says it has begun."""

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.fullmatch(r"Start quantizing layer (\d+)/(\d+)", record.getMessage()):
            print(json.dumps({"layer": int(found[1]) - 1, "layers": int(found[2])}), flush=True)  # noqa: T201 (its parent reads it)


def main(job: dict[str, Any]) -> None:
    import torch

    # in an environment that has it, which is not the one that types are checked in
    from auto_gptq import BaseQuantizeConfig  # type: ignore[import-not-found]
    from auto_gptq.modeling import _base, _utils  # type: ignore[import-not-found]
    from auto_gptq.modeling.mixtral import MixtralGPTQForCausalLM  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        _base.CUDA_0 = _utils.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda device=None: None
    logging.getLogger("auto_gptq.modeling._base").addHandler(Layers())
    keys = ("bits", "group_size", "sym", "damp_percent", "desc_act", "static_groups")
    config = BaseQuantizeConfig(**{key: job[key] for key in keys}, model_file_base_name="model")
    plain: Any = AutoModelForCausalLM.from_pretrained(job["source"], torch_dtype=torch.float16, low_cpu_mem_usage=True)
    model = MixtralGPTQForCausalLM(plain.eval(), False, config)
    model.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["sequences"]],
        cache_examples_on_gpu=torch.cuda.is_available(),
    )
    model.save_quantized(job["out"], use_safetensors=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
