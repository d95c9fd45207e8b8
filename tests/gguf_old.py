"""GGUF models as other programs wrote them, put together with the gguf package: in the layout of 2023, and in today's.

In 2023 (convert.py of llama.cpp, its commit 799a1cb): a tensor for each expert, the router in F16, no vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from layouts import make
from quantizing import Arrays, encoded

Types = Callable[[str], str]


def of_2023(values: Arrays) -> Arrays:
    """The same model's tensors under the old names."""
    found: Arrays = {}
    for name, array in values.items():
        if "_exps" in name:
            found |= {name.replace("_exps", f".{number}"): part for number, part in enumerate(array)}
        else:
            found[name] = array
    return found


def all_of(kind: str, router: str = "F16") -> Types:
    """Norms in F32, the router as it was then."""
    return lambda name: "F32" if "norm" in name else router if "gate_inp" in name else kind


def keys(dims: make.Dims, **changes: Any) -> dict[str, Any]:
    """What a file says of its model; a change of None leaves a key out, by its last words with _ for dots."""
    told = {
        "general.architecture": "llama", "general.name": "theirs", "llama.context_length": 32768,
        "llama.embedding_length": dims.d, "llama.block_count": dims.layers, "llama.feed_forward_length": dims.f,
        "llama.rope.dimension_count": dims.hd, "llama.attention.head_count": dims.heads,
        "llama.attention.head_count_kv": dims.kv, "llama.expert_count": dims.experts, "llama.expert_used_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e6, "general.file_type": 1,
        "general.quantization_version": 2, **changes,
    }  # fmt: skip
    return {key: value for key, value in told.items() if value is not None}


def write(
    file: Path, values: Arrays, types: Types, told: Mapping[str, Any], *, split: int = 0, shapes: bool = True
) -> Path:
    """A file of these tensors; `split`: the largest size of a part, of which the first is returned."""
    writer = gguf.GGUFWriter(file, "llama", split_max_size=split)
    writer.kv_data[0].clear()  # of the architecture that it puts first
    for key, value in told.items():
        add: dict[type, Callable[[str, Any], None]] = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
            list: writer.add_array, np.float64: writer.add_float64, np.uint64: writer.add_uint64,
        }  # fmt: skip
        add[type(value)](key, value)
    for name, array in values.items():
        kind = gguf.GGMLQuantizationType[types(name)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(encoded(array, kind.name), np.uint8)
        writer.add_tensor(name, raw.reshape(*array.shape[:-1], array.shape[-1] // block * size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(file.parent.glob(f"{file.stem}-00001-of-*.gguf"))[0] if split else file


def canonical(arrays: Arrays, dims: make.Dims) -> Arrays:
    """Under Hugging Face's names and in its order of rows, from today's names or the old ones."""
    words = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "block_sparse_moe.gate",
    }  # fmt: skip
    tops = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    experts = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
    found: Arrays = {}
    for name, array in arrays.items():
        _, *middle = name.removesuffix(".weight").split(".")
        if not middle:
            found[f"{tops[name.removesuffix('.weight')]}.weight"] = array
            continue
        at = f"model.layers.{middle[0]}."
        if middle[1] in words:
            heads = {"attn_q": dims.heads, "attn_k": dims.kv}.get(middle[1])
            pairs = array if heads is None else array.reshape(heads, dims.hd // 2, 2, -1).swapaxes(1, 2)
            found[f"{at}{words[middle[1]]}.weight"] = pairs.reshape(array.shape)
            continue
        word = experts[middle[1].removesuffix("_exps")]
        parts = {int(middle[2]): array} if len(middle) > 2 else dict(enumerate(array))
        for number, part in parts.items():
            found[f"{at}block_sparse_moe.experts.{number}.{word}.weight"] = part
    return found


def dequantized(*files: Path) -> Arrays:
    """The values of a file's tensors, in fp32, by the gguf package."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(size) for size in tensor.shape[::-1])
        )
        for file in files
        for tensor in gguf.GGUFReader(file).tensors
    }
