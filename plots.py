"""The figures, drawn from the report and the training logs alone; a figure that has no data is not made."""
import os
from bisect import bisect

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmark_file import CATEGORIES
from report_tables import LANGUAGES, LEVELS, arm_text, langs_of, names_of
from results_files import CURVES, ON_CURVES, POSITIONS, SCALED, condition_order, shown_arms

matplotlib.use("Agg")  # files only, no display

DPI = 150
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "0.9", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
         "figure.titlesize": 11, "figure.constrained_layout.use": True,
         "figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.1}


def draw_all(report, curves, folder):
    """Write the figures into folder; returns a line for each that could not be made (an old file of it is removed)."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {"b_vs_d": "B_memory and D_distractor have no level-3 conversation in common",
               "em_by_condition": "every condition that ran is a point of a curve", "category_heatmap": "every condition that ran is a point of a curve",
               "em_by_position": "no prediction has a position",
               "memory_curves": "no arm has two points of a curve (B_merged, D of several lengths, B_rank, B_half)",
               "em_by_scale": "no arm's memory was asked at two sizes (B_scale, N_scale)",
               "em_by_training": "no arm was asked at two points of its training (train_minimal.py --snapshots)",
               "kept_by_size": "no two bases have a share that memory keeps on level 1",
               "training_curve": "no run's adapter has a train.jsonl"}
    notes = []
    with matplotlib.rc_context(STYLE):
        figures = {"em_by_condition": em_by_condition(report), "category_heatmap": category_heatmap(report),
                   "em_by_position": em_by_position(report), "b_vs_d": b_vs_d(report),
                   "memory_curves": memory_curves(report), "em_by_scale": em_by_scale(report), "em_by_training": em_by_training(report), "kept_by_size": kept_by_size(report),
                   "training_curve": training_curve(curves)}
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                notes.append(f"{path.name} is not made: {reasons[name]}.")
                continue
            save(figure, path)
    return notes


def save(figure, path):
    """A PNG at that path, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=DPI, format="png")
    os.replace(temporary, path)


# --- panels ---------------------------------------------------------------------------------------------------

def panels_of(report, has_data=lambda arm, lang: True):
    return [(arm, lang) for arm in shown_arms(report["arms"]) for lang in langs_of([arm]) if has_data(arm, lang)]


def grid(panels, width, heights, title):
    """A figure with one axes per (arm, language), in at most two columns; heights: inches of each panel's plot."""
    columns = min(2, len(panels))
    rows = [max(heights[start:start + columns]) for start in range(0, len(panels), columns)]
    figure = Figure(figsize=(max(width * columns, 6.4), sum(rows) + 1.2 * len(rows) + 0.8))
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows).ravel()
    figure.suptitle(title)
    for spare in axes[len(panels):]:
        spare.set_visible(False)
    return figure, axes[:len(panels)]


def panel_title(arm, lang, *more):
    return "\n".join([f"{arm['model']}, {arm_text(arm)}, {LANGUAGES[lang]}", *more])


def error_bars(cells):
    """Distances (2, N) from the value down and up to the interval's ends; no interval: zero length."""
    ends = [cell["em_ci"] or [cell["em"], cell["em"]] for cell in cells]
    return np.array([[max(cell["em"] - low, 0), max(high - cell["em"], 0)] for cell, (low, high) in zip(cells, ends)]).T


def em_axis(axes):
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylabel("exact match")


def span(values):
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


# --- figures --------------------------------------------------------------------------------------------------

def em_by_condition(report):
    panels = panels_of(report, lambda arm, lang: set(names_of([arm], "conditions", lang)) - set(ON_CURVES))
    if not panels:
        return None
    figure, axes = grid(panels, 6.0, [2.9] * len(panels),
                        "Exact match by condition and level\n(bars: 95% bootstrap over conversations)")
    for ax, (arm, lang) in zip(axes, panels):
        names, counts = [name for name in names_of([arm], "conditions", lang) if name not in ON_CURVES], []
        for index, level in enumerate(LEVELS):
            cells = {name: arm["conditions"][name][level][lang] for name in names
                     if lang in arm["conditions"][name].get(level, {})}
            if cells:
                counts.append(f"level {level}: n = {span([cell['n'] for cell in cells.values()])}")
                ax.errorbar([names.index(name) + 0.22 * (index - 1) for name in cells],
                            [cell["em"] for cell in cells.values()], error_bars(cells.values()), fmt=MARKERS[index],
                            color=COLORS[index], markersize=5, capsize=2, label=f"level {level}")
        em_axis(ax)
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_title(panel_title(arm, lang, "; ".join(counts)))
    shared_legend(figure, axes)
    return figure


def label_order(label):
    """Sort key of "B_memory (L12)": its condition's place, then the label, so that no order depends on the run."""
    return *condition_order(label.split(" ")[0]), label


def line_style(index):
    """Colour and dash of the line with this number: dashed once the colours are used up."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else "--"}


def shared_legend(figure, axes, key=label_order, **options):
    """One legend for all panels, below them, sorted by the key of a label (None: by the label)."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=key)
    options = {"ncols": min(len(labels), int(figure.get_figwidth() // 2))} | options
    figure.legend([entries[label] for label in labels], labels, loc="outside lower center", **options)


def pooled_cells(arm, lang, field):
    """{condition with the levels it ran on: {category or position: cell}}, for the conditions that have any."""
    return {f"{name} (L{''.join(map(str, by_lang[lang]['levels']))})": by_lang[lang][field]
            for name, by_lang in arm["pooled_levels"].items() if name not in ON_CURVES and by_lang.get(lang, {}).get(field)}


def category_heatmap(report):
    panels = panels_of(report, lambda arm, lang: pooled_cells(arm, lang, "by_category"))
    if not panels:
        return None
    tables = [pooled_cells(arm, lang, "by_category") for arm, lang in panels]
    figure, axes = grid(panels, 7.4, [0.38 * len(table) for table in tables],
                        "Exact match by condition and category (small: n probes; L: levels pooled)")
    for ax, (arm, lang), table in zip(axes, panels, tables):
        used = [name for name in CATEGORIES if any(name in cells for cells in table.values())]
        values = [[cells[name]["em"] if name in cells else np.nan for name in used] for cells in table.values()]
        image = ax.imshow(np.array(values), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        annotate(ax, table, used)
        ax.set_xticks(range(len(used)), used, fontsize=8)
        ax.set_yticks(range(len(table)), table, fontsize=8)
        ax.grid(False)
        ax.set_title(panel_title(arm, lang))
    figure.colorbar(image, ax=list(axes), label="exact match", fraction=0.03, pad=0.01)
    return figure


def annotate(ax, table, columns):
    """EM and n in each field, in the ink that reads on its colour."""
    for row, cells in enumerate(table.values()):
        for column, name in enumerate(columns):
            if name in cells:
                ink = "black" if cells[name]["em"] > 0.5 else "white"
                ax.text(column, row - 0.12, f"{cells[name]['em']:.2f}", ha="center", va="center", color=ink, fontsize=8)
                ax.text(column, row + 0.27, f"{cells[name]['n']}", ha="center", va="center", color=ink, fontsize=5.5)


def em_by_position(report):
    panels = panels_of(report, lambda arm, lang: pooled_cells(arm, lang, "by_position"))
    if not panels:
        return None
    figure, axes = grid(panels, 6.0, [2.6] * len(panels),
                        "Exact match by the third of the conversation where the fact stands\n"
                        "(bars: 95% bootstrap over conversations; L: levels pooled)")
    order = sorted({name for arm, lang in panels for name in pooled_cells(arm, lang, "by_position")}, key=label_order)
    for ax, (arm, lang) in zip(axes, panels):
        table = pooled_cells(arm, lang, "by_position")
        for name, cells in table.items():
            position_line(ax, name, cells, order)
        n = [span([cells[place]["n"] for cells in table.values() if place in cells] or [0]) for place in POSITIONS]
        ax.set_xticks(range(3), [f"{place} third\nn = {count}" for place, count in zip(POSITIONS, n)])
        ax.set_xlim(-0.4, 2.4)
        em_axis(ax)
        ax.set_title(panel_title(arm, lang))
    shared_legend(figure, axes)
    return figure


def position_line(ax, name, cells, order):
    """One condition; set a little apart sideways so that intervals do not cover each other."""
    index = label_order(name)[0]  # the same colour and marker for a condition in every report
    offset = 0.5 * (order.index(name) - (len(order) - 1) / 2) / len(order)
    places = [place for place in POSITIONS if place in cells]
    ax.errorbar([POSITIONS.index(place) + offset for place in places], [cells[place]["em"] for place in places],
                error_bars([cells[place] for place in places]), marker=MARKERS[index % len(MARKERS)],
                markersize=4, linewidth=1, capsize=2, label=name, **line_style(index))


def b_vs_d(report):
    panels = panels_of(report, lambda arm, lang: arm["b_vs_d"].get(lang))
    if not panels:
        return None
    figure, axes = grid(panels, 4.6, [3.9] * len(panels),
                        "Exact match per level-3 conversation, without and with distractor\n"
                        "(area: number of conversations; below the line: lost to the distractor)")
    for ax, (arm, lang) in zip(axes, panels):
        b, d, count = np.array(arm["b_vs_d"][lang]).T
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        ax.scatter(b, d, s=300 * count / count.max(), color=COLORS[0], alpha=0.6, edgecolor="white", linewidth=0.5)
        em_axis(ax)
        ax.set_xlim(-0.08, 1.08)
        ax.set_ylim(-0.08, 1.08)
        ax.set_box_aspect(1)
        ax.set_xlabel("B_memory")
        ax.set_ylabel("D_distractor")
        below, above = int(count[d < b].sum()), int(count[d > b].sum())
        ax.set_title(panel_title(arm, lang, f"n = {int(count.sum())} conversations, largest dot: {int(count.max())}",
                                 f"{below} below the line, {above} above"))
    return figure


def memory_curves(report):
    """Exact match against what one memory has to hold and what is kept of it, a line per arm and language."""
    panels = [(what, level, steps, [(arm, lang, points) for arm, lang in panels_of(report)
                                    for points in [curve_points(arm, lang, level, steps)] if len(points) > 1]) for what, level, steps in CURVES]
    what, level, steps, cut = panels[-1]  # the ranks, drawn once more against their bytes
    sized = [(arm, lang, {cell["memory_bytes"]: cell for cell in points.values() if cell["memory_bytes"]}) for arm, lang, points in cut]
    panels.append(("bytes of one memory, cut or in half precision\n(dotted: KV cache of the same text)", level, None, [line for line in sized if len(line[2]) > 1]))
    if report["benchmark"]["facts"]:  # what a conversation counts for
        what, level, steps, drawn = panels[0]
        panels[0] = (f"{what}\n(facts)", level, [(f"{label}\n({float(label) * report['benchmark']['facts']:.0f})", name) for label, name in steps], drawn)
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return None
    everybody = list(dict.fromkeys((arm["model"], arm["arm"], lang) for *_, drawn in panels for arm, lang, _ in drawn))
    figure = Figure(figsize=(3.9 * max(2, len(panels)), 4.2 + 0.11 * len(everybody)))
    figure.suptitle("Exact match against what a memory holds and keeps (bars: 95% bootstrap over conversations)")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (what, level, steps, drawn) in zip(axes, panels):
        for arm, lang, points in drawn:
            index = everybody.index((arm["model"], arm["arm"], lang))  # the same colour in every panel
            style = line_style(index)
            ax.errorbar(list(points), [cell["em"] for cell in points.values()], error_bars(points.values()), marker=MARKERS[index % len(MARKERS)],
                        markersize=4, linewidth=1, capsize=2, label=f"{arm['model']}, {arm_text(arm)}, {LANGUAGES[lang]}", **style)
            if steps is None and lang in arm["kv_bytes"]:
                ax.axvline(arm["kv_bytes"][lang], color=style["color"], linewidth=1, linestyle=":")
        em_axis(ax)
        if steps is None:
            ax.set_xscale("log")
        else:
            ax.set_xticks(range(len(steps)), [label for label, _ in steps])
            ax.set_xlim(-0.4, len(steps) - 0.6)
        ax.set_xlabel(what)
        ax.set_title(f"level {level} (n = {span([cell['n'] for *_, points in drawn for cell in points.values()])})")
    shared_legend(figure, axes, key=None, ncols=2, fontsize=8)
    return figure


def curve_points(arm, lang, level, steps):
    """{place along the curve: cell}, for the steps that the arm ran."""
    cells = {place: arm["conditions"].get(name, {}).get(str(level), {}).get(lang) for place, (_, name) in enumerate(steps)}
    return {place: cell for place, cell in cells.items() if cell}


def em_by_scale(report):
    """Exact match, and the share of answers that are empty or stuck, against |dW| / |W_down|: the memory and noise, each times a factor."""
    lines = {(arm["model"], arm["arm"], lang): scaled_lines(arm, lang) for arm, lang in panels_of(report)}
    panels = panels_of(report, lambda arm, lang: max(map(len, lines[arm["model"], arm["arm"], lang].values())) > 1)
    if not panels:
        return None
    figure, axes = grid(panels, 5.2, [2.8] * len(panels), "Level 1 against the size of the update, mean over the TTT layers\n(bars: 95% bootstrap over conversations)")
    for ax, (arm, lang) in zip(axes, panels):
        drawn = lines[arm["model"], arm["arm"], lang]
        scale_panel(ax, drawn)
        ax.set_title(panel_title(arm, lang, f"n = {span([cell['n'] for cells in drawn.values() for cell in cells])}"))
    shared_legend(figure, axes, key=None, ncols=2)
    return figure


def scale_panel(ax, drawn):
    """One panel of em_by_scale; drawn: {what is scaled: cells by growing size}, a cell with update_norm, em, em_ci and degenerate."""
    for index, (what, cells) in enumerate(drawn.items()):
        sizes, style = [cell["update_norm"] for cell in cells], {"color": COLORS[index], "marker": MARKERS[index], "markersize": 4, "linewidth": 1}
        ax.errorbar(sizes, [cell["em"] for cell in cells], error_bars(cells), capsize=2, label=f"{what}: right", **style)
        ax.plot(sizes, [cell["degenerate"] for cell in cells], linestyle=":", label=f"{what}: empty or stuck", **style)
    em_axis(ax)
    ax.set_ylabel("share of answers")
    ax.set_xscale("log")
    ax.set_xlabel("|dW| / |W_down|")


def scaled_lines(arm, lang):
    """{what is scaled: cells of level 1 by growing size}."""
    cells = {what: [cell for name in names for cell in [arm["conditions"].get(name, {}).get("1", {}).get(lang)] if cell] for what, names in SCALED}
    return {what: sorted(found, key=lambda cell: cell["update_norm"]) for what, found in cells.items()}


def em_by_training(report):
    """Exact match of the memory against conversations seen in training, a line per training and language: an arm and its snapshots."""
    lines = {}
    for arm in report["arms"]:
        for lang, cell in arm["conditions"].get("B_memory", {}).get("1", {}).items():
            if arm["conversations_seen"]:
                lines.setdefault((arm["model"], arm["snapshot_of"] or arm["arm"], lang), {})[arm["conversations_seen"]] = cell
    lines = {key: dict(sorted(points.items())) for key, points in sorted(lines.items()) if len(points) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 4.6))
    figure.suptitle("Exact match from memory against training, level 1\n(bars: 95% bootstrap over conversations)")
    ax = figure.subplots()
    for index, ((model, name, lang), points) in enumerate(lines.items()):
        ax.errorbar(list(points), [cell["em"] for cell in points.values()], error_bars(points.values()), marker=MARKERS[index % len(MARKERS)], markersize=4,
                    linewidth=1, capsize=2, label=f"{model}, {name}, {LANGUAGES[lang]} (n = {span([cell['n'] for cell in points.values()])})", **line_style(index))
    em_axis(ax)
    ax.set_xscale("log")
    seen = [place for points in lines.values() for place in points]
    steps = [step * 10 ** power for power in range(9) for step in (1, 2, 5)]
    steps = steps[max(0, bisect(steps, min(seen)) - 1):bisect(steps, max(seen)) + 1]
    ax.set_xticks(steps, [f"{step:,}" for step in steps])
    ax.minorticks_off()
    ax.set_xlabel("conversations seen in training, of all its languages\n(a line's last point: the finished arm; the others: within its schedule)")
    shared_legend(figure, [ax], key=None, ncols=1, fontsize=8)
    return figure


def kept_by_size(report):
    """Share of the ceiling that memory keeps on level 1 against the base's parameters, a point per arm and language; the largest base that was
    run with random weights alone has its place and no point."""
    points = [(arm, lang, cell) for arm in report["arms"] if arm["base_parameters"] for lang, cell in arm["ratios"].get("memory_efficiency_ratio", {}).get("1", {}).items()
              if cell["value"] is not None]
    sizes = sorted({arm["base_parameters"] for arm, *_ in points})
    if len(sizes) < 2:
        return None
    figure = Figure(figsize=(8.2, 4.4 + 0.11 * len(points)))
    figure.suptitle("Share of the ceiling that memory keeps, level 1, by size of the base\n(bars: 95% bootstrap over conversations; hollow: against A_context, no A_tuned ran)")
    ax = figure.subplots()
    for index, (arm, lang, cell) in enumerate(points):
        beside = [other for other in points if other[0]["base_parameters"] == arm["base_parameters"]]
        place = arm["base_parameters"] * 1.04 ** (beside.index((arm, lang, cell)) - (len(beside) - 1) / 2)  # a little apart, or they would cover each other
        style = line_style(index)
        mark = MARKERS[(index + index // len(COLORS)) % len(MARKERS)]  # no two points share colour and marker
        ax.errorbar(place, cell["value"], error_bars([{"em": cell["value"], "em_ci": cell["ci"]}]), marker=mark, markersize=5, capsize=2,
                    color=style["color"], linestyle="none", markerfacecolor=style["color"] if cell["A_tuned_run"] else "none",
                    label=f"{arm['model']}, {arm_text(arm)}{'' if arm['frozen'] else ' (not frozen)'}, {LANGUAGES[lang]}")
    for name, parameters in list(report["unscored"].items())[-1:]:
        ax.axvline(parameters, color="0.6", linewidth=1, linestyle=":")
        ax.text(parameters, 0.5, f"{name}: not scored", rotation=90, ha="right", va="center", fontsize=8, color="0.4")
        sizes.append(parameters)
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size / 1e9:.2g}B" if size >= 1e9 else f"{size / 1e6:.0f}M" for size in sizes])
    ax.minorticks_off()
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("EM(B_memory) / max(EM(A_context), EM(A_tuned))")
    ax.set_xlabel("parameters of the base")
    shared_legend(figure, [ax], key=None, ncols=2, fontsize=8)
    return figure


def training_curve(curves):
    """Loss of the answers (without what aids add to it) and token accuracy per update; a running mean where a log is long."""
    if not curves:
        return None
    figure = Figure(figsize=(9.6, 3.4 + 0.2 * len(curves)))
    figure.suptitle("Training")
    for ax, field, label in zip(figure.subplots(1, 2), ("loss", "token_accuracy"), ("loss", "token accuracy")):
        for index, (name, rows) in enumerate(curves.items()):
            updates = np.array([row["update"] for row in rows])
            values = np.array([row.get("answers", row[field]) if field == "loss" else row[field] for row in rows], dtype=float)
            style = line_style(index)
            width = max(1, len(rows) // 50)
            if width > 1:
                ax.plot(updates, values, color=style["color"], linewidth=0.6, alpha=0.25)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            ax.plot(updates[width - 1:], smooth, linewidth=1.4, label=f"{name} ({updates[-1]} updates)", **style)
        noisy = any(len(rows) >= 100 for rows in curves.values())
        ax.set_xlabel("update (thick: running mean)" if noisy else "update")
        ax.set_ylabel(label)
    figure.axes[1].set_ylim(-0.03, 1.03)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=1 if len(curves) < 4 else 2)
    return figure
