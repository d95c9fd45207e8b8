"""mixtools laser and mixtools spectrum: lower ranks, and what there is to see before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import MemoryBudgetError, OutputError, OutputExists, QuantizedError, UsageError
from . import base

if TYPE_CHECKING:
    from .. import job as job_room
    from ..inference.calibrate import Calibration
    from ..layouts.checkpoint import Checkpoint
    from ..methods.laser import run as engine
    from ..methods.laser.search import SearchOptions
    from ..names import Slot

ALL_TARGETS = "w1,w2,w3,q,k,v,o"
RULES = "mp|gavish-donoho|laserrmt|activation=0.01|energy=0.99|rho=0.1|rank=512"
BASE_MEMORY = 450_000_000  # the interpreter with torch and scipy
SHOWN = 20  # lines of the table on the terminal

Layers = Annotated[str, typer.Option("--layers", metavar="WHICH", help="all, 5, 3,7 or 20-31.")]
Targets = Annotated[str, typer.Option("--targets", metavar="NAMES", help="Which matrices of a layer.")]
Experts = Annotated[str, typer.Option("--experts", metavar="WHICH", help="all, 0 or 0,3: for w1, w2, w3.")]
Rule = Annotated[str, typer.Option("--rank-rule", metavar=RULES, help="Which singular values stay.")]
Exact = Annotated[bool, typer.Option("--exact", help="A full SVD instead of the Gram matrix: for f32, and slow.")]
Search = Annotated[
    str | None, typer.Option("--search", metavar="gain|laserrmt", help="Keep only the edits that --text says help.")
]
Margin = Annotated[
    float,
    typer.Option("--margin", min=0, metavar="N", help="--search gain: standard errors an edit must gain."),
]
HeldOut = Annotated[Path | None, typer.Option("--held-out", metavar="FILE", help="Another text, for the final figure.")]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Calibration text, for layer errors.")]
Samples = Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Windows of the text.")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, metavar="N", help="Tokens of a window.")]


class Machine(NamedTuple):
    """The options that choose no figure."""

    device: str
    max_memory: int | None
    jobs: int
    screen: base.Screen


class Calibrate(NamedTuple):
    text: Path | None
    samples: int
    seq_len: int


def laser(
    src: base.Source, out: base.Out, layers: Layers, targets: Targets = ALL_TARGETS, experts: Experts = "all",
    rank_rule: Annotated[
        str | None, typer.Option("--rank-rule", metavar=RULES, help="Which singular values stay; mp. A search: all.")
    ] = None,
    search: Search = None, margin: Margin = 2.0, held_out: HeldOut = None,
    factored: Annotated[bool, typer.Option("--factored", help="Store two factors for each matrix, not one.")] = False,
    exact: Exact = False, text: Text = None, samples: Samples = 32, seq_len: SeqLen = 1024,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard.")] = "5GB",
    dry_run: base.DryRun = False, resume: base.Resume = True, overwrite: base.Overwrite = False,
    jobs: base.Jobs = 2, max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Replace weight matrices by their best approximations of lower rank, and tell what each lost.

    Example: mixtools laser Mixtral-8x7B-v0.1 Mixtral-8x7B-laser --layers 24-31 --targets w2 --rank-rule mp
    """
    from .. import job as job_room
    from ..methods.laser import run as engine
    from ..methods.laser.search import SearchOptions
    from ..storage.output import expect_free

    base.check_device(device)
    shard = base.parse_size(max_shard_size, "--max-shard-size")
    options = engine.Options(layers, targets, experts, rank_rule or "mp", factored, exact, shard)
    machine = Machine(device, base.max_memory_bytes(max_memory), jobs, base.Screen(json, quiet))
    _expect_consistent(search, text, held_out, rank_rule)
    source, slots = _open(src, out, options)
    options.method.rank_rule.require(text is not None)
    threads = _threads_within(source, slots, machine, calibrated=text is not None)
    if not dry_run:
        expect_free(out, overwrite)
    how = Calibrate(text, samples, seq_len)
    if search and not dry_run:
        asked = SearchOptions(search, margin=margin)
        if rank_rule is not None:
            asked = replace(asked, rank_rules=(rank_rule,))
        job = _search_job(source, options, asked, how, held_out, machine)
        _carry_out(job, out, job_room.Run(overwrite, resume, threads, machine.screen.progress()), machine.screen)
        return
    calibration = None if search else _calibration(source, slots, how, machine)
    if dry_run:
        document = _forecast(source, slots, options, threads, rebuild=True, calibration=calibration, search=search)
        machine.screen.result(document, lambda: _tell_forecast(document))
        return
    record = {"calibration": calibration.text.record} if calibration else {}
    known = None
    if (rank := engine.is_fixed(options.method)) is not None:
        known = engine.fixed_survey(source, slots, rank)  # a rank too high is told before anything is read
    elif factored:
        worker = engine.Worker(source, options.method, base.find_device(device), calibration)
        known, calibration = engine.survey(worker, slots, machine.screen.progress()), None
    job = engine.plan_laser(
        source, options, known=known, calibration=calibration, device=base.find_device(device), record=record
    )
    _carry_out(job, out, job_room.Run(overwrite, resume, threads, machine.screen.progress()), machine.screen)


def spectrum(
    src: base.Source, layers: Layers, targets: Targets = ALL_TARGETS, experts: Experts = "all", rank_rule: Rule = "mp",
    exact: Exact = False, text: Text = None, samples: Samples = 32, seq_len: SeqLen = 1024,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write the report there.")] = None,
    dry_run: base.DryRun = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report in DIR.")] = False,
    max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Singular values of weight matrices: what `laser` would keep, without writing a weight.

    Example: mixtools spectrum Mixtral-8x7B-v0.1 --layers 24-31 --targets w2 --out spectra
    """
    from ..methods.laser import report as laser_report
    from ..methods.laser import run as engine

    base.check_device(device)
    options = engine.Options(layers, targets, experts, rank_rule, exact=exact)
    machine = Machine(device, base.max_memory_bytes(max_memory), 1, base.Screen(json, quiet))
    source, slots = _open(src, out, options)
    options.method.rank_rule.require(text is not None)
    _threads_within(source, slots, machine, calibrated=text is not None)
    if out is not None and not overwrite and (found := out / f"{laser_report.NAME}.json").exists():
        raise OutputExists("is there already, maybe that of a checkpoint; --overwrite replaces it", file=found)
    calibration = _calibration(source, slots, Calibrate(text, samples, seq_len), machine)
    record = {"calibration": calibration.text.record} if calibration else {}
    if dry_run:
        document = _forecast(source, slots, options, 1, rebuild=False, calibration=calibration)
        machine.screen.result(document, lambda: _tell_forecast(document))
        return
    if (rank := engine.is_fixed(options.method)) is not None:
        engine.fixed_survey(source, slots, rank)
    began = time.monotonic()
    worker = engine.Worker(source, options.method, base.find_device(device), calibration)
    rows = engine.survey(worker, slots, machine.screen.progress()).rows
    report = laser_report.document(source.layout.name, {"laser": options.document(), **record}, list(rows.values()))
    if out is not None:
        _write(out, laser_report.documents(report))
    seconds = round(time.monotonic() - began, 3)
    document = {"output": out and str(out), **report, "seconds": seconds, "peak_memory_bytes": base.peak_memory()}
    machine.screen.result(document, lambda: _tell_spectrum(document, out))


def _carry_out(job: job_room.Job, out: Path, how: job_room.Run, screen: base.Screen) -> None:
    from .. import job as job_room
    from ..methods.laser import run as engine

    began = time.monotonic()
    done = job_room.run(job, out, how)
    document = {
        "output": str(out), **engine.read_report(out), **done, "seconds": round(time.monotonic() - began, 3),
        "peak_memory_bytes": base.peak_memory(),
    }  # fmt: skip
    screen.result(document, lambda: _tell(document, job.inputs.folder, out))


def _expect_consistent(search: str | None, text: Path | None, held_out: Path | None, rule: str | None) -> None:
    if search is None and held_out is not None:
        raise UsageError("--held-out is the text of a search's final figure; give it with --search")
    if search is not None and (text is None or held_out is None):
        raise UsageError("--search needs --text FILE to choose by and --held-out FILE for the final figure")
    if search == "laserrmt" and rule not in (None, "laserrmt"):
        raise UsageError("--search laserrmt takes LaserRMT's own threshold; leave out --rank-rule")


def _search_job(
    source: Checkpoint, options: engine.Options, search: SearchOptions, how: Calibrate,
    held_out: Path | None, machine: Machine,
) -> job_room.Job:  # fmt: skip
    """The two texts cut into windows, and the job that searches on them."""
    import hashlib

    from ..checking import judge, perplexity
    from ..methods.laser.search.run import Asked, plan_search
    from ..text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source.folder)
    tokenizer.check_vocab(source.config)
    windows: list[perplexity.Windows] = []
    texts: dict[str, Any] = {"samples": how.samples, "seq_len": how.seq_len}
    for name, file in (("text", how.text), ("held_out_text", held_out)):
        assert file is not None  # _expect_consistent
        content = perplexity.read_text(file)
        ids = tokenizer.encode(content)
        most = how.samples * how.seq_len
        windows.append(perplexity.cut(ids, ctx=how.seq_len, bos_id=tokenizer.bos_id, max_tokens=most))
        texts[name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    asked = Asked(search, windows[0], windows[1], texts)
    where = base.find_device(machine.device)
    limit = machine.max_memory if machine.max_memory is not None else base.available_memory()
    return plan_search(
        source, options, asked, device=where, dtype=judge.main_dtype(source), max_memory=limit,
        progress=machine.screen.progress(),
    )  # fmt: skip


def _open(src: str, out: Path | None, options: engine.Options) -> tuple[Checkpoint, list[Slot]]:
    from ..layouts.detect import open_checkpoint
    from ..methods.laser import run as engine

    _ = options.method  # a rule that there is not is told first
    try:
        source = open_checkpoint(base.find_model(src))
    except QuantizedError as error:
        why = "is quantized; spectra need the weights themselves: `mixtools convert to-hf` it first, then take that"
        raise QuantizedError(why, file=error.file, tensor=error.tensor) from None
    if out is not None and source.folder.resolve() == out.resolve():
        raise UsageError("the output is the source's own folder; name another", file=out)
    slots = engine.select(source.config, options)
    if not slots:
        raise UsageError("no matrix is chosen by --layers, --targets and --experts together")
    return source, slots


def _threads_within(source: Checkpoint, slots: list[Slot], machine: Machine, *, calibrated: bool) -> int:
    """As many as asked for and as fit; one decomposes, the others copy."""
    from ..inference import calibrate
    from ..methods.laser import run as engine
    from ..storage.store import CHUNK

    limit, copier = machine.max_memory, 8 * CHUNK
    need = BASE_MEMORY + engine.memory_bytes(source, slots, calibrated)
    need += calibrate.moment_bytes(source.config, slots) if calibrated else 0
    if limit is None:
        return machine.jobs
    if limit < need:
        raise MemoryBudgetError(
            "--max-memory is too small for the largest chosen matrix", expected=base.human_bytes(need), found=limit
        )
    return max(1, min(machine.jobs, 1 + (limit - need) // copier))


def _calibration(source: Checkpoint, slots: list[Slot], how: Calibrate, machine: Machine) -> Calibration | None:
    if how.text is None:
        return None
    from ..checking.perplexity import read_text
    from ..inference import calibrate
    from ..inference.stream import Stream
    from ..text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source.folder)
    if (remark := tokenizer.check_vocab(source.config)) is not None:
        machine.screen.note(f"note: {remark}")
    ids = tokenizer.encode(read_text(how.text), bos=False)
    text = calibrate.cut(ids, how.samples, how.seq_len, tokenizer.bos_id)
    dtypes = source.bytes_by_dtype()
    dtype = max(dtypes, key=dtypes.__getitem__).torch()
    limit = base.available_memory() if machine.max_memory is None else machine.max_memory - BASE_MEMORY
    stream = Stream(source, base.find_device(machine.device), dtype, max_memory=limit)
    stream.reserved = calibrate.moment_bytes(source.config, slots)
    stream.plan([len(ids) for ids in text.sequences])  # what does not fit is told before anything is read
    return calibrate.Calibration(stream, text, slots)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", file=folder) from None


# --- told ---


def _forecast(
    source: Checkpoint, slots: list[Slot], options: engine.Options, threads: int, *, rebuild: bool,
    calibration: Calibration | None, search: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Memory is an upper bound; time is shapes over a measured rate, without the calibration's own."""
    from .. import conversion
    from ..methods.laser import run as engine

    memory = BASE_MEMORY + engine.memory_bytes(source, slots, calibration is not None)
    if calibration:
        memory += calibration.stream.plan([len(ids) for ids in calibration.text.sequences]).peak_bytes
    record = {"calibration": calibration.text.record} if calibration else {}
    size = conversion.plan_hf(source, conversion.Options()).plan.total_bytes if rebuild else 0
    seconds = engine.forecast_seconds(source, slots, rebuild, time.perf_counter)
    document: dict[str, Any] = {
        "dry_run": True, "search": search, "laser": options.document(), **record, "matrices": len(slots),
        "targets": engine.role_counts(slots), "bytes": size, "seconds": round(seconds, 1),
        "peak_memory_bytes": memory, "jobs": threads,
    }  # fmt: skip
    return document


def _tell_forecast(document: dict[str, Any]) -> Iterator[str]:
    targets = ", ".join(f"{n} {name}" for name, n in document["targets"].items())
    most = "at most " if document["laser"]["factored"] else ""
    written = f", and write {most}{base.human_bytes(document['bytes'])}" if document["bytes"] else ""
    yield f"would decompose {document['matrices']} matrices ({targets}) by {document['laser']['rank_rule']}{written}"
    memory, seconds = base.human_bytes(document["peak_memory_bytes"]), base.human_time(document["seconds"])
    yield f"memory at most {memory}; about {seconds} of arithmetic"
    if document["search"]:
        yield f"a search ({document['search']}) comes first: its passes over the text are not counted here"
    if "calibration" in document:
        yield f"before that, {document['calibration']['tokens']} calibration tokens go through the layers"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    measured = any(row["layer_error"] is not None for row in rows)
    width = max(len(row["tensor"]) for row in rows[:SHOWN])
    yield f"{'tensor':<{width}}  {'rank':>11}  {'energy':>8}  {'SNR mp':>8}" + ("  layer error" if measured else "")
    for row in rows[:SHOWN]:
        snr = "-" if row["snr_mp"] is None else f"{row['snr_mp']:.3g}"
        line = f"{row['tensor']:<{width}}  {row['rank']:>5} /{row['of']:>5}  {100 * row['energy']:>7.2f}%  {snr:>8}"
        yield line + (f"  {100 * (row['layer_error'] or 0):>10.3f}%" if measured else "")
    if len(rows) > SHOWN:
        yield f"... and {len(rows) - SHOWN} more in the report"


def _tell(document: dict[str, Any], source: Path, out: Path) -> Iterator[str]:
    if document["matrices"]:
        yield from _table(document["matrices"])
    yield from (f"note: {remark}" for remark in document["remarks"])
    if "search" in document:
        figure, chosen = document["search"]["held_out"], document["search"]
        yield f"accepted {chosen['accepted']} of {len(chosen['candidates'])} candidates"
        ratio = f"ln ratio {figure['ln_ratio']:+.5f} ± {figure['stderr']:.5f}"
        before, after = figure["perplexity_before"], figure["perplexity_after"]
        yield f"perplexity of the held-out text: {before:.4f} -> {after:.4f} ({ratio})"
    size, memory = base.human_bytes(document["bytes"]), base.human_bytes(document["peak_memory_bytes"])
    seconds = base.human_time(document["seconds"])
    yield f"wrote {document['tensors']} tensors, {size}, in {seconds} (peak memory {memory})"
    if document["resumed_bytes"]:
        yield f"{base.human_bytes(document['resumed_bytes'])} were there already, from the interrupted run"
    if document["missing"]:
        yield f"note: the source has no {', '.join(document['missing'])}; the output has weights and configuration only"
    yield f"report: {out / 'laser-report.html'}"
    if document["laser"]["factored"]:
        yield f"Other programs need it dense: mixtools convert to-hf {out} DENSE"
    yield f"Check it with: mixtools check {out} --against {source}"


def _tell_spectrum(document: dict[str, Any], out: Path | None) -> Iterator[str]:
    yield from _table(document["matrices"])
    yield from (f"note: {remark}" for remark in document["remarks"])
    if out is not None:
        yield f"report: {out / 'laser-report.html'}"
