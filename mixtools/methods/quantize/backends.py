"""Back ends: the original packages of GPTQ and AWQ, as peers of our own, each in an environment of its own.

    make_backend ─► ~/.cache/mixtools/backends/NAME: torch, the package, the versions of its time
    run_backend  ─► the source as a folder of Hugging Face's ─► backend_NAME.py in that environment ─► OUT

Neither package is maintained, and neither can share an environment with today's torch and transformers; they hold the
whole model in memory. What they write is their own format, byte for byte, under names that every reader here knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import HubError, LayoutError, MemoryBudgetError, MixtoolsError, OutputExists, UsageError
from ...layouts.checkpoint import Checkpoint
from ...machine import available_memory, human_bytes
from ...progress import Progress, Silent

VARIABLE = "MIXTOOLS_BACKENDS"  # a folder for the environments, instead of the user's cache
TORCH = "torch==2.13.0"
PYTHONS = ((3, 10), (3, 11))  # which the pinned versions were built for


@dataclass(frozen=True)
class Backend:
    """`method`: of mixtools quantize; `pins`: what pip installs, and `alone` without dependencies, after torch.

    `experts`: how many it knows of; `groups`: whether it takes a whole row for a group; `symmetric`: the grids it has.
    """

    name: str
    method: str
    driver: str
    pins: tuple[str, ...]
    alone: tuple[str, ...]
    bits: tuple[int, ...]
    symmetric: tuple[bool, ...]
    whole_rows: bool
    experts: int | None = None


BACKENDS = {
    found.name: found
    for found in (
        Backend(
            "auto-gptq", "gptq", "backend_autogptq.py",
            ("auto-gptq==0.7.1", "transformers==4.40.2", "tokenizers==0.19.1", "accelerate==0.30.1", "peft==0.10.0",
             "datasets==2.19.1", "huggingface_hub==0.36.2", "pyarrow==16.1.0", "pandas==2.2.3", "fsspec==2024.3.1",
             "numpy==1.26.4", "setuptools==80.9.0", "safetensors==0.8.0"),
            (), (2, 3, 4, 8), (True, False), True, experts=8,
        ),
        Backend(
            "autoawq", "awq", "backend_autoawq.py",
            ("transformers==4.51.3", "tokenizers==0.21.4", "accelerate==1.6.0", "datasets==3.5.0",
             "huggingface_hub==0.36.2", "triton==3.9.0", "zstandard==0.25.0", "safetensors==0.8.0",
             "setuptools==80.9.0", "wheel==0.45.1"),
            ("autoawq==0.2.9",), (4,), (False,), False,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a back end is to do. `damping`: GPTQ's, a share of the Hessian's mean diagonal."""

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    damping: float = 0.01


@dataclass(frozen=True)
class Ran:
    """An output of a back end: its files, without the manifest, and what was said of it."""

    output: Path
    files: tuple[str, ...]
    bytes: int
    log: tuple[str, ...]


# --- the environment ---


def find(name: str) -> Backend:
    """Raises UsageError for one that there is not."""
    if name not in BACKENDS:
        raise UsageError(f"--backend {name}: there is native, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def place(name: str) -> Path:
    """Where the environment of a back end is, or would be. Raises UsageError as `find`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get(VARIABLE)
    return (Path(named) if named else cache / "mixtools" / "backends") / find(name).name


def is_made(name: str) -> bool:
    """Whether its environment is there, whole, and of the versions that this mixtools pins."""
    kept = place(name) / "made"
    return kept.is_file() and kept.read_text("utf-8") == stamp(find(name))


def make_backend(name: str, progress: Progress | None = None) -> Path:
    """Its environment, made where it is not; anew where the pins have changed.

    Raises UsageError where no Python of PYTHONS is found, HubError in pip's own words for what cannot be installed.
    """
    backend, folder, progress = find(name), place(name), progress or Silent()
    if is_made(name):
        return folder
    python = _python()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "pip.log"
    # torch by itself first: its version alone decides which of its builds comes along, and what is built needs it
    steps = [["venv"], [TORCH], list(backend.pins)]
    steps += [["--no-deps", "--no-build-isolation", *backend.alone]] if backend.alone else []
    progress.start(f"making {folder}", len(steps), "step")
    for step in steps:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        command = [python, "-m", "venv", str(folder)] if step == ["venv"] else [*pip, *step]
        with log.open("a", encoding="utf-8") as said:
            status = subprocess.run(command, stdout=said, stderr=said, check=False, env=_clean()).returncode
        if status:
            raise HubError(f"could not be installed: {_reason(log, status)} (all of it: {log})", file=folder)
        progress.advance(1)
    progress.finish()
    (folder / "made").write_text(stamp(backend), "utf-8")
    return folder


def stamp(backend: Backend) -> str:
    """Of its pins; it lies in an environment that was made to the end."""
    return hashlib.sha256(json.dumps([TORCH, backend.pins, backend.alone]).encode()).hexdigest()


def _python() -> str:
    """An interpreter of PYTHONS: this one, or one that the user's PATH has."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    names = [f"python{major}.{minor}" for major, minor in reversed(PYTHONS)]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise UsageError(f"the back ends' versions are of Python 3.10 and 3.11; put {names[0]} into the PATH")
    return found


def _clean() -> dict[str, str]:
    """The user's environment without what would bring other packages in, or ask the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _reason(log: Path, status: int) -> str:
    """The first line that calls itself an error, else the last: a traceback ends in what went wrong."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith(("ERROR:", "error:"))]
    return next(iter(wrong or lines[-1:]), f"exit status {status}")


# --- a run ---


def expect_fit(name: str, asked: Asked, source: Checkpoint) -> None:
    """Raises UsageError or LayoutError for what the package cannot do, MemoryBudgetError for too little memory."""
    backend, config = find(name), source.config
    if asked.bits not in backend.bits:
        raise UsageError(f"{name} has {' or '.join(map(str, backend.bits))} bits", expected="those", found=asked.bits)
    if asked.symmetric not in backend.symmetric:
        raise UsageError(f"{name} has no {'symmetric' if asked.symmetric else 'asymmetric'} grid")
    if asked.group <= 0 and not (asked.group == -1 and backend.whole_rows):
        raise UsageError(f"{name} has no groups of {asked.group}")
    if backend.experts is not None and config.num_experts > backend.experts:
        # its list of modules ends there, and the other experts would silently stay as they are
        raise LayoutError(f"{name} knows of {backend.experts} experts; this model has {config.num_experts}")
    if source.quantization is not None:
        raise LayoutError(f"is quantized ({source.quantization}); {name} starts from weights", file=source.place)
    need, there = 2 * config.num_parameters, available_memory()
    if there is not None and need > there:
        why = f"{name} holds the whole model in memory"
        raise MemoryBudgetError(why, expected=human_bytes(need), found=human_bytes(there))


def expect_made(name: str) -> None:
    """Raises UsageError, with the way to make it, where the environment is not there."""
    if not is_made(name):
        raise UsageError(
            f"the environment of {name} is not there; make it, once, with: "
            f"mixtools quantize SRC OUT --method {find(name).method} --backend {name} --make-backend"
        )


def run_backend(
    name: str, source: Checkpoint, out: Path, asked: Asked, sequences: Sequence[Sequence[int]], *,
    progress: Progress | None = None,
) -> Ran:  # fmt: skip
    """Quantize with the package itself: `sequences` are the ids of each calibration window, BOS first.

    OUT is made, or is there and empty. Raises what `expect_fit` raises, OutputExists, and MixtoolsError with the
    package's last words where it fails; its log is then kept beside OUT.
    """
    progress = progress or Silent()
    expect_fit(name, asked, source)
    expect_made(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExists("is there already; a back end writes into a new folder", file=out)
    work = out.parent / f".{out.name}.{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    made, log = work / "made", work / "log.txt"
    job = _job(find(name), _as_hf(source, work / "source", progress), made, asked, sequences)
    (work / "job.json").write_text(json.dumps(job), "utf-8")
    _drive(name, work / "job.json", log, progress)
    files = _finish(find(name), source, made, asked)
    if out.exists():
        out.rmdir()
    made.rename(out)
    said = tuple(log.read_text("utf-8", "replace").splitlines())
    shutil.rmtree(work)
    return Ran(out, files, sum((out / file).stat().st_size for file in files), said)


def _job(backend: Backend, source: Path, out: Path, asked: Asked, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the driver reads."""
    shared = {
        "source": str(source.absolute()), "out": str(out.absolute()), "group_size": asked.group,
        "sequences": [[int(id) for id in ids] for ids in sequences],
    }  # fmt: skip
    if backend.method == "awq":
        return {**shared, "zero_point": not asked.symmetric}
    more = {"bits": asked.bits, "sym": asked.symmetric, "damp_percent": asked.damping}
    return {**shared, **more, "desc_act": False, "static_groups": False}


def _as_hf(source: Checkpoint, into: Path, progress: Progress) -> Path:
    """The source as transformers 4 reads it: where it is something else, converted beside the output."""
    from ...conversion import Options, plan_hf
    from ...job import Run, run
    from ...layouts.hf import HF

    if source.layout == HF and "rope_theta" in source.document:  # transformers 5 writes it in a place of its own
        return source.folder
    run(plan_hf(source, Options()), into, Run(progress=progress))
    return into


def _drive(name: str, job: Path, log: Path, progress: Progress) -> None:
    python, driver = place(name) / "bin" / "python", Path(__file__).with_name(find(name).driver)
    # -I: the modules that lie beside the driver are ours, and would be found first
    command = [str(python), "-I", str(driver), str(job)]
    with (
        log.open("w", encoding="utf-8") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=_clean()) as process,
    ):
        assert process.stdout is not None
        try:
            begun = done = 0
            for line in process.stdout:
                if (told := _told(line)) is None:
                    said.write(line)
                    said.flush()
                    continue
                if not begun:
                    begun = told["layers"]
                    progress.start(f"{name}: quantizing", begun, "layer")
                progress.advance(told["layer"] - done)
                done = told["layer"]
        except BaseException:
            process.kill()
            raise
        status = process.wait()
    if status:
        raise MixtoolsError(f"{name} failed: {_reason(log, status)} (all it said: {log})")
    progress.advance(begun - done)
    progress.finish()


def _told(line: str) -> dict[str, int] | None:
    """Of a driver's line on a layer; None for what the package prints."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"layer", "layers"} <= found.keys() else None


def _finish(backend: Backend, source: Checkpoint, made: Path, asked: Asked) -> tuple[str, ...]:
    """The tokenizer and the source's other documents beside what the package wrote, and the manifest; names of files.

    Raises the errors of reading what it wrote.
    """
    from ...conversion import inputs_of
    from ...documents import for_hf
    from ...layouts.detect import open_checkpoint
    from ...storage import manifest
    from ...storage.output import Document
    from ...version import __version__

    config = json.loads((made / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)  # a folder of this machine
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    copied: Mapping[str, Document] = for_hf(source, None, "float16", ()).documents
    for name, document in copied.items():  # before the package's own: autoawq's generation_config.json always samples
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(document if isinstance(document, bytes) else document.read_bytes())
    result = open_checkpoint(made)
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    files = {name: manifest.File((made / name).stat().st_size, _sha256(made / name)) for name in names}
    origin = {
        "mixtools": __version__, "layout": result.layout.name, "options": {}, "source": inputs_of(source).about,
        "method": {"name": backend.method, "backend": backend.name, **asdict(asked)},
    }  # fmt: skip
    crcs = {name: _crc(result, name) for name in result.store.entries}
    (made / manifest.NAME).write_bytes(manifest.encode(origin, files, crcs))
    return tuple(names)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            yield block


def _crc(checkpoint: Checkpoint, name: str) -> int:
    rows = checkpoint.store.entries[name].rows
    return zlib.crc32(checkpoint.store.read_rows(name, 0, rows).tobytes())
