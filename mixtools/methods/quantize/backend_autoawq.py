"""The driver of autoawq: runs in that package's own environment (backends.py), as `python backend_autoawq.py JOB`.

JOB is a JSON file: source, out, group_size, zero_point, sequences (token ids). Standard output gets a line of JSON a
layer. Nothing of mixtools is there, and nothing in mixtools imports this.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")  # its farewell
    import torch

    # in an environment that has it, which is not the one that types are checked in
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
    from awq.quantize.quantizer import AwqQuantizer  # type: ignore[import-not-found]

    class Told(AwqQuantizer):  # type: ignore[misc]  # a base of no known type there
        """Tells of each layer once it is packed."""

        done = 0

        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            self.done += 1
            print(json.dumps({"layer": self.done, "layers": len(self.modules)}), flush=True)  # noqa: T201

    on = "auto" if torch.cuda.is_available() else "cpu"
    model = AutoAWQForCausalLM.from_pretrained(job["source"], device_map=on, safetensors=True, trust_remote_code=False)
    length = max(map(len, job["sequences"]))
    model.quantize(
        None,  # the text is cut into tokens already
        {"zero_point": job["zero_point"], "q_group_size": job["group_size"], "w_bit": 4, "version": "GEMM"},
        calib_data=job["sequences"],
        max_calib_samples=len(job["sequences"]),
        max_calib_seq_len=length,
        n_parallel_calib_samples=job.get("parallel"),
        quantizer_cls=Told,
    )
    model.save_quantized(job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
