"""Results of the arms as a table and a plot, with 95% intervals over the seeds and differences paired by seed."""

from __future__ import annotations

import html
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCE = "random+uniform"
"""The arm that the others are compared with: what a team has that chooses nothing."""
STAGES = {"after_sft": "SFT", "after_rl": "RL"}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t by number of seeds."""
LEVEL = 0.05
RESOLUTION = 1 / 400
"""One problem of the CPU size's test. A few seeds that agree to the problem do not show that they have less spread."""
BEGIN, END = "<!-- table: python -m benchmarks.learning.run --table -->", "<!-- end of table -->"
"""Between these lines a page holds the table."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and half the width of its 95% interval; nan for one seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: list[float], resolution: float = RESOLUTION) -> Estimate:
        """Of a value for each seed."""
        number = len(values)
        if number < 2:
            return cls(values[0] if values else math.nan, math.nan)
        return cls(statistics.fmean(values), T_975.get(number, 2.0) * standard_error(values, resolution))

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{interval}"

    @property
    def signed(self) -> str:
        """With its sign."""
        if math.isnan(self.mean):
            return ""
        return f"{round(100 * self.mean, 1) + 0.0:+.1f}" + (
            "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        )


@dataclass(frozen=True)
class Comparison:
    """Differences in accuracy of an arm to another, seed by seed."""

    arm: str
    other: str
    stage: str
    differences: tuple[float, ...]
    resolution: float = RESOLUTION  # one problem of the test

    @property
    def estimate(self) -> Estimate:
        """Mean difference and its 95% interval."""
        return Estimate.of(list(self.differences), self.resolution)

    @property
    def p(self) -> float:
        """Two-sided p of a paired t-test; 1 for one seed."""
        number = len(self.differences)
        if number < 2:
            return 1.0
        mean = statistics.fmean(self.differences)
        return two_sided_p(mean / standard_error(list(self.differences), self.resolution), number - 1)


def standard_error(values: list[float], resolution: float) -> float:
    """Of the mean of two values or more, whose standard deviation is taken to be `resolution` at the least."""
    return max(statistics.stdev(values), resolution) / len(values) ** 0.5


def two_sided_p(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / degrees**0.5)
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return 1 - math.sin(angle) * total
    return 1 - 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def whole_seeds(results: list[Result]) -> list[Result]:
    """Results of the seeds that every arm has: while an experiment runs, the others would compare unlike seeds."""
    arms = by_arm(results)
    whole = set.intersection(*({run["seed"] for run in runs} for runs in arms.values())) if arms else set()
    return [result for result in results if result["seed"] in whole]


def comparisons(results: list[Result]) -> list[Comparison]:
    """Every arm with REFERENCE, and every arm with weights with the same selection without, after SFT and after RL."""
    arms = by_arm(results)
    found = []
    for name, runs in arms.items():
        uniform = f"{name.partition('+')[0]}+uniform"
        for other in dict.fromkeys((REFERENCE, uniform)):
            if other == name or other not in arms:
                continue
            for stage in STAGES:
                there = {run["seed"]: run[stage]["accuracy"] for run in arms[other]}
                differences = [run[stage]["accuracy"] - there[run["seed"]] for run in runs if run["seed"] in there]
                found.append(Comparison(name, other, stage, tuple(differences)))
    return found


def clear_ones(found: list[Comparison]) -> set[Comparison]:
    """Those whose difference is not 0 after Holm's correction over all of them, at 5%."""
    clear = set()
    for rank, one in enumerate(sorted(found, key=lambda comparison: comparison.p)):
        if one.p > LEVEL / (len(found) - rank):
            break
        clear.add(one)
    return clear


def write_raw(raw: dict[str, Any], path: Path) -> None:
    """Raw results as JSON, a line for each arm and seed."""
    head = json.dumps({**raw, "results": []}).removesuffix("[]}")
    lines = ",\n".join(json.dumps(result) for result in raw["results"])
    path.write_text(f"{head}[\n{lines}\n]}}\n")


def write_documents(raw: dict[str, Any], folder: Path) -> None:
    """evidence-table.md and evidence.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence-table.md").write_text(table(raw))
    (folder / "evidence.svg").write_text(plot(whole_seeds(raw["results"]), raw["start"]))


def renew_page(raw: dict[str, Any], page: Path, image: Path) -> None:
    """The table between the marks of a page, and the plot."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}, between which the table stands")
    page.write_text(f"{before}{BEGIN}\n{table(raw)}{END}{after}")
    image.write_text(plot(whole_seeds(raw["results"]), raw["start"]))


def by_arm(results: list[Result]) -> dict[str, list[Result]]:
    """Results of each arm, in the order in which they come."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def table(raw: dict[str, Any]) -> str:
    """Markdown, in percent: what the arms start from, accuracy and pass@8 of each arm after SFT and RL with what the
    weights did to SFT, and the differences."""
    results = whole_seeds(raw["results"])
    lines = [*_start(raw), *_figures(by_arm(results)), *_differences(results)]
    left_out = len(raw["results"]) - len(results)
    if left_out:
        lines += ["", f"Left out: {left_out} of a seed that not all arms have yet."]
    return "\n".join(lines) + "\n"


def _start(raw: dict[str, Any]) -> list[str]:
    lines = ["| | accuracy | pass@8 | candidates | of them right |", "|---|---|---|---|---|"]
    for name, skill in raw["start"].items():
        counts = raw.get("pool", {}).get(name, {})
        right = f"{counts['right'] / counts['candidates']:.0%}" if counts else ""
        passed = f"{100 * skill['pass_at_8']:.1f}" if "pass_at_8" in skill else ""
        label = "target, before training" if name == "target" else name
        lines.append(
            f"| {label} | {100 * skill['accuracy']:.1f} | {passed} | {counts.get('candidates', '')} | {right} |"
        )
    return [*lines, ""]


def _figures(arms: dict[str, list[Result]]) -> list[str]:
    has_pass = any("pass_at_8" in run["after_rl"] for runs in arms.values() for run in runs)
    head = ["selection", "weights", "seeds", "rows", "ESS", "gradient norm", "after SFT", "after RL"]
    head += ["pass@8 after SFT", "pass@8 after RL"] if has_pass else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for runs in arms.values():
        first = runs[0]
        cells = [first["select"], first["weights"], str(len(runs)), f"{statistics.fmean(r['rows'] for r in runs):.0f}"]
        cells.append(f"{statistics.fmean(run['ess'] for run in runs):.2f}")
        cells.append(f"{statistics.fmean(run['grad_norm'] for run in runs):.3g}")
        for key in ("accuracy", "pass_at_8") if has_pass else ("accuracy",):
            cells += [str(Estimate.of([run[stage][key] for run in runs])) for stage in STAGES]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _differences(results: list[Result]) -> list[str]:
    found = comparisons(results)
    if not found:
        return []
    clear = clear_ones(found)
    head = ["arm", "SFT - random", "RL - random", "SFT - same selection, uniform", "RL - same selection, uniform"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys(one.arm for one in found):
        cells = {(one.other == REFERENCE, one.stage): _marked(one, one in clear) for one in found if one.arm == arm}
        places = [(is_reference, stage) for is_reference in (True, False) for stage in STAGES]
        lines.append(f"| {' | '.join([arm, *(cells.get(place, '') for place in places)])} |")
    return [
        *lines,
        "",
        "Differences in accuracy in points, paired by seed, with 95% intervals (Student's t; not corrected). \\* marks "
        f"intervals that leave out 0: there are {len(found)} comparisons, so about {LEVEL * len(found):.0f} would be "
        f"marked if no arm differed. \\*\\* marks the {len(clear)} that are still clear after Holm's correction over "
        f"all {len(found)}. No standard deviation is taken to be less than one test problem.",
    ]


def _marked(one: Comparison, is_clear: bool) -> str:
    mark = " \\*\\*" if is_clear else " \\*" if one.p < LEVEL else ""
    return one.estimate.signed + mark


def plot(results: list[Result], start: dict[str, dict[str, float]]) -> str:
    """An SVG: for each arm its accuracy after SFT (open) and after RL (full) with intervals, and its rewards in RL."""
    arms = by_arm(results)
    left, width, row, curve = 190, 460, 34, 150
    height = row * len(arms) + 60
    total = left + width + curve + 50
    curves = {name: mean_curve([run["rl_rewards"] for run in runs]) for name, runs in arms.items()}
    low_reward = min((min(one) for one in curves.values() if one), default=0.0)
    high_reward = max((max(one) for one in curves.values() if one), default=1.0)
    spread = (high_reward - low_reward) or 1.0

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
        rewards = curves[name]
        begin, gap = left + width + 30, curve / max(1, len(rewards) - 1)
        points = [
            f"{begin + gap * step:.1f},{middle + 14 - 28 * (reward - low_reward) / spread:.1f}"
            for step, reward in enumerate(rewards)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#9b2226"/>')
    legends = {
        left: "accuracy; open: after SFT, full: after RL, dashed: before; 95% intervals",
        left + width + 20: f"reward in RL, {low_reward:.2f} to {high_reward:.2f}",
    }
    parts += [f'<text x="{at}" y="{height - 4}" fill="#555">{legend}</text>' for at, legend in legends.items()]
    return "\n".join([*parts, "</svg>\n"])


def mean_curve(curves: list[list[float]]) -> list[float]:
    """Mean over the seeds, step by step, as long as all have the step."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]
