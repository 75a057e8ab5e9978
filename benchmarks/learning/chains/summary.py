"""The published results of the second experiment as tables; needs neither torch nor the service.

Only seeds that every arm has are compared, and nothing is concluded before the planned number of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.summary import LEVEL, T_975, Comparison, Estimate, clear_ones

PUBLISHED = Path(__file__).resolve().parents[1] / "results-2"
ARM_NAMES = (
    "uniform",
    "token",
    "sequence",
    "block",
    "online",
    "shuffled",
    "ramp",
    "probability",
    "token-dataset",
    "sequence-dataset",
    "block-dataset",
    "online-sequence",
)
PLANNED_SEEDS = 5
RESOLUTION = 1 / 200
"""One problem of the test: no standard deviation of a comparison is taken to be less."""
TASKS = ("same", "shifted")
BEGIN, END = "<!-- table: python -m benchmarks.learning --table -->", "<!-- end of table of the second experiment -->"
STATE_BEGIN, STATE_END = "<!-- state: python -m benchmarks.learning --table -->", "<!-- end of state -->"

Result = dict[str, Any]


def end(task: str) -> Callable[[Result], float]:
    """Accuracy at the end of RL on a task."""
    return lambda result: float(result[f"rl_{task}"]["along"][-1]["accuracy"])


def area(task: str) -> Callable[[Result], float]:
    """Mean accuracy along RL on a task."""
    return lambda result: area_along(result["after_sft"][task]["accuracy"], result[f"rl_{task}"]["along"])


def area_along(start: float, along: list[Result]) -> float:
    """Mean accuracy along RL, from that of the SFT checkpoint to the end, by the trapezoidal rule."""
    steps = [0, *(one["step"] for one in along)]
    values = [start, *(one["accuracy"] for one in along)]
    pieces = zip(steps, steps[1:], values, values[1:], strict=False)
    return float(sum((b - a) * (x + y) / 2 for a, b, x, y in pieces) / steps[-1])


PRIMARY = ("token", "uniform", "end of RL, same task")
MEASURES: dict[str, Callable[[Result], float]] = {
    "after SFT": lambda result: float(result["after_sft"]["same"]["accuracy"]),
    "end of RL, same task": end("same"),
    "along RL, same task": area("same"),
    "end of RL, shifted task": end("shifted"),
    "along RL, shifted task": area("shifted"),
}
"""Accuracies in which arms are compared with uniform weights."""
FORETELLERS: dict[str, Callable[[Result], float]] = {
    "held-out loss": lambda result: -float(result["held_out"]),
    "pass@8": lambda result: float(result["after_sft"]["same"]["pass_at_8"]),
    "accuracy": lambda result: float(result["after_sft"]["same"]["accuracy"]),
}
"""What is known after SFT of the same task, larger is better; it foretells the end of RL on both."""


def load(
    folder: Path = PUBLISHED, arm_names: Sequence[str] = ARM_NAMES
) -> tuple[list[Result], list[Result], list[Result]]:
    """Rates that were tried, starts of the seeds, results of the arms, in the order of arms and seeds."""
    order = {name: place for place, name in enumerate(arm_names)}
    rates = [json.loads(path.read_text()) for path in folder.glob("rates/*.json")]
    found = [json.loads(path.read_text()) for path in folder.glob("arms/*.json")]
    starts = sorted((one for one in found if "arm" not in one), key=lambda one: one["seed"])
    results = sorted((one for one in found if "arm" in one), key=lambda one: (one["seed"], order[one["arm"]]))
    rates.sort(key=lambda one: (order[one["arm"]], one["rate"]))
    return rates, starts, results


def whole_seeds(results: list[Result], arm_names: Sequence[str] = ARM_NAMES) -> list[int]:
    """Seeds that every arm has."""
    seeds = {result["seed"] for result in results}
    have = {(result["seed"], result["arm"]) for result in results}
    return sorted(seed for seed in seeds if all((seed, name) in have for name in arm_names))


def state(results: list[Result], arm_names: Sequence[str] = ARM_NAMES) -> str:
    """One paragraph: how far an experiment is."""
    whole, planned = whole_seeds(results, arm_names), PLANNED_SEEDS * len(arm_names)
    text = f"{len(results)} of {planned} arms and seeds have run, {len(whole)} of {PLANNED_SEEDS} seeds are whole."
    if len(whole) < PLANNED_SEEDS:
        text += " Nothing is concluded before all are."
    return text + "\n"


def tables(rates: list[Result], starts: list[Result], results: list[Result]) -> str:
    """Markdown of everything that is reported."""
    whole = whole_seeds(results)
    counted = [result for result in results if result["seed"] in whole]
    parts = [_starts(starts), _rates(rates), _figures(counted), _differences(counted), _foretold(counted)]
    left_out = len(results) - len(counted)
    if left_out:
        parts.append([f"Left out: {left_out} of seeds that not all arms have yet."])
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def markdown_table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Its lines; none without rows."""
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)] if rows else []


def _starts(starts: list[Result]) -> list[str]:
    rows = []
    for one in starts:
        skills = [f"{100 * one['skills'][task][key]:.1f}" for task in TASKS for key in ("accuracy", "pass_at_8")]
        share = f"{one['right'] / one['asked']:.0%}"
        ess = [f"{one['weights'][name]['ess_tokens']:.2f}" for name in ("token", "sequence", "block", "probability")]
        shortest, mean, longest = one["tokens_a_row"]
        rows.append([one["seed"], *skills, share, f"{shortest}-{longest} ({mean:.0f})", *ess])
    head = ["seed", "target, same task", "pass@8", "shifted task", "pass@8", "teacher right", "tokens a row"]
    return markdown_table(head + [f"ESS {name}" for name in ("token", "sequence", "block", "probability")], rows)


def _rates(rates: list[Result]) -> list[str]:
    values = sorted({one["rate"] for one in rates})
    rows = []
    for name in ARM_NAMES:
        losses = {one["rate"]: one["held_out"] for one in rates if one["arm"] == name}
        if losses:
            best = min(losses, key=lambda rate: losses[rate])
            cells = [f"{losses[rate]:.4f}" if rate in losses else "" for rate in values]
            rows.append([name, *(f"**{c}**" if r == best else c for r, c in zip(values, cells, strict=True))])
    return markdown_table(["held-out loss of the pilot", *(f"{rate:g}" for rate in values)], rows)


def _figures(results: list[Result]) -> list[str]:
    skills, training = [], []
    for name in ARM_NAMES:
        runs = [result for result in results if result["arm"] == name]
        if not runs:
            continue
        rate = f"{runs[0]['rate']:g}"
        passed = Estimate.of([run["after_sft"]["same"]["pass_at_8"] for run in runs])
        skills.append([name, rate, *(Estimate.of([of(run) for run in runs]) for of in MEASURES.values()), passed])
        cells = [mean_of(run["held_out"] for run in runs), mean_of(run["sft"]["weight"] for run in runs)]
        cells += [
            mean_of(run["sft"]["grad_norm"] for run in runs),
            mean_of(run["sft"]["clipped_steps"] for run in runs),
        ]
        for task in TASKS:
            ends = [run[f"rl_{task}"]["along"][-1] for run in runs]
            cells += [mean_of(one["held_out"] for one in ends), mean_of(one["drift"] for one in ends)]
            cells.append(f"{statistics.fmean(still_rising(run[f'rl_{task}']['rewards']) for run in runs):+.3f}")
        training.append([name, *cells])
    head = ["arm", "held-out loss after SFT", "mean weight", "gradient norm", "steps clipped"]
    for task in TASKS:
        head += [f"held-out loss, {task}", f"drift, {task}", f"reward still rising, {task}"]
    tables = [
        *markdown_table(["arm", "learning rate", *MEASURES, "pass@8 after SFT"], skills),
        "",
        *markdown_table(head, training),
    ]
    explained = (
        "Accuracies in percent. After RL: held-out loss, drift from the SFT checkpoint, both in nats a token, and the "
        f"mean reward of the last {RISING_STEPS} steps less that of the {RISING_STEPS} before."
    )
    return [*tables, "", explained] if skills else []


RISING_STEPS = 30


def still_rising(rewards: list[float]) -> float:
    """Mean reward of the last steps less that of as many before."""
    last, before = rewards[-RISING_STEPS:], rewards[-2 * RISING_STEPS : -RISING_STEPS]
    return statistics.fmean(last) - statistics.fmean(before or last)


def mean_of(values: Iterable[float]) -> str:
    """In three digits."""
    return f"{statistics.fmean(values):.3g}"


def comparisons(results: list[Result]) -> list[Comparison]:
    """Every arm with uniform weights, and token weights with their controls, in every measure, paired by seed."""
    pairs = [(name, "uniform") for name in ARM_NAMES if name != "uniform"]
    pairs += [("token", other) for other in ("shuffled", "ramp", "token-dataset")]
    return paired(results, pairs, MEASURES)


def paired(
    results: list[Result], pairs: list[tuple[str, str]], measures: Mapping[str, Callable[[Result], float]]
) -> list[Comparison]:
    """Pairs of arms in every measure, seed by seed."""
    by = {(result["arm"], result["seed"]): result for result in results}
    seeds = sorted({result["seed"] for result in results})
    return [
        Comparison(arm, other, measure, tuple(of(by[arm, seed]) - of(by[other, seed]) for seed in seeds), RESOLUTION)
        for arm, other in pairs
        for measure, of in measures.items()
    ]


def _differences(results: list[Result]) -> list[str]:
    return differences(comparisons(results), PRIMARY, list(MEASURES)) if results else []


def differences(found: list[Comparison], primary: tuple[str, str, str], measures: list[str]) -> list[str]:
    """Lines of a table of comparisons, the primary one alone and the others corrected together."""
    others = [one for one in found if (one.arm, one.other, one.stage) != primary]
    clear = clear_ones(others)
    rows: list[list[Any]] = []
    for arm, other in dict.fromkeys((one.arm, one.other) for one in found):
        cells = []
        for one in found:
            if (one.arm, one.other) == (arm, other):
                mark = " \\*\\*" if one in clear else " \\*" if one.p < LEVEL else ""
                is_primary = (arm, other, one.stage) == primary
                cells.append(f"**{one.estimate.signed}**" if is_primary else one.estimate.signed + mark)
        rows.append([f"{arm} - {other}", *cells])
    return [
        *markdown_table(["difference", *measures], rows),
        "",
        "In points of accuracy, paired by seed, with 95% intervals (Student's t). Bold: the primary comparison, alone "
        f"and not corrected. Of the {len(others)} others \\* marks intervals that leave out 0 and \\*\\* those "
        "that still do after Holm's correction over all of them. No standard deviation is taken to be less than one of "
        "the 200 test problems.",
    ]


def _foretold(results: list[Result]) -> list[str]:
    rows: list[list[Any]] = []
    seeds = sorted({result["seed"] for result in results})
    for name, of in FORETELLERS.items() if seeds else ():
        cells = []
        for task in TASKS:
            one_seed = [[run for run in results if run["seed"] == seed] for seed in seeds]
            ranks = [rank_correlation([of(run) for run in runs], [end(task)(run) for run in runs]) for runs in one_seed]
            cells.append(f"{statistics.fmean(ranks):.2f}")
            if len(ranks) > 1:
                cells[-1] += f" ± {T_975[len(ranks)] * statistics.stdev(ranks) / len(ranks) ** 0.5:.2f}"
        rows.append([name, *cells])
    head = ["after SFT, rank correlation over the arms with", *(f"end of RL, {task} task" for task in TASKS)]
    return markdown_table(head, rows)


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, with mean ranks for equal values; 0 where one of the two does not vary."""
    a, b = _ranks(first), _ranks(second)
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return statistics.correlation(a, b)


def _ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def renew_page(page: Path, folder: Path = PUBLISHED) -> None:
    """The state and the tables of the second experiment between their marks of a page."""
    rates, starts, results = load(folder)
    text = between(page.read_text(), STATE_BEGIN, STATE_END, state(results), page)
    page.write_text(between(text, BEGIN, END, tables(rates, starts, results), page))


def between(text: str, begin: str, finish: str, content: str, page: Path) -> str:
    """The text of a page with other content between two lines. Raises SystemExit where it lacks them."""
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(finish)
    if not found:
        raise SystemExit(f"{page} lacks the lines {begin} and {finish}")
    return f"{before}{begin}\n{content}{finish}{after}"
