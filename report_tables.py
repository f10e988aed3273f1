"""The report as tables: the marked block in RESULTS.md and the text on the terminal."""
from results_files import SCALES, ResultsError, condition_order, read_text, shown_arms

LANGUAGES = {"en": "English", "zh": "Chinese"}
LEVELS = ("1", "2", "3")
ALL = "all"  # stands for a level where a ratio is told over all of them
UNFAIR = "†"  # marks a ratio whose denominator is A_context because A_tuned did not run
MEANINGS = {
    "A_context": "EM of the base as it is, reading the conversation in its prompt",
    "A_distractor": "the same with the unrelated text in the prompt too",
    "A_tuned": "fair ceiling: the base with LoRA trained to answer from the conversation in its prompt",
    "B_memory": "EM after the conversation was written to memory and dropped: the experiment",
    "C_nothing": "EM without conversation and memory: guessing",
    "B_swapped": "EM with another conversation's memory: must fall to C_nothing",
    "D_distractor": "EM when unrelated text was written after the conversation",
    "B_merged_2": "EM with two conversations in one memory",
    "B_merged_4": "EM with four conversations in one memory",
    "B_merged_8": "EM with eight conversations in one memory",
    "P_paper": "EM with memory and the conversation still in the prompt, as the paper evaluates",
    "N_noise": "EM with a random update of the memory's norm",
    "A_foreign": "A_context with another conversation's memory attached: what a memory costs what it does not know",
    "D_512": "EM when the first 512 tokens of unrelated text were written after the conversation",
    "D_1024": "the same with 1,024 tokens",
    "D_2048": "the same with 2,048 tokens",
    "B_rank_1": "EM with each layer's update cut to rank 1",
    "B_rank_4": "the same at rank 4",
    "B_rank_16": "the same at rank 16",
    "B_rank_64": "the same at rank 64",
    "B_half": "EM with the memory kept in half precision (bfloat16)",
    **{f"B_scale_{factor}": f"EM with each layer's update times {factor}" for factor in SCALES},
    **{f"N_scale_{factor}": f"EM with a random update of {factor} times the memory's norm" for factor in SCALES},
    "memory_efficiency_ratio": "EM(B_memory) / max(EM(A_context), EM(A_tuned)): the share that memory keeps",
    "ratio_vs_A_context": "EM(B_memory) / EM(A_context)",
    "lift_over_no_memory": "EM(B_memory) - EM(C_nothing)",
    "distractor_decay": "(EM(D_distractor) - EM(B_memory)) / EM(B_memory) on level 3: loss to later text",
    "merged_4_ratio": "EM(B_merged_4) / EM(B_memory): the share kept with four conversations in one memory",
    "names_and_codes_ratio": "memory_efficiency_ratio where the answer is a name of the benchmark's people (none of them in the bank) or a code such as BY-795",
    "swapped_lift": "EM(B_swapped) - EM(C_nothing): what a wrong memory seems to know, by luck or worse",
    "foreign_cost": "EM(A_foreign) - EM(A_context): what a memory costs questions about a text it never saw",
}
HEADLINE = (("A_context", "1"), ("A_tuned", "1"), ("B_memory", "1"), ("C_nothing", "1"), ("B_swapped", "1"), ("B_memory", "3"),
            ("D_distractor", "3"))  # the columns of the table that comes first
READING = "EM: share of probes answered exactly after normalisation. [low, high]: 95% bootstrap over conversations."
TEST_TEXT = "McNemar's exact test, probe by probe (taken as independent); of several seeds the largest p"
ALIKE_TEXT = ("An interval without width: all conversations scored alike, so resampling shows no spread; with N "
              "conversations the true share may still be about 3/N away.")
UNFAIR_TEXT = f"{UNFAIR} fair ceiling not run: A_tuned is missing, so the denominator is A_context alone."


# --- cells ----------------------------------------------------------------------------------------------------

def with_interval(value, ends):
    if value is None:
        return "undefined"
    return f"{value:.3f} " + (f"[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "[no interval]")


def find(arm, table, name, level, lang):
    return arm[table].get(name, {}).get(level, {}).get(lang)


def em_text(arm, name, level, lang):
    cell = find(arm, "conditions", name, level, lang)
    return with_interval(cell["em"], cell["em_ci"]) if cell else ""


def ratio_text(arm, name, level, lang):
    cell = arm["pooled_ratios"].get(name, {}).get(lang) if level == ALL else find(arm, "ratios", name, level, lang)
    if not cell:
        return ""
    return with_interval(cell["value"], cell["ci"]) + (f" {UNFAIR}" if cell.get("A_tuned_run") is False else "")


def span_text(values):
    """One number, or the range where the conditions differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def n_text(arm, level, lang):
    """Probes (conversations) of one level, over the conditions."""
    cells = [levels[level][lang] for levels in arm["conditions"].values() if lang in levels.get(level, {})]
    if not cells:
        return ""
    return f"{span_text([cell['n'] for cell in cells])} ({span_text([cell['samples'] for cell in cells])})"


def p_text(arm, name, level, lang):
    cell = find(arm, "tests", name, level, lang)
    if not cell:
        return ""
    return "p < 0.0001" if cell["p"] < 0.0001 else f"p = {cell['p']:.4f}"


def test_name(name):
    return name.replace("_vs_", " against ")


def arm_text(arm):
    return arm["arm"] + ("" if arm["complete"] else " (partial)")


def kind_text(arm):
    seeds = [seed for seed in arm["seeds"] if seed is not None]
    trained = "W_down of its TTT layers trained too" if arm.get("w_down") else "joint (base trained too)"
    parts = ["frozen base" if arm["frozen"] else trained, f"objective {arm['objective']}"]
    return ", ".join(parts + ([f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if seeds else []))


def langs_of(arms):
    return sorted({lang for arm in arms for by_level in arm["conditions"].values()
                   for by_lang in by_level.values() for lang in by_lang})


def names_of(arms, table, lang):
    """Names in a table that have a cell in this language: conditions and ratios in their order, tests as they come."""
    names = dict.fromkeys(name for arm in arms for name, by_level in arm[table].items()
                          if any(lang in by_lang for by_lang in by_level.values()))
    order = {"conditions": condition_order, "ratios": list(MEANINGS).index}
    return sorted(names, key=order[table]) if table in order else list(names)


def notes_of(arms):
    """What a reader must know about single cells."""
    ratios = [(arm, name, level, lang, cell) for arm in arms for name, by_level in arm["ratios"].items()
              for level, by_lang in by_level.items() for lang, cell in by_lang.items()]
    ends = [cell["em_ci"] for arm in arms for by_level in arm["conditions"].values()
            for by_lang in by_level.values() for cell in by_lang.values()]
    lines = [UNFAIR_TEXT] if any(cell.get("A_tuned_run") is False for *_, cell in ratios) else []
    lines += [ALIKE_TEXT] if any(pair and pair[0] == pair[1] for pair in ends) else []
    lines += [f"{arm['arm']} on {arm['model']}: {', '.join(sorted(arm['borrowed']))} are the rows of "
              f"{' and '.join(sorted({name for names in arm['borrowed'].values() for name in names}))}; the base's own answers do not depend on the arm."
              for arm in arms if arm["borrowed"]]
    if not all(arm["complete"] for arm in arms):
        lines.append("(partial): unfinished runs; the missing probes may change the numbers.")
    return lines + [f"{arm['arm']} on {arm['model']}, {name}, level {level}, {LANGUAGES[lang]}: {cell['note']}."
                    for arm, name, level, lang, cell in ratios if "note" in cell]


# --- RESULTS.md -----------------------------------------------------------------------------------------------

def marks_of(block):
    """The lines between which a block's tables stand."""
    return f"<!-- {block}:begin -->", f"<!-- {block}:end -->"


def around_block(path, block="report"):
    """The text before and after the marked block, marks included; both marks stand alone on a line, once, in order."""
    begin, end = marks_of(block)
    mend = f"it needs the two lines {begin} and {end}, once each and in this order; the tables go between them"
    lines = read_text(path, mend).split("\n")
    marks = [[number for number, line in enumerate(lines) if line.strip() == mark] for mark in (begin, end)]
    if [len(found) for found in marks] != [1, 1] or marks[0] > marks[1]:
        raise ResultsError(f"{path}: marks missing, doubled or out of order; {mend}")
    return "\n".join(lines[:marks[0][0] + 1]) + "\n", "\n".join(lines[marks[1][0]:])


def markdown(report):
    """The block's content: one table of all arms, a table per arm and language, notes, the paired tests and a line per run."""
    arms, bench = shown_arms(report["arms"]), report["benchmark"]
    lines = [f"Benchmark {bench['file']} (SHA-256 {bench['sha256'][:12]}). {READING} n: probes over all seeds "
             "(conversations). Contains, F1 and breakdowns are in report.json."]
    if bench["unchanged"] is False:
        lines += ["", changed_text(bench)]
    lines += ["", *headline(arms)]
    for arm in arms:
        for lang in langs_of([arm]):
            lines += ["", f"**{arm_text(arm)} on {arm['model']}, {LANGUAGES[lang]}** ({kind_text(arm)})", "", *arm_table(arm, lang), *example_lines(arm, lang, report["bootstrap"]["seed"])]
    lines += [""] * bool(notes_of(arms)) + [f"- {line}" for line in notes_of(arms)]
    tests = [line for arm in arms for line in test_lines(arm)]
    if tests:
        lines += ["", f"Paired tests ({TEST_TEXT}):", "", *tests]
    lines += ["", "Runs:", "", *[run_line(arm, run) for arm in report["arms"] for run in arm["runs"]]]
    return "\n".join(lines) + "\n"


def changed_text(bench):
    return f"The file {bench['file']} has changed since these runs: run them again for numbers on what it is now."


def headline(arms):
    """Exact match of every arm on one line each; intervals and the other levels are in the arm's own table."""
    ratio = "memory_efficiency_ratio"
    rows = [["arm, base, language", *[f"{name} L{level}" for name, level in HEADLINE], f"{ratio} L1"], ["---"] * (len(HEADLINE) + 2)]
    for arm in arms:
        for lang in langs_of([arm]):
            cells = [find(arm, "conditions", name, level, lang) for name, level in HEADLINE]
            rows.append([f"{arm_text(arm)} on {arm['model']}, {LANGUAGES[lang]}", *[f"{cell['em']:.3f}" if cell else "" for cell in cells],
                         ratio_text(arm, ratio, "1", lang)])
    return table_lines(rows)


def table_lines(rows):
    return ["| " + " | ".join([row[0], *[cell or "–" for cell in row[1:]]]) + " |" for row in rows]


def columns_of(arm, lang):
    """(the levels that have answers, and ALL where a ratio is told over several of them; their titles)."""
    levels = [level for level in LEVELS if n_text(arm, level, lang)]
    if len(levels) > 1 and any(lang in by_lang for by_lang in arm["pooled_ratios"].values()):
        levels.append(ALL)
    return levels, ["all levels" if level == ALL else f"level {level}" for level in levels]


def arm_table(arm, lang):
    """Conditions and ratios as rows, levels as columns, and what each row tells."""
    levels, titles = columns_of(arm, lang)
    rows = [["", *titles, "what it tells"], ["---"] * (len(levels) + 2),
            ["n", *[n_text(arm, level, lang) for level in levels], "probes (conversations)"]]
    for table, text in (("conditions", em_text), ("ratios", ratio_text)):
        rows += [[name, *[text(arm, name, level, lang) for level in levels], MEANINGS.get(name, "")]
                 for name in names_of([arm], table, lang)]
    return table_lines(rows)


def example_lines(arm, lang, seed):
    """A few of the arm's answers from memory as a table; nothing for an arm without any."""
    drawn = arm["examples"].get(lang)
    if not drawn:
        return []
    cell = lambda text: text.replace("|", "\\|")
    rows = [["question", "gold", "answer from memory", "right"], ["---"] * 4]
    rows += [[cell(e["question"]), cell(e["gold"]), cell(e["prediction"]), "yes" if e["right"] else "no"] for e in drawn]
    return ["", f"Answers of B_memory on level 1, drawn by seed {seed}:", "", *table_lines(rows)]


def test_lines(arm):
    for lang in langs_of([arm]):
        tests = [f"{test_name(name)} " + ", ".join(
                 f"L{level} {p_text(arm, name, level, lang)}" for level in LEVELS if p_text(arm, name, level, lang))
                 for name in names_of([arm], "tests", lang)]
        if tests:
            yield f"- {arm['arm']} on {arm['model']}, {LANGUAGES[lang]}: {'; '.join(tests)}"


def run_line(arm, run):
    seed = "" if run["seed"] is None else f", seed {run['seed']}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    return (f"- {run['name']}: {arm['arm']} on {arm['model']} ({kind_text(arm | {'seeds': []})}){seed}, commit "
            f"{run['commit']}, {run['device']}, {run['dtype']}, {versions}: `{run['command']}`"
            + ("" if run["complete"] else " (partial)"))


# --- terminal -------------------------------------------------------------------------------------------------

def terminal(report):
    """A table per arm and language, levels as columns, and one line on what each row means."""
    arms, bench = shown_arms(report["arms"]), report["benchmark"]
    blocks = [arm_block(arm, lang) for arm in arms for lang in langs_of([arm])]
    shown = [name for lang in langs_of(arms) for table in ("conditions", "ratios")
             for name in names_of(arms, table, lang)]
    meanings = [f"  {name:<24} {MEANINGS[name]}" for name in dict.fromkeys(shown) if name in MEANINGS]
    p_line = [f"  {'X against Y':<24} {TEST_TEXT}"] if any(arm["tests"] for arm in arms) else []
    changed = [changed_text(bench)] if bench["unchanged"] is False else []
    return "\n".join([*blocks, "What the rows mean", f"  {READING}", *meanings, *p_line, *notes_of(arms), *changed])


def arm_block(arm, lang):
    levels, titles = columns_of(arm, lang)
    rows = [("", titles),
            ("probes (conversations)", [n_text(arm, level, lang) for level in levels])]
    for table, text in (("conditions", em_text), ("ratios", ratio_text), ("tests", p_text)):
        rows += [(test_name(name) if table == "tests" else name, [text(arm, name, level, lang) for level in levels])
                 for name in names_of([arm], table, lang)]
    title = f"{arm_text(arm)} on {arm['model']} ({kind_text(arm)}), {LANGUAGES[lang]}"
    table = ["  " + f"{name:<32}" + "".join(f"{cell or '–':<26}" for cell in cells) for name, cells in rows]
    return "\n".join([title, *[line.rstrip() for line in table], ""])
