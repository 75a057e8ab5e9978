"""The published results of the third experiment as tables; needs neither torch nor the service.

Only seeds that every arm has are compared, and nothing is concluded before the planned number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learning.chains.summary import (
    area_along,
    between,
    differences,
    load,
    markdown_table,
    mean_of,
    paired,
    state,
    still_rising,
    whole_seeds,
)
from benchmarks.learning.summary import Estimate

PUBLISHED = Path(__file__).resolve().parents[1] / "results-3"
ARM_NAMES = ("random", "grape", "steps", "local", "rsr", "all", "grape-again", "random-again")
BEGIN = "<!-- table of the third experiment: python -m benchmarks.learning --table -->"
END = "<!-- end of table of the third experiment -->"
STATE_BEGIN = "<!-- state of the third experiment: python -m benchmarks.learning --table -->"
STATE_END = "<!-- end of state of the third experiment -->"

Result = dict[str, Any]
PRIMARY = ("grape", "random", "end of RL")
MEASURES: dict[str, Callable[[Result], float]] = {
    "after SFT": lambda result: float(result["after_sft"]["accuracy"]),
    "end of RL": lambda result: float(result["rl"]["along"][-1]["accuracy"]),
    "along RL": lambda result: area_along(result["after_sft"]["accuracy"], result["rl"]["along"]),
}
"""Accuracies in which arms are compared."""
PAIRS = [
    *((name, "random") for name in ("grape", "steps", "local", "rsr", "all")),
    *((name, "grape") for name in ("steps", "local", "rsr")),
    ("grape-again", "grape"),
    ("random-again", "random"),
    ("grape-again", "random-again"),
]


def tables(rates: list[Result], starts: list[Result], results: list[Result]) -> str:
    """Markdown of everything that is reported."""
    whole = whole_seeds(results, ARM_NAMES)
    counted = [result for result in results if result["seed"] in whole]
    parts = [_rates(rates), _starts(starts), _figures(counted)]
    if counted:
        parts.append(differences(paired(counted, PAIRS, MEASURES), PRIMARY, list(MEASURES)))
    left_out = len(results) - len(counted)
    if left_out:
        parts.append([f"Left out: {left_out} of seeds that not all arms have yet."])
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _rates(rates: list[Result]) -> list[str]:
    if not rates:
        return []
    best = min(rates, key=lambda one: one["held_out"])
    cells = [f"**{one['held_out']:.4f}**" if one is best else f"{one['held_out']:.4f}" for one in rates]
    head = ["held-out loss of the pilot, one at random", *(f"{one['rate']:g}" for one in rates)]
    return markdown_table(head, [["", *cells]])


def _starts(starts: list[Result]) -> list[str]:
    """Per seed: the target, how often each teacher was right, and whose responses each method keeps at first."""
    if not starts:
        return []
    names, methods = list(starts[0]["right"]), list(starts[0]["kept"])
    rows = []
    for one in starts:
        rights = " / ".join(f"{one['right'][name]:.0%}" for name in names)
        shares = [" / ".join(f"{one['kept'][method]['shares'][name]:.0%}" for name in names) for method in methods]
        same = " / ".join(f"{one['same_as_grape'][method]:.0%}" for method in methods[1:])
        skills = [f"{100 * one['skill'][key]:.1f}" for key in ("accuracy", "pass_at_8")]
        rows.append([one["seed"], *skills, rights, *shares, same])
    head = ["seed", "target", "pass@8", "samples right", *(f"kept by {method}" for method in methods), "same as grape"]
    order = f"Shares in the order {', '.join(names)}; same as grape: {', '.join(methods[1:])}."
    return [*markdown_table(head, rows), "", order]


def _figures(results: list[Result]) -> list[str]:
    rows = []
    for name in ARM_NAMES:
        runs = [result for result in results if result["arm"] == name]
        if not runs:
            continue
        family = [
            sum(one["shares"][who] for who in one["shares"] if who.startswith("family"))
            for run in runs
            for one in run["kept"]
        ]
        ends = [run["rl"]["along"][-1] for run in runs]
        cells = [Estimate.of([of(run) for run in runs]) for of in MEASURES.values()]
        cells.append(Estimate.of([run["after_sft"]["pass_at_8"] for run in runs]))
        rising = sum(still_rising(run["rl"]["rewards"]) for run in runs) / len(runs)
        rows.append(
            [
                name,
                *cells,
                mean_of(run["held_out"] for run in runs),
                mean_of(one["drift"] for one in ends),
                f"{rising:+.3f}",
                mean_of(one["tokens"] for run in runs for one in run["kept"]),
                mean_of(family),
            ]
        )
    head = ["arm", *MEASURES, "pass@8 after SFT", "held-out loss after SFT", "drift", "reward still rising"]
    return markdown_table([*head, "tokens a response kept", "share of the target's family"], rows)


def renew_page(page: Path, folder: Path = PUBLISHED) -> None:
    """The state and the tables of the third experiment between their marks of a page."""
    rates, starts, results = load(folder, ARM_NAMES)
    text = between(page.read_text(), STATE_BEGIN, STATE_END, state(results, ARM_NAMES), page)
    page.write_text(between(text, BEGIN, END, tables(rates, starts, results), page))
