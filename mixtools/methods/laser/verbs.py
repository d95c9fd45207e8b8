"""mixtools.laser and mixtools.spectrum from start to end: what is asked, texts, limits, the job, and what is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ...errors import OutputError, OutputExists, QuantizedError, UsageError
from ...machine import (
    check_device,
    find_device,
    memory_for,
    parse_limit,
    parse_size,
    peak_memory,
)
from ...options import Device, DryRun, Jobs, MaxMemory, Out, Overwrite, Requantize, Resume, ShardSize, Source
from ...progress import Callback, Progress, watched
from ...verbs import Forecast, Option
from .consistent import expect_consistent
from .results import Reduced, Seen

if TYPE_CHECKING:
    from ...inference.calibrate import Calibration
    from ...job import Job, Run
    from ...layouts.checkpoint import Checkpoint
    from ...names import Slot
    from .selection import Asked, Options
    from .survey import Survey

ALL_TARGETS = "w1,w2,w3,q,k,v,o"
NORMS = "weights|output"
RULES = "mp|gavish-donoho|laserrmt|activation=0.01|energy=0.99|rho=0.1|rank=512"
OUTPUT = "output"

Layers = Annotated[str, Option("WHICH", "all, 5, 3,7 or 20-31.")]
Targets = Annotated[str, Option("NAMES", "Which matrices of a layer.")]
Experts = Annotated[str, Option("WHICH", "all, 0 or 0,3: for w1, w2, w3.")]
Exact = Annotated[bool, Option("", "A full SVD instead of the Gram matrix: for f32, and slow.")]
Norm = Annotated[str, Option(NORMS, "What is kept best: the weights as such, or, over --text, the layer's output.")]
Damping = Annotated[float, Option("N", "--norm output: share of the inputs' mean square, for directions unseen.")]
Routed = Annotated[bool, Option("", "A token counts at an expert by the square of its routing weight.")]
Text = Annotated[str | Path | None, Option("FILE", "Calibration text: layer errors, and the output's norm.")]
Samples = Annotated[int, Option("N", "Windows of the text.", low=1)]
SeqLen = Annotated[int, Option("N", "Tokens of a window.", low=2)]


class Machine(NamedTuple):
    """The options that choose no figure."""

    device: str
    max_memory: int | None
    jobs: int
    progress: Progress


class Texts(NamedTuple):
    """What is read of the files, and how it is cut."""

    text: Path | None
    held_out: Path | None
    samples: int
    seq_len: int


def laser(
    source: Source, out: Out, *, layers: Layers, targets: Targets = ALL_TARGETS, experts: Experts = "all",
    rank_rule: Annotated[
        str | None, Option(RULES, "Which singular values stay; mp, or activation=0.01 in the output's norm.")
    ] = None,
    norm: Norm = "weights",
    budget: Annotated[
        float | None, Option("SHARE", "Instead of a rule: of the chosen weights' bytes, spent where it saves most.")
    ] = None,
    layer_floor: Annotated[
        float | None, Option("SHARE", "--budget: what each layer keeps of its bytes at least; half the budget.")
    ] = None,
    sequential: Annotated[
        bool, Option("", "--norm output: each layer's inputs come through the layers as reduced before it.")
    ] = False,
    damping: Damping = 1e-4, routed: Routed = False,
    search: Annotated[str | None, Option("gain|laserrmt", "Keep only the edits that --text says help.")] = None,
    margin: Annotated[float, Option("N", "--search gain: standard errors an edit must gain.", low=0)] = 2.0,
    held_out: Annotated[str | Path | None, Option("FILE", "Another text, for the final figure.")] = None,
    factored: Annotated[bool, Option("", "Store two factors for each matrix, not one.")] = False,
    exact: Exact = False, text: Text = None, samples: Samples = 32, seq_len: SeqLen = 1024,
    requantize: Requantize = False, max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Reduced | Forecast:  # fmt: skip
    """Replace weight matrices by their best approximations of lower rank, and tell what each lost.

    Which norm? `weights` is LASER's own: it needs no text, repeats published recipes and favours no text over another.
    `output` is the right one to make a model smaller: at the same rank the layers' outputs change least, the more so
    where a few channels are much larger than the others. Its text should be like what the model will read.

    Example: mixtools laser Mixtral-8x7B-v0.1 Mixtral-8x7B-laser --layers 24-31 --targets w2 --rank-rule mp

    Example: mixtools laser Mixtral-8x7B-v0.1 Mixtral-8x7B-small --layers all --targets w1,w2,w3 --norm output
    --budget 0.8 --factored --text text.txt

    arXiv 2312.13558; see method.py and linalg/rules.py for the rules. Memory: one matrix, decomposed, and with `text`
    one layer and its moments. Raises UsageError for options or ranks that cannot be, SpectrumError for a matrix with
    NaN, QuantizedError, MemoryBudgetError, and the errors of reading the source and writing the output.
    """
    began = time.monotonic()
    check_device(device)
    shard = parse_size(max_shard_size, "max_shard_size")
    expect_consistent(
        search=search, text=text, held_out=held_out, rank_rule=rank_rule, norm=norm, budget=budget, exact=exact,
        layer_floor=layer_floor, sequential=sequential, damping=damping, routed=routed,
    )  # fmt: skip
    from ...job import Run
    from ...storage.place import Place
    from .forecast import forecast, threads_within
    from .selection import Asked, Options

    options = Options(
        layers, targets, experts, rank_rule, factored, exact, norm, damping, budget, layer_floor, sequential, routed,
        shard,
    )  # fmt: skip
    machine = Machine(device, parse_limit(max_memory), jobs, watched(progress))
    checkpoint, slots = _open(source, Path(out), options, requantize)
    asked = Asked(checkpoint, slots, options)
    threads = threads_within(machine.max_memory, asked, jobs, calibrated=text is not None)
    if not dry_run:
        Place(Path(out)).expect_free(overwrite)
    texts = Texts(_path(text), _path(held_out), samples, seq_len)
    how = Run(overwrite, resume, threads, machine.progress)
    if search and not dry_run:
        job = _search_job(checkpoint, options, (search, margin, rank_rule), texts, machine)
        return _carry_out(job, Path(out), how, [], began)
    calibration, notes = (None, []) if search else _calibration(checkpoint, slots, texts, machine, options)
    if dry_run:
        return forecast(asked, threads, calibration, rebuild=True, search=search)
    with _closing(calibration):
        job = _job(asked, calibration, machine, Path(out), how)
        return _carry_out(job, Path(out), how, notes, began)


def spectrum(
    source: Source, *, layers: Layers, targets: Targets = ALL_TARGETS, experts: Experts = "all",
    rank_rule: Annotated[
        str | None, Option(RULES, "Which singular values stay; mp, or activation=0.01 in the output's norm.")
    ] = None,
    norm: Norm = "weights", damping: Damping = 1e-4, routed: Routed = False,
    exact: Exact = False, text: Text = None, samples: Samples = 32, seq_len: SeqLen = 1024,
    requantize: Requantize = False,
    out: Annotated[str | Path | None, Option("DIR", "Write the report there.")] = None,
    dry_run: DryRun = False,
    overwrite: Annotated[bool, Option("", "Replace a report in DIR.", machine=True)] = False,
    max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Seen | Forecast:  # fmt: skip
    """Singular values of weight matrices: what `laser` would keep, without writing a weight.

    With --norm output and a text: the error of every rank, best in either norm and measured in either.

    Example: mixtools spectrum Mixtral-8x7B-v0.1 --layers 24-31 --targets w2 --out spectra

    Raises as `laser`; OutputExists for a report that is there already.
    """
    check_device(device)
    from . import report as pages
    from . import survey
    from .forecast import forecast, threads_within
    from .selection import Asked, Options
    from .worker import Worker

    expect_consistent(text=text, rank_rule=rank_rule, norm=norm, exact=exact, damping=damping, routed=routed)
    options = Options(layers, targets, experts, rank_rule, exact=exact, norm=norm, damping=damping, routed=routed)
    machine = Machine(device, parse_limit(max_memory), 1, watched(progress))
    folder = _path(out)
    checkpoint, slots = _open(source, folder, options, requantize)
    asked = Asked(checkpoint, slots, options)
    threads_within(machine.max_memory, asked, 1, calibrated=text is not None)
    if folder is not None and not overwrite and (found := folder / f"{pages.NAME}.json").exists():
        raise OutputExists("is there already, maybe that of a checkpoint; --overwrite replaces it", file=found)
    texts = Texts(_path(text), None, samples, seq_len)
    calibration, notes = _calibration(checkpoint, slots, texts, machine, options)
    record = {"calibration": calibration.text.record} if calibration else {}
    if dry_run:
        return forecast(asked, 1, calibration, rebuild=False)
    if (rank := options.method.fixed_rank) is not None:
        survey.fixed_survey(checkpoint, slots, rank)
    began = time.monotonic()
    with _closing(calibration):
        worker = Worker(checkpoint, options.method, find_device(device), calibration)
        rows = survey.survey(worker, slots, machine.progress).rows
    report = pages.document(checkpoint.layout.name, {"laser": options.document(), **record}, list(rows.values()))
    if folder is not None:
        _write(folder, pages.documents(report))
    return Seen(folder, report, round(time.monotonic() - began, 3), peak_memory(), tuple(notes))


def _closing(calibration: Calibration | None) -> AbstractContextManager[object]:
    return closing(calibration) if calibration else nullcontext()


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


# --- the job ---


def _job(asked: Asked, calibration: Calibration | None, machine: Machine, folder: Path, how: Run) -> Job:
    """Ranks that can be told before anything is written are: too high a one, those of factors, and of a budget."""
    from . import run as engine
    from . import survey

    source, slots, options = asked
    record = {"calibration": calibration.text.record} if calibration else {}
    device = find_device(machine.device)
    known = None
    if options.is_surveyed:
        known = _surveyed(asked, calibration, machine, folder, how)
    elif (rank := options.method.fixed_rank) is not None:
        known = survey.fixed_survey(source, slots, rank)
    if known is not None and known.rows.keys() >= known.ranks.keys():
        calibration = None  # there is nothing more to find
    return engine.plan_laser(source, options, known=known, calibration=calibration, device=device, record=record)


def _surveyed(asked: Asked, calibration: Calibration | None, machine: Machine, folder: Path, how: Run) -> Survey:
    """What is found goes into the output's work folder, so that a killed run need not look again."""
    from ...inference.calibrate import Calibration
    from ...storage.findings import Findings
    from ...version import __version__
    from . import survey
    from .worker import Worker

    source, slots, options = asked
    text, given = None, None
    if calibration:  # of the model as it is, also where the output is made in sequence
        text = calibration.text.record
        given = Calibration(calibration.stream, calibration.text, slots, calibration.routed)
    worker = Worker(source, options.method, find_device(machine.device), given)
    files = [file.fingerprint() for file in source.store.sources]
    key = {"mixtools": __version__, "laser": options.survey_document(), "calibration": text, "source": files}
    with Findings(folder, key, overwrite=how.overwrite, resume=how.resume) as kept, _closing(given):
        if options.budget is not None:
            return survey.budget_survey(worker, slots, (options.budget, options.floor), machine.progress, kept)
        looks = survey.rank_survey if options.norm == OUTPUT else survey.survey
        return looks(worker, slots, machine.progress, kept)


def _search_job(
    source: Checkpoint, options: Options, asked: tuple[str, float, str | None], texts: Texts, machine: Machine
) -> Job:
    """The two texts cut into windows, and the job that searches on them."""
    import hashlib

    from ...checking import perplexity
    from ...text.reading import read_text
    from ...text.tokenizer import Tokenizer
    from .search import SearchOptions
    from .search.run import Asked, plan_search

    method, margin, rule = asked
    wanted = SearchOptions(method, margin=margin, norm=options.norm, damping=options.damping, routed=options.routed)
    if rule is not None:
        wanted = replace(wanted, rank_rules=(rule,))
    tokenizer = Tokenizer.from_folder(source.beside)
    tokenizer.check_vocab(source.config)
    windows: list[perplexity.Windows] = []
    told: dict[str, Any] = {"samples": texts.samples, "seq_len": texts.seq_len}
    for name, file in (("text", texts.text), ("held_out_text", texts.held_out)):
        assert file is not None  # expect_consistent
        content = read_text(file)
        ids = tokenizer.encode(content)
        tokenizer.expect_known(ids, source.config)
        most = texts.samples * texts.seq_len
        windows.append(perplexity.cut(ids, ctx=texts.seq_len, bos_id=tokenizer.bos_id, max_tokens=most))
        told[name] = hashlib.sha256(content.encode()).hexdigest()[:16]
    where = find_device(machine.device)
    limit = machine.max_memory if machine.max_memory is not None else memory_for(where, None)
    return plan_search(
        source, options, Asked(wanted, windows[0], windows[1], told), device=where,
        dtype=source.main_dtype().torch(), max_memory=limit, progress=machine.progress,
    )  # fmt: skip


def _carry_out(job: Job, out: Path, how: Run, notes: Sequence[str], began: float) -> Reduced:
    from ...job import run
    from . import run as engine

    done = run(job, out, how)
    done |= {"seconds": round(time.monotonic() - began, 3), "peak_memory_bytes": peak_memory()}
    return Reduced(out, job.inputs.folder, engine.read_report(out), done, (*job.notes, *notes))


def _open(
    source: Source, out: Path | None, options: Options, requantize: bool
) -> tuple[Checkpoint, list[Slot]]:  # fmt: skip
    from ...hub.opening import open_model
    from .selection import select

    _ = options.method  # a rule that there is not is told first
    why = "is quantized; spectra need the weights themselves: `mixtools convert to-hf` it first, then take that"
    try:
        checkpoint = open_model(source)
    except QuantizedError as error:
        raise QuantizedError(why, file=error.file, tensor=error.tensor) from None
    if checkpoint.quantization is not None and not requantize:
        raise QuantizedError(f"{why}, or add --requantize", file=checkpoint.place)
    if out is not None and checkpoint.folder.resolve() == out.resolve():
        raise UsageError("the output is the source's own folder; name another", file=out)
    slots = select(checkpoint.config, options)
    if not slots:
        raise UsageError("no matrix is chosen by --layers, --targets and --experts together")
    return checkpoint, slots


def _calibration(
    source: Checkpoint, slots: list[Slot], texts: Texts, machine: Machine, options: Options
) -> tuple[Calibration | None, list[str]]:
    """And what its user should know."""
    if texts.text is None:
        return None, []
    from ...inference import calibrate
    from ...inference.stream import Stream
    from ...text.reading import read_text
    from ...text.tokenizer import Tokenizer
    from .forecast import BASE_MEMORY

    tokenizer = Tokenizer.from_folder(source.beside)
    remark = tokenizer.check_vocab(source.config)
    notes = [] if remark is None else [remark]
    ids = tokenizer.encode(read_text(texts.text), bos=False)
    tokenizer.expect_known(ids, source.config)
    text = calibrate.cut(ids, texts.samples, texts.seq_len, tokenizer.bos_id)
    where = find_device(machine.device)
    limit = memory_for(where, None) if machine.max_memory is None else machine.max_memory - BASE_MEMORY
    stream = Stream(source, where, source.main_dtype().torch(), max_memory=limit)
    stream.reserved = calibrate.moment_bytes(source.config, slots)
    stream.plan([len(ids) for ids in text.sequences])  # what does not fit is told before anything is read
    if options.sequential:
        from .sequential import Sequential

        return Sequential(stream, text, slots, options.routed), notes
    return calibrate.Calibration(stream, text, slots, options.routed), notes


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", file=folder) from None
