"""How long a report takes to open in a browser: a release of many rows, with examples as long as they get.

    python benchmarks/report_page.py --rows 1000000

Prints the page's size and, over some openings in a headless Chromium that was just started, the median and the
slowest of the time until there is something to read (first contentful paint) and until every plot is drawn, and the
CPU seconds of the page's thread, which a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grape_service.config.methods import SelectConfig
from grape_service.report.examples import EXAMPLE_KINDS, MAX_CANDIDATES, MAX_TOKENS
from grape_service.report.facts import SelectReport, WeightsReport
from grape_service.report.page import render_page
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.report.sums import EXAMPLES_EACH, MAX_SOURCES
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.select.choose import Candidates, Detail, choose
from grape_service.weigh.partition import WeightBatch
from tests.chromium import running_browser

EACH = 8
NAMES = [f"source-{number:02}" for number in range(MAX_SOURCES)]
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def select_statistics(rows: int) -> SelectReport:
    random = np.random.default_rng(0)
    prompts = np.arange(rows // EACH)
    count = len(prompts) * EACH
    tokens = np.exp(random.normal(5, 0.8, count)).astype(np.int64) + 4
    scores = -random.exponential(0.8, count) - 0.05
    found = Candidates(
        np.repeat(prompts, EACH),
        len(prompts),
        np.arange(count),
        pa.array(NAMES).take(pa.array(random.integers(0, len(NAMES), count))),
        tokens + 1,
        scores,
        np.zeros(count, dtype=bool),
        None,
        Detail(pa.array([f"prompt-{number}" for number in prompts]), tokens, scores + random.normal(0, 0.02, count)),
    )
    made = SelectStatistics.empty(NAMES)
    made.add_candidates(found, choose(found, SelectConfig()))
    return made.to_json()


def weigh_statistics(rows: int) -> WeightsReport:
    random = np.random.default_rng(1)
    lengths = random.integers(10, 100, rows)
    offsets = offsets_from_lengths(lengths)
    logs = random.normal(0, 0.8, int(offsets[-1]))
    sources = pa.array(NAMES).take(pa.array(random.integers(0, len(NAMES), rows)))
    made = WeighStatistics.empty(NAMES)
    made.add_weights(WeightBatch(sources, offsets, np.exp(logs), random.normal(0, 0.3, len(logs))))
    return made.to_json()


def examples() -> list[dict[str, Any]]:
    random = np.random.default_rng(2)
    values = [(-random.exponential(1.0, MAX_TOKENS)).round(4).tolist() for _ in range(3)]
    candidate = {
        "num_tokens": 400,
        "counted_tokens": 399,
        "truncated": False,
        "score": -0.7321,
        "texts": [f" word{number}" for number in range(MAX_TOKENS)],
        **dict(zip(("logprobs", "ratios", "weights"), values, strict=True)),
    }
    candidates = [
        {**candidate, "candidate_id": f"c{n}", "source": NAMES[n], "kept": n == 0, "rank": n + 1}
        for n in range(MAX_CANDIDATES)
    ]
    prompt = {"prompt": "What is the sum of the first hundred numbers? " * 8, "candidates": candidates}
    return [
        {**prompt, "prompt_id": f"{kind}-{n}", "kind": kind} for kind in EXAMPLE_KINDS for n in range(EXAMPLES_EACH)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a report takes to open in a browser.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--openings", type=int, default=5)
    arguments = parser.parse_args()
    totals = {"select": select_statistics(arguments.rows), "weights": weigh_statistics(arguments.rows // EACH)}
    facts = {
        **dict.fromkeys(("rows", "tokens", "loss_tokens", "bytes"), arguments.rows // EACH),
        **{"name": "benchmark", "version": "v0001", "created": None, "counts": {}, "parents": {}},
        "config": {"select": {"method": "grape"}, "weights": {"level": "token", "ratio_clip": [-0.08, 0.3]}},
        "statistics": {"report": totals},
    }
    page = render_page(facts, examples())
    print(f"report of {arguments.rows:,} candidates: {len(page.encode()) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(page)
        for name, width, height in (("laptop", 1280, 900), ("phone", 390, 844)):
            drawn, painted, worked = [], [], []
            for opening in range(arguments.openings):
                profile = Path(folder) / f"{name}-{opening}"
                profile.mkdir()
                with running_browser(profile) as browser:
                    browser.call("Performance.enable", timeDomain="threadTicks")
                    drawn.append(browser.open(path, width, height, dark=False))
                    painted.append(browser.run(FIRST_PAINT) / 1000)
                    metrics = browser.call("Performance.getMetrics")["metrics"]
                    worked += [metric["value"] for metric in metrics if metric["name"] == "TaskDuration"]
                    assert not browser.errors, browser.errors
            found = {"something to read after": painted, "all plots drawn after": drawn, "CPU": worked}
            for what, values in found.items():
                print(f"{name}: {what} {statistics.median(values):.2f} s, at most {max(values):.2f} s")


if __name__ == "__main__":
    main()
