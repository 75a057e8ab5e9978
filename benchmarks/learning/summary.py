"""Results of the arms as a table and a plot, with intervals over the seeds."""

from __future__ import annotations

import html
import statistics
from dataclasses import dataclass
from typing import Any

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t by number of seeds."""


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and half the width of its 95% interval; nan for one seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        number = len(values)
        if number < 2:
            return cls(values[0], float("nan"))
        spread = statistics.stdev(values) / number**0.5
        return cls(statistics.fmean(values), T_975.get(number, 2.0) * spread)

    def __str__(self) -> str:
        interval = "" if self.half_width != self.half_width else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"


def by_arm(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of each arm, in the order in which they come."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def table(results: list[dict[str, Any]], start: dict[str, float]) -> str:
    """A Markdown table: accuracy in percent after SFT and after RL, 95% intervals over seeds."""
    lines = [
        f"Before training: {100 * start['target']:.1f}% of the test problems.",
        "",
        "| selection | weights | seeds | rows | ESS | after SFT, % | after RL, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for runs in by_arm(results).values():
        first = runs[0]
        sft, rl = (Estimate.of([run[key] for run in runs]) for key in ("after_sft", "after_rl"))
        ess = statistics.fmean(run["ess"] for run in runs)
        lines.append(
            f"| {first['select']} | {first['weights']} | {len(runs)} | {first['rows']} | {ess:.2f} | {sft} | {rl} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], start: dict[str, float]) -> str:
    """An SVG: for each arm its accuracy after SFT (open) and after RL (full), with intervals."""
    arms = by_arm(results)
    left, width, row = 190, 460, 34
    height = row * len(arms) + 60

    def x(share: float) -> float:
        return left + width * min(max(share, 0.0), 1.0)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{left + width + 30}" height="{height}" fill="white"/>',
    ]
    for percent in range(0, 101, 20):
        at = x(percent / 100)
        parts.append(f'<line x1="{at:.1f}" y1="20" x2="{at:.1f}" y2="{height - 36}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 20}" text-anchor="middle" fill="#555">{percent}%</text>')
    at = x(start["target"])
    parts.append(f'<line x1="{at:.1f}" y1="20" x2="{at:.1f}" y2="{height - 36}" stroke="#888" stroke-dasharray="4 3"/>')
    for number, (name, runs) in enumerate(arms.items()):
        middle = 36 + row * number
        parts.append(f'<text x="{left - 12}" y="{middle + 5}" text-anchor="end">{html.escape(name)}</text>')
        for key, shift, fill in (("after_sft", -6, "white"), ("after_rl", 6, "#2a6f97")):
            estimate = Estimate.of([run[key] for run in runs])
            y = middle + shift
            if estimate.half_width == estimate.half_width:
                low, high = x(estimate.mean - estimate.half_width), x(estimate.mean + estimate.half_width)
                parts.append(f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="#2a6f97"/>')
            parts.append(f'<circle cx="{x(estimate.mean):.1f}" cy="{y}" r="4" fill="{fill}" stroke="#2a6f97"/>')
    parts.append(
        f'<text x="{left}" y="{height - 4}" fill="#555">open: after SFT, full: after RL, dashed: before</text>'
    )
    return "\n".join([*parts, "</svg>\n"])
