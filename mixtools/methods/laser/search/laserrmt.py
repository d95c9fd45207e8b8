"""LaserRMT's way, as published models were made (github.com/cognitivecomputations/laserRMT).

The matrices of lowest SNR, one after the other, the lowest first: each truncated at LaserRMT's threshold, and kept if
the text's perplexity does not rise. There is no error bar, and earlier layers may be edited after later ones. Every
matrix's spectrum is computed, `lowest` are decomposed; each trial costs the layers from the first edited one on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ....errors import SpectrumError
from ....layouts.reader import Reader
from ....linalg.bulk import Bulk, signal_to_noise
from ....linalg.rules import LaserRmt
from ....linalg.spectrum import spectrum
from ....names import Slot
from ....progress import Progress
from .bench import Bench
from .rows import Row, Trial


def snr(reader: Reader, slot: Slot, device: torch.device) -> float:
    """Σ of the singular values above LaserRMT's threshold over Σ of the others; inf where none is below."""
    try:
        found = spectrum(reader.read(slot).to(device))
    except SpectrumError as error:
        raise SpectrumError(error.message, file=error.file, tensor=slot) from None
    return signal_to_noise(found.values, max(Bulk.of(found).laserrmt, found.floor))


def order(
    reader: Reader, slots: Sequence[Slot], done: Mapping[Slot, Row], device: torch.device, progress: Progress
) -> list[tuple[float, Slot]]:
    """(SNR, slot), the lowest first; of equals, as given. What `done` knows is not computed again."""
    progress.start("spectra", len(slots), "matrices")
    found = []
    for slot in slots:
        known = done[slot].snr if slot in done else None
        found.append((snr(reader, slot, device) if known is None else known, slot))
        progress.advance(1)
    progress.finish()
    return sorted(found, key=lambda pair: pair[0])


def passed_over(ordered: Sequence[tuple[float, Slot]], lowest: int) -> Iterator[Row]:
    """Rows of those that are not tried."""
    for place, (ratio, slot) in enumerate(ordered[lowest:], lowest + 1):
        yield Row(slot, False, f"not tried: number {place} by SNR, the lowest {lowest} are", snr=ratio)


def one_by_one(bench: Bench, chosen: Sequence[tuple[float, Slot]], done: Mapping[Slot, Row]) -> Iterator[Row]:
    """A row for each of `chosen`, in their order."""
    for ratio, slot in chosen:
        if slot in done:
            bench.restore([done[slot]])
            yield done[slot]
        else:
            yield _try(bench, slot, ratio)


def _try(bench: Bench, slot: Slot, ratio: float) -> Row:
    analysis = bench.analyse(slot)
    rank = analysis.rank(LaserRmt())
    if rank == len(analysis.best.values):
        return Row(slot, False, "the threshold keeps every singular value", snr=ratio)
    edits = {**bench.edits, slot: bench.truncate(analysis, rank)}
    (after,) = bench.nll([edits])
    trial = Trial(rank, None, *bench.change(after))
    if float(after.mean()) <= float(bench.standing.mean()):  # NaN compares false
        bench.accept(edits, after)
        return Row(slot, True, "perplexity does not rise", rank, (trial,), snr=ratio)
    bench.shelf.drop(edits[slot])
    return Row(slot, False, "perplexity rises", None, (trial,), snr=ratio)
