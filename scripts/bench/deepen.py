"""A GGUF of one layer with that layer many times over: a file as large as a whole 8x7B's without the room that its
source would take.

    python scripts/bench/deepen.py ONE_LAYER.gguf OUT.gguf [--layers 32]

The numbers of what it computes mean nothing; its bytes, types and shapes are those of a model of so many layers.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import gguf

LAYER = re.compile(r"blk\.0\.")


def deepen(source: Path, out: Path, layers: int) -> None:
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], inner)
    copies = [
        (LAYER.sub(f"blk.{index}.", one.name), one)
        for one in reader.tensors
        for index in range(layers if LAYER.match(one.name) else 1)
    ]
    for name, one in copies:
        writer.add_tensor_info(name, one.data.shape, one.data.dtype, one.data.nbytes, one.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, one in copies:
        writer.write_tensor_data(one.data)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="ONE_LAYER.gguf")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    deepen(options.source, options.out, options.layers)


if __name__ == "__main__":
    main()
