"""How report_long.py names and draws arms: score, seconds and memory against the length of the text, two figures for each model and kind of arm."""
from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

import plots
from long_modes import MODES, TUNED

ALL, RETRIEVAL = "mean over tasks", "mean over retrieval"
ORDER = (MODES[0], TUNED, *MODES[1:])
STROKES = {TUNED: {"linestyle": "-."}, "ttt_empty": {"linestyle": ":"}, "ttt_foreign": {"linestyle": "-.", "markerfacecolor": "white"},
           "ttt_paper": {"linestyle": "-"}, "ttt_strict": {"linestyle": "--", "markerfacecolor": "white"}, "ttt_sharp": {"linestyle": ":", "markerfacecolor": "white"}}
KINDS = {"chunks": "arms that write chunk by chunk", "clipped": "arms that write chunk by chunk, clipped", "whole": "arms that write a whole text, and readers"}
LEGEND = {"loc": "outside lower center", "handlelength": 4}  # long enough to show a dash and its dot


def draw(arms: list[dict], folder: Path) -> None:
    """accuracy-MODEL-KIND.png and cost-MODEL-KIND.png of each model and kind of arm (KINDS) in the folder; a base that was asked alone stands in all of its model's."""
    for model in dict.fromkeys(arm["model"] for arm in arms):
        own = [arm for arm in arms if arm["model"] == model]
        kinds = {name: [arm for arm in own if kind_of(arm) in (name, None)] for name in KINDS}
        for kind in [name for name, some in kinds.items() if any(kind_of(arm) for arm in some)] or ["whole"]:
            name, title = f"{model.replace('/', '-')}-{kind}.png", f"{model}, {KINDS[kind]}"
            draw_accuracy(kinds[kind], title, folder / f"accuracy-{name}")
            draw_cost(kinds[kind], title, folder / f"cost-{name}")


def kind_of(arm: dict) -> str | None:
    """Of KINDS; None of a base."""
    return None if arm["objective"] == "none" else "whole" if not arm["chunk"] else "clipped" if arm["clip"] else "chunks"


def draw_accuracy(arms: list[dict], title: str, path: Path) -> None:
    """Score of arms of one model against length, a panel a task (the means first), a line an arm and mode; in_context once."""
    tasks = sorted(dict.fromkeys(cell["task"] for arm in arms for cell in arm["cells"]), key=lambda task: task not in (ALL, RETRIEVAL))
    columns = min(5 if len(tasks) > 12 else 4, len(tasks))
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 1.6))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for spare in axes[len(tasks):]:
            spare.set_visible(False)
        title = f"{title}: score by tokens of prompt and answer (bars: 95% bootstrap over texts)"
        figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / 0.1)))  # inches of a letter
        lines = lines_of(arms)
        for ax, task in zip(axes, tasks):
            for number, (label, (look, cells)) in enumerate(lines.items()):
                mine = [cell for cell in cells if cell["task"] == task]
                if mine:
                    ends = np.array([cell["ci"] or [cell["score"]] * 2 for cell in mine]).T
                    score = np.array([cell["score"] for cell in mine])
                    ax.errorbar([cell["length"] * 1.3 ** ((number + 0.5) / len(lines) - 0.5) for cell in mine], score, yerr=np.abs(ends - score),
                                label=label, markersize=3.5, linewidth=1, capsize=1.5, **look)
            ax.set_title(task)
            dress(ax, arms)
            ax.set_ylim(-0.05, 1.05)
        for ax in axes[len(tasks) - columns:len(tasks)]:  # the lowest of each column, also above a spare one
            ax.tick_params(labelbottom=True)
        handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
        fit = int(figure.get_figwidth() / (0.07 * max(map(len, labels)) + 0.9))  # a letter and a handle, in inches
        figure.legend(handles, labels, ncols=max(1, min(columns - 1, len(labels), fit)), **LEGEND)
        figure.savefig(path, dpi=plots.DPI)


def draw_cost(arms: list[dict], title: str, path: Path) -> None:
    """Seconds and peak memory an item, above the weights, of arms of one model against length, over all tasks: batches differ in size."""
    with matplotlib.rc_context(plots.STYLE):
        lines = lines_of(arms)
        figure = Figure(figsize=(8.5, 3.4 + 0.16 * len(lines)))
        figure.suptitle(title)
        for ax, name, text in zip(figure.subplots(1, 2), ("seconds", "item_gb"), ("seconds an item (median)", "GB an item (median of a batch's peak by its items)")):
            for label, (look, cells) in lines.items():
                mine = [cell for cell in cells if cell["task"] == (ALL if any(c["task"] == ALL for c in cells) else cells[0]["task"]) and cell[name] is not None]
                if mine:
                    ax.plot([cell["length"] for cell in mine], [cell[name] for cell in mine], label=label, markersize=4, **look)
            ax.set_title(text if ax.lines else "memory: not measured on a CPU")
            if ax.lines:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            dress(ax, arms)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=2, **LEGEND)
        figure.savefig(path, dpi=plots.DPI)


def dress(ax, arms: list[dict]) -> None:
    lengths = sorted({cell["length"] for arm in arms for cell in arm["cells"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths])
    ax.minorticks_off()
    ax.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)


def named(arm: dict) -> str:
    return arm["arm"] + (f" (seed {arm['seed']})" if arm["seed"] else "") + (f" clipped to {arm['clip']:g}" if arm["clip"] else "")


def lines_of(arms: list[dict]) -> dict[str, tuple[dict, list[dict]]]:
    """The lines of a figure: {label: (how it is drawn, cells in order of length)}: a colour and marker for each arm, seed and clip, a mode's stroke; in_context is
    one line, however many arms share it, of the most items."""
    lines: dict[str, tuple[dict, dict]] = {}
    numbers: dict[tuple, int] = {}  # of the arms that are asked more than in_context
    for arm in arms:
        for cell in sorted(arm["cells"], key=lambda cell: ORDER.index(cell["mode"])):
            base = cell["mode"] == "in_context"
            if base:
                look = {"color": "black", "marker": "."}
            else:
                number = numbers.setdefault((arm["arm"], arm["seed"], arm["clip"]), len(numbers))
                look = {"color": plots.COLORS[number % 6], "marker": plots.MARKERS[number % 7]} | STROKES[cell["mode"]]
            drawn = lines.setdefault("in_context" if base else f"{named(arm)}, {cell['mode']}", (look, {}))[1]
            place = cell["task"], cell["length"]
            drawn[place] = max(drawn.get(place, cell), cell, key=lambda cell: cell["n"])
    return {label: (look, sorted(cells.values(), key=lambda cell: cell["length"])) for label, (look, cells) in lines.items()}
