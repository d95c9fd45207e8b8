"""A set of files as a picture: size against divergence, both as they were measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    label: str
    bytes: int
    kld: float


def png(points: Sequence[Point], source: str) -> bytes:
    """Points in the order of their sizes, joined; the same bytes for the same points, by one version of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda point: point.bytes)
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if ordered[-1].bytes >= u or n == "kB")
    sizes, losses = [point.bytes / unit for point in ordered], [point.kld for point in ordered]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(sizes, losses, "-", color="#9aa7b8", linewidth=1)
    axes.plot(sizes, losses, "o", color="#22558c", markersize=6)
    for point, x, y in zip(ordered, sizes, losses, strict=True):
        axes.annotate(point.label, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=9)
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(f"size, {name}")
    axes.set_ylabel(f"mean KL divergence from {source}, nats")
    axes.grid(True, which="both", color="#e3e7ec", linewidth=0.6)
    axes.margins(x=0.12, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", metadata={"Software": "mixtools"})
    return out.getvalue()
