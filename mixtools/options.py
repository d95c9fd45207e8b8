"""The options that several verbs share, spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .verbs import Option

if TYPE_CHECKING:
    from .layouts.checkpoint import Checkpoint
else:
    Checkpoint = Path  # not imported for the command line, where a model is a text

_WHERE = "Folder, weight file in it, or org/name[/FILE.gguf][@revision]."
Model = Annotated[str | Path | Checkpoint, Option("MODEL", _WHERE, argument=True)]
Source = Annotated[str | Path | Checkpoint, Option("SRC", _WHERE, argument=True, key="src")]
Out = Annotated[str | Path, Option("OUT", "Folder to write; it must be new or empty.", argument=True)]

DryRun = Annotated[bool, Option("", "Tell sizes, memory, time and disk; write nothing.", machine=True)]
Resume = Annotated[
    bool, Option("", "Continue an interrupted run found in OUT.", machine=True, flags=("--resume/--no-resume",))
]
Overwrite = Annotated[bool, Option("", "Replace the checkpoint in OUT once the new one is whole.", machine=True)]
Jobs = Annotated[int, Option("", "Threads that read, transform and write.", low=1, high=64, machine=True)]
MaxMemory = Annotated[str | int | None, Option("SIZE", "Stay below this, e.g. 16GB.", machine=True)]
Device = Annotated[str, Option("auto|cpu|cuda[:N]|mps", "Where to compute.", machine=True)]
Requantize = Annotated[bool, Option("", "Take a source that is quantized already.")]
ShardSize = Annotated[str | int, Option("SIZE", "Largest shard, e.g. 5GB.")]
ComputeDtype = Annotated[str, Option("auto|bf16|f16|f32", "To compute in; auto: as stored.")]

Protocol = Annotated[str, Option("gptq|llamacpp|hf", "How the text is cut and counted.")]
Ctx = Annotated[int | None, Option("N", "Tokens a window: 2048; for llamacpp 512.")]
Stride = Annotated[int | None, Option("N", "Of the protocol hf: ctx/2.")]
ExpertsPerToken = Annotated[int | None, Option("N", "Through which each token goes; default: the model's own.", low=1)]
ParseSpecial = Annotated[bool, Option("", "Special tokens in the text are meant, such as <|im_start|>.")]
MaxTokens = Annotated[int | None, Option("N", "Take the text's first N tokens.", low=2)]
