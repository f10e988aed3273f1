"""The figures of diagnose.py, in the style of plots.py."""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import plots
from adaptation import ROUNDING, Along
from inside import Asked, Text, belongs, met_by

OFF, ON, FACT, QUIET = "0.45", plots.COLORS[0], plots.COLORS[4], "0.6"
SHADES = matplotlib.colormaps["Blues"]
DARKEST = 0.7       # of the shades: black letters stay legible on it
LINE = 96           # letters of a line of text
LETTER = 0.0731     # inches that a letter of 8.75 points takes in a monospaced font
PAGE_COLORS = 128   # of found.png: a page of text is a large file
STRONGEST = 36      # words of found_layers.png


def draw_all(folder: Path, found: dict | None, drawn: list, read: Along, streamed: Along, scaled: dict | None, arm: str) -> None:
    """Write the figures of one report into the folder; without conversations (nothing drawn) those of the text alone."""
    with matplotlib.rc_context(plots.STYLE):
        figures = {"along": along(read, f"{arm}, piece by piece"), "streamed": along(replace(streamed, starts=list(range(len(streamed.off_L)))), f"{arm}, token by token")}
        if drawn:
            figures |= {"found": found_in_text(drawn, found), "found_layers": found_by_layer(drawn), "layers": layers_panels(found)}
        if scaled:
            figures["scale"] = scale(scaled)
        for name, figure in figures.items():
            plots.save(figure, folder / f"{name}.png")
        if drawn:
            fewer_colors(folder / "found.png")


def fewer_colors(path: Path) -> None:
    part = path.with_name(path.name + ".part")
    Image.open(path).convert("RGB").quantize(PAGE_COLORS).save(part, "PNG", optimize=True)
    os.replace(part, path)


# ---- along a text ----

def along(read: Along, title: str) -> Figure:
    """The model's own loss with TTT off and on, their difference, and the inner loss before and after each piece is written."""
    figure = Figure(figsize=(9, 8))
    outer, gain, inner = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1.6, 2.4))
    figure.suptitle(f"Inner and outer loss along a text: {title}")
    lengths = np.diff([*read.starts, len(read.off_L)])
    middles = np.array(read.starts) + lengths / 2
    off, on = read.by_piece(read.off_L), read.by_piece(read.on_L)
    mark = {"marker": "o", "markersize": 3, "linewidth": 1} if len(middles) <= 64 else {"linewidth": 0.8}
    outer.plot(middles, off, color=OFF, label="TTT off: the base alone", **mark)
    outer.plot(middles, on, color=ON, linestyle="--", label="TTT on: with what was written before", **mark)
    outer.set_ylabel("model's own loss,\nnats a token")
    gain.axhline(0, color="black", linewidth=0.8)
    gain.bar(middles, off - on, width=0.8 * lengths, color=np.where(off - on > 0, plots.COLORS[2], plots.COLORS[4]))
    gain.set_ylabel("off − on, nats a token\n(above 0: TTT helps)")
    for name, color, marker, label in (("prev", plots.COLORS[1], "o", "before the piece is written (l_prev)"), ("after", plots.COLORS[0], "v", "after it (l_after)")):
        by_layer = read.inner(name)
        middle, low, high = (np.ma.masked_invalid(by_layer).mean(0).filled(np.nan), *(edge(by_layer) for edge in (lowest, highest)))
        inner.errorbar(middles, middle, np.stack([middle - low, high - middle]), color=color, marker=marker, markersize=4, linestyle="none",
                       elinewidth=0.6, alpha=0.9, label=label)
    l0 = np.nanmean(read.l0_NL) if np.isfinite(read.l0_NL).any() else 0.0
    inner.axhline(l0, color="black", linewidth=0.8, linestyle=":", label="under the initial weights (l0)")
    if np.nanmax(np.abs(read.inner("after")), initial=0) > 3:
        inner.set_yscale("symlog", linthresh=1)
    inner.set_ylabel("inner loss, share of what is asked\n(dot: mean over layers; bar: their range)")
    inner.set_xlabel("tokens of the text")
    for ax in (outer, inner):
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    return figure


def lowest(table_NP: np.ndarray) -> np.ndarray:
    return np.ma.masked_invalid(table_NP).min(0).filled(np.nan)


def highest(table_NP: np.ndarray) -> np.ndarray:
    return np.ma.masked_invalid(table_NP).max(0).filled(np.nan)


# ---- a fact being found ----

@dataclass(frozen=True)
class Word:
    """Tokens start to end of a text, and the letters they show; breaks: a new line begins behind it."""

    letters: str
    start: int
    end: int
    breaks: bool


def words_of(tokens: list[str]) -> list[Word]:
    """Tokens joined to words: a token that begins with a space, or follows a line break, begins one; a line break belongs to the word before."""
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or tokens[end].startswith(" ") or "\n" in tokens[end - 1]:
            text = "".join(tokens[start:end])
            found.append(Word(text.strip(), start, end, "\n" in text))
            start = end
    return found


def by_word(values_S: torch.Tensor, words: list[Word]) -> np.ndarray:
    """The largest value of each word's tokens; NaN where none has one."""
    values = values_S.numpy()
    return np.array([np.nanmax(values[w.start:w.end]) if np.isfinite(values[w.start:w.end]).any() else np.nan for w in words])


def lay_out(words: list[Word]) -> list[tuple[int, int]]:
    """(line, column) of each word on a page LINE letters wide."""
    places, line, column = [], 0, 0
    for word in words:
        if column and column + len(word.letters) > LINE:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(word.letters) + 1 if word.letters else 0
        if word.breaks and column:
            line, column = line + 1, 0
    return places


def found_in_text(drawn: list[tuple[Text, dict, Asked]], found: dict) -> Figure:
    """The conversation once for every question; the darker a word, the better it is met in the layer whose questions find their facts most often."""
    text, layers = drawn[0][0], found["layers"]
    finder = max(layers, key=lambda i: layers[i]["in_fact"])
    words = words_of(text.words)
    places = lay_out(words)
    lines = max(line for line, _ in places) + 1
    figure = Figure(figsize=(LINE * LETTER + 1.1, len(drawn) * (0.21 * lines + 0.45) + 1.0))
    figure.suptitle(f"{text.sample['sample_id']}, layer {finder}: which written words a question meets\n"
                    "(a token is written with the one after it: the word before an answer lights up)")
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    values = [by_word(met_by(asked.queries[finder], text, finder), words) for _, _, asked in drawn]
    top = max(float(np.nanmax(v)) for v in values)
    for ax, value, (_, probe, _) in zip(panels, values, drawn):
        page(ax, words, places, lines, value / top, belongs(text, probe).numpy())
        ax.set_title(f"{probe['question']}  →  {probe['gold_answer']}".replace("$", r"\$"), fontsize=9, loc="left", fontweight="bold")
    scale_of = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, top), matplotlib.colors.ListedColormap(SHADES(np.linspace(0, DARKEST, 256))))
    figure.colorbar(scale_of, ax=list(panels), fraction=0.02, pad=0.01, label="query · key (grey words: no slot; underlined: the fact; framed: met best)")
    return figure


def page(ax, words: list[Word], places: list[tuple[int, int]], lines: int, shade: np.ndarray, inside_S: np.ndarray) -> None:
    ax.set(xlim=(-0.5, LINE + 0.5), ylim=(lines - 0.4, -0.6))
    ax.axis("off")
    best = int(np.nanargmax(shade))
    for number, (word, (line, column), value) in enumerate(zip(words, places, shade)):
        if np.isfinite(value):
            ax.add_patch(Rectangle((column - 0.3, line - 0.45), len(word.letters) + 0.6, 0.9, facecolor=SHADES(DARKEST * max(value, 0)),
                                   edgecolor="black" if number == best else "none", linewidth=1.2))
        ax.text(column, line, word.letters.replace("$", r"\$"), family="monospace", fontsize=8.75, va="center", color=QUIET if np.isnan(value) else "black")
        if inside_S[max(word.start, 0):word.end].any():
            ax.plot([column - 0.2, column + len(word.letters) + 0.2], [line + 0.47] * 2, color=FACT, linewidth=1.8, solid_capstyle="butt")


def found_by_layer(drawn: list[tuple[Text, dict, Asked]]) -> Figure:
    """Questions by layers, over the words that any of the questions meets best: from which depth on the right one is met."""
    text = drawn[0][0]
    words = words_of(text.words)
    tables = [np.stack([by_word(met_by(query, text, i), words) for i, query in sorted(asked.queries.items())]) for _, _, asked in drawn]
    strength = np.max([np.nan_to_num(table, nan=-1).max(0) for table in tables], axis=0)
    shown = np.sort(np.argsort(-strength, kind="stable")[:STRONGEST])
    layers = sorted(text.keys)
    figure = Figure(figsize=(10, len(drawn) * (0.7 + 0.075 * max(len(layers), 10)) + 1.6))
    figure.suptitle(f"{text.sample['sample_id']}: how well each question meets the {len(shown)} words met best, by layer (red: of the fact; blank: no slot)")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    top = max(float(np.nanmax(table)) for table in tables)
    for ax, table, (_, probe, _) in zip(panels, tables, drawn):
        image = ax.imshow(table[:, shown], aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        inside = belongs(text, probe).numpy()
        for column, number in enumerate(shown):
            if inside[words[number].start:words[number].end].any():
                ax.add_patch(Rectangle((column - 0.5, len(layers) - 0.5), 1, 0.06 * len(layers), color=FACT, clip_on=False))
        every = -(-len(layers) // 10)
        ax.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
        ax.set_ylabel("layer")
        ax.grid(False)
        ax.set_title(f"{probe['question']}  →  {probe['gold_answer']}".replace("$", r"\$"), loc="left")
    panels[-1].set_xticks(range(len(shown)), [words[n].letters.replace("$", r"\$") or "·" for n in shown], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    panels[-1].tick_params(axis="x", pad=6)
    figure.colorbar(image, ax=list(panels), fraction=0.02, pad=0.01, label="query · key")
    return figure


# ---- layer by layer, and scaled ----

def layers_panels(found: dict) -> Figure:
    """Bars by layer: what is right and how far the predictions move without it and with it alone, what its query finds, how large its update is and of what spectrum."""
    layers, apart = found["layers"], found["ablated"]
    ablation = () if apart is None else (
        ("right answers", "share of questions", (("without this layer", "em_without"), ("this layer and deeper", "em_from"), ("this layer alone", "em_only")), apart["em"]),
        ("divergence from the whole memory", "KL of the predictions, nats", (("without this layer", "kl_without"), ("this layer alone", "kl_only")), None))
    panels = (("the query meets the fact best", "share of questions", (("by its key", "in_fact"), ("a slot at random", "chance")), None),
              ("size of the update", "ratio", (("|dW| / |W_down|", "update_norm"), ("of the MLP's output", "share_of_output")), None),
              ("effective rank of dW", "exp(entropy of singular values)", (("", "effective_rank"),), None), *ablation)
    figure = Figure(figsize=(11, 7.6 if ablation else 6.4))
    figure.suptitle(f"What each layer's memory does: {found['conversations']} conversations, {found['questions']} questions" +
                    (f"\n(right answers and divergence: {apart['conversations']} conversations, {apart['questions']} questions)" if ablation else ""))
    axes = figure.subplots(2, 3 if ablation else 2).ravel()
    for ax, (title, unit, series, whole) in zip(axes, panels):
        bars(ax, layers, series)
        if whole is not None:
            ax.axhline(whole, color="black", linewidth=1, linestyle="--", label="all layers")
        ax.set(title=title, ylabel=unit, xlabel="layer")
        if len(series) > 1:
            ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    if ablation:
        axes[4].set_yscale("symlog", linthresh=0.01)
    spectra, last = found["spectrum_of_the_first"], axes[-1]
    for number, (i, values) in enumerate(spectra.items()):
        last.plot(range(1, len(values) + 1), np.where(np.array(values) > ROUNDING * values[0], values, np.nan), linewidth=1,
                  color=matplotlib.colormaps["cividis"](number / max(1, len(spectra) - 1)))
    last.set(title="spectrum of dW, first conversation", ylabel="singular value", xlabel="number", yscale="log")
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(spectra), max(spectra)), matplotlib.colormaps["cividis"])
    figure.colorbar(shades, ax=last, label="layer", ticks=list(spectra)[::max(1, len(spectra) // 6)])
    return figure


def bars(ax, layers: dict, series) -> None:
    width = 0.8 / len(series)
    for number, (label, name) in enumerate(series):
        places = [place - 0.4 + width * (number + 0.5) for place in range(len(layers))]
        ax.bar(places, [cell[name] for cell in layers.values()], width, label=label, color=plots.COLORS[number])
    every = -(-len(layers) // 10)
    ax.set_xticks(range(0, len(layers), every), list(layers)[::every])


def scale(scaled: dict) -> Figure:
    """Right answers, and empty or stuck ones, against the size of the update."""
    figure = Figure(figsize=(7, 4.4))
    figure.suptitle(f"Answers against the size of the update, {scaled['memory'][0]['n']} questions:\n"
                    "the memory, and random updates of its norm, times a factor\n(bars: 95% bootstrap over conversations)")
    ax = figure.subplots()
    plots.scale_panel(ax, scaled)
    plots.shared_legend(figure, [ax], key=None, ncols=2)
    return figure
