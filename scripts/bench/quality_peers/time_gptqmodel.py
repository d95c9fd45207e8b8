"""How long GPTQModel takes over the layers of a model: `time_gptqmodel.py MODEL IDS.npy`. Writes a JSON object."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import numpy as np
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start

from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig


def main(folder: str, file: str) -> None:
    model = GPTQModel.load(folder, GPTQConfig(bits=4, group_size=128), dtype=torch.bfloat16, device="cpu")
    rows = [torch.from_numpy(row)[None] for row in np.load(file)]
    began = time.perf_counter()
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1)
    told = {"seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write("\n" + json.dumps({**told, "peak_bytes": peak}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
