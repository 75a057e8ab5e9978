"""Results of the arms as a table and a plot, with 95% intervals over the seeds and differences paired by seed."""

from __future__ import annotations

import html
import math
import statistics
from dataclasses import dataclass
from typing import Any

REFERENCE = "random+uniform"
"""The arm that the others are compared with: what a team has that chooses nothing."""
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t by number of seeds."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and half the width of its 95% interval; nan for one seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        number = len(values)
        if number < 2:
            return cls(values[0] if values else math.nan, math.nan)
        spread = statistics.stdev(values) / number**0.5
        return cls(statistics.fmean(values), T_975.get(number, 2.0) * spread)

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"

    @property
    def signed(self) -> str:
        """With its sign, and a mark where the interval leaves out 0."""
        if math.isnan(self.mean):
            return ""
        clear = not math.isnan(self.half_width) and abs(self.mean) > self.half_width
        return (
            f"{100 * self.mean:+.1f}"
            + ("" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}")
            + (" *" if clear else "")
        )


def by_arm(results: list[Result]) -> dict[str, list[Result]]:
    """Results of each arm, in the order in which they come."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def paired(runs: list[Result], reference: list[Result], stage: str) -> Estimate:
    """Difference in accuracy to the reference arm, over the seeds that both have."""
    others = {run["seed"]: run[stage]["accuracy"] for run in reference}
    return Estimate.of([run[stage]["accuracy"] - others[run["seed"]] for run in runs if run["seed"] in others])


def table(results: list[Result], start: dict[str, dict[str, float]]) -> str:
    """A Markdown table, in percent: accuracy and pass@8 after SFT and RL, differences paired by seed, and what the
    weights did to SFT."""
    arms = by_arm(results)
    reference = arms.get(REFERENCE, [])
    has_pass = any("pass_at_8" in run["after_rl"] for run in results)
    before = start["target"]
    lines = [f"Before training: {_percent(before)} of the test problems.", ""]
    head = ["selection", "weights", "seeds", "rows", "ESS", "gradient norm", "after SFT", "after RL"]
    head += ["pass@8 after SFT", "pass@8 after RL"] if has_pass else []
    head += ["SFT - random", "RL - random"] if reference else []
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for runs in arms.values():
        first = runs[0]
        cells = [first["select"], first["weights"], str(len(runs)), f"{statistics.fmean(r['rows'] for r in runs):.0f}"]
        cells.append(f"{statistics.fmean(run['ess'] for run in runs):.2f}")
        cells.append(f"{statistics.fmean(run['grad_norm'] for run in runs):.3g}")
        for key in ("accuracy", "pass_at_8") if has_pass else ("accuracy",):
            cells += [str(Estimate.of([run[stage][key] for run in runs])) for stage in ("after_sft", "after_rl")]
        if reference:
            same = runs is reference
            cells += ["" if same else paired(runs, reference, stage).signed for stage in ("after_sft", "after_rl")]
        lines.append(f"| {' | '.join(cells)} |")
    if reference:
        comparisons = 2 * (len(arms) - 1)
        lines += [
            "",
            "Differences are to random selection with uniform weights, paired by seed, with 95% intervals (Student's "
            f"t); * marks intervals that leave out 0. There are {comparisons} comparisons: about "
            f"{0.05 * comparisons:.1f} of them would be marked if no arm differed.",
        ]
    return "\n".join(lines) + "\n"


def _percent(skill: dict[str, float]) -> str:
    text = f"{100 * skill['accuracy']:.1f}%"
    return text + (f" (pass@8 {100 * skill['pass_at_8']:.1f}%)" if "pass_at_8" in skill else "")


def plot(results: list[Result], start: dict[str, dict[str, float]]) -> str:
    """An SVG: for each arm its accuracy after SFT (open) and after RL (full) with intervals, and its rewards in RL."""
    arms = by_arm(results)
    left, width, row, curve = 190, 460, 34, 150
    height = row * len(arms) + 60
    total = left + width + curve + 50
    top = max([reward for run in results for reward in run["rl_rewards"]], default=1.0) or 1.0

    def x(share: float) -> float:
        return left + width * min(max(share, 0.0), 1.0)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
    ]
    for percent in range(0, 101, 20):
        at = x(percent / 100)
        parts.append(f'<line x1="{at:.1f}" y1="20" x2="{at:.1f}" y2="{height - 36}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 20}" text-anchor="middle" fill="#555">{percent}%</text>')
    at = x(start["target"]["accuracy"])
    parts.append(f'<line x1="{at:.1f}" y1="20" x2="{at:.1f}" y2="{height - 36}" stroke="#888" stroke-dasharray="4 3"/>')
    for number, (name, runs) in enumerate(arms.items()):
        middle = 36 + row * number
        parts.append(f'<text x="{left - 12}" y="{middle + 5}" text-anchor="end">{html.escape(name)}</text>')
        for key, shift, fill in (("after_sft", -6, "white"), ("after_rl", 6, "#2a6f97")):
            estimate = Estimate.of([run[key]["accuracy"] for run in runs])
            y = middle + shift
            if not math.isnan(estimate.half_width):
                low, high = x(estimate.mean - estimate.half_width), x(estimate.mean + estimate.half_width)
                parts.append(f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="#2a6f97"/>')
            parts.append(f'<circle cx="{x(estimate.mean):.1f}" cy="{y}" r="4" fill="{fill}" stroke="#2a6f97"/>')
        rewards = mean_curve([run["rl_rewards"] for run in runs])
        points = [
            f"{left + width + 30 + curve * step / max(1, len(rewards) - 1):.1f},{middle + 12 - 24 * reward / top:.1f}"
            for step, reward in enumerate(rewards)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#9b2226"/>')
    legend = "open: after SFT, full: after RL, dashed: before; right: mean reward over the steps of RL"
    parts.append(f'<text x="{left}" y="{height - 4}" fill="#555">{legend}</text>')
    return "\n".join([*parts, "</svg>\n"])


def mean_curve(curves: list[list[float]]) -> list[float]:
    """Mean over the seeds, step by step, as long as all have the step."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]
