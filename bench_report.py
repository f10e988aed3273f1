"""What bench.py says: its lines as rows of a table and as a figure."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

matplotlib.use("Agg")

WAY_COLORS = {"public": "#D55E00", "base": "#999999", "in_context": "#999999"}


@dataclass
class Line:
    """One way through one case. seconds: median, of a unit; ratio: to the case's first way; tflops: the operations that a unit needs over its
    seconds, share: of the measured rate of matrix products; floor: seconds that the machine cannot beat (each None where it is not known);
    peak_gb: above what lay on the device before (None on a CPU)."""

    part: str
    case: str
    way: str
    seconds: float
    ratio: float
    tokens_per_s: float
    tflops: float | None
    share: float | None
    floor: float | None
    peak_gb: float | None


HEADER = f"{'part':8s}{'case':46s}{'way':30s}{'seconds a unit':>12s}  {'ratio':8s}{'rate':>12s}        operations over time, share of the products' rate, over the floor, peak memory"


def text_of(line: Line) -> str:
    """A row of the table."""
    more = [f"{line.tokens_per_s:12,.0f} tok/s"]
    if line.tflops is not None:
        more.append(f"{line.tflops:9.4g} TFLOP/s" + ("" if line.share is None else f" {100 * line.share:5.1f}%"))
    more += ([f"floor x{line.seconds / line.floor:.2f}"] if line.floor else []) + ([f"{line.peak_gb:.2f} GB"] if line.peak_gb is not None else [])
    return f"{line.part:8s}{line.case:46s}{line.way:30s}{line.seconds:10.4f} s  x{line.ratio:<7.3f}{'  '.join(more)}"


def draw(lines: list[Line], model: str, path: Path) -> None:
    """Seconds of every line beside its floor, a panel a part; no file where nothing was timed."""
    path.unlink(missing_ok=True)
    if not lines:
        return
    parts = {line.part: [other for other in lines if other.part == line.part] for line in lines}
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(lines) + 0.7 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[len(some) + 1 for some in parts.values()])[:, 0]
    figure.suptitle(f"Seconds a unit, {model} (line: floor)")
    for ax, (part, some) in zip(panels, parts.items()):
        places = range(len(some))
        ax.barh(places, [line.seconds for line in some], color=[WAY_COLORS.get(line.way.split(",")[0], "#009E73") for line in some])
        for place, line in zip(places, some):
            if line.floor:
                ax.plot([line.floor] * 2, [place - 0.4, place + 0.4], color="black")
        ax.set_yticks(places, [f"{line.case}: {line.way}" for line in some], fontsize=7)
        ax.invert_yaxis()
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.xaxis.set_minor_formatter(NullFormatter())  # labels must not overlap, also where a panel is four decades wide
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.set_title(part, fontsize=9)
    figure.savefig(path, dpi=150)
