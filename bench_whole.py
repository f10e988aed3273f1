"""The part `whole` of bench.py: the experiment itself, and what the public attempt's way would take for it."""
from __future__ import annotations

import benchmark_file
from conditions import CONDITIONS, Texts, answer, plan, text_length
from public_way import NEW, PROMPT

WHOLE = ("A_context", "B_memory", "C_nothing", "D_distractor")


def whole(bench) -> None:
    """The experiment itself, English: A_context, B_memory and C_nothing on every level and D_distractor, in the batches of run_experiment.py,
    without early stops; and what the public way would take for it, by its own times of this run."""
    benchmark = benchmark_file.load_benchmark(bench.benchmark)
    texts = Texts(benchmark, bench.loaded.tokenizer)
    samples = benchmark_file.select_samples(benchmark, benchmark_file.LEVELS, ("en",), bench.sizes.limit)
    seconds = asked = public = 0
    with bench.attached() as ttt:
        for name in WHOLE:
            condition, jobs = CONDITIONS[name], plan([CONDITIONS[name]], samples, set(), texts, bench.sizes.probes)
            count, lengths = sum(job.count for job in jobs), [text_length(condition, sample, texts) for job in jobs for sample in job.samples]
            answer(bench.loaded, ttt, jobs[0], texts, NEW, early_stop=False)  # warm-up
            took, peak = bench.clock(lambda: [answer(bench.loaded, ttt, job, texts, NEW, early_stop=False) for job in jobs])
            work = count * bench.cost.answer(PROMPT, NEW) + sum(bench.cost.forward(length, predicted=0) for length in lengths)  # questions taken as PROMPT tokens
            bench.keep("whole", f"{name}, {count} questions", "memory" if condition.written else "base", took, 1.0, sum(lengths) + count * (PROMPT + NEW), work, 0.0, peak)
            seconds, asked = seconds + took, asked + count
            estimate = public_seconds(bench, count, lengths if condition.written else [])
            public = None if public is None or estimate is None else public + estimate
    bench.facts |= {"whole_seconds": seconds, "whole_questions": asked, "whole_public_seconds_estimated": public}
    print(f"whole   {seconds:.1f} s for {asked:,} questions about {len(samples)} conversations; " + (
        f"the public way by an estimate {public:,.0f} s (x{public / seconds:.0f}): its measured seconds a question, and a written text's by its length"
        if public else "no estimate of the public way, which needs the parts probe and write"))


def public_seconds(bench, questions: int, lengths: list[int]) -> float | None:
    """What the public way would take for so many questions and for writing texts of these lengths, one after the other; None where this run did
    not time it. A question counts as one of PROMPT tokens, also behind a text in the prompt, and a text by the line through the shortest and
    the longest that were timed."""
    timed = {part: [line for line in bench.lines if line.part == part and line.way.startswith("public")] for part in ("probe", "write")}
    if not timed["probe"] or not timed["write"]:
        return None
    points = sorted((line.tokens_per_s * line.seconds, line.seconds) for line in timed["write"])
    (short, least), (long, most) = points[0], points[-1]
    slope = (most - least) / (long - short) if long > short else least / short
    return questions * timed["probe"][0].seconds + sum(max(0.0, least + slope * (length - short)) for length in lengths)
