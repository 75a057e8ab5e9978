"""Facts and examples of a made-up release, with text that wants to break the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.release.rounds import Round, Rounds
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.select.choose import Candidates, Choice, Detail, choose
from grape_service.weigh.partition import WeightBatch

HOSTILE = [
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>",
    "مرحبا بالعالم \u202egnp.exe",
    "\U0001f468\u200d\U0001f469 emoji \U0001f389",
    "zero\u200bwidth\ufeff",
    "x" * 100_000,
    "</script>{{ 7 * 7 }}",
]
NAMES = ["teacher", "student", "<b onmouseover=hacked()>forum</b>"]


def job(version: str | None = "v0002") -> Rounds:
    """Three rounds under way: the first with its gate's figures, the second released as `version`."""
    gate = {"held_out_loss": 1.2345678, "prompts": 9, "samples": 72, "unknown": 0, "pass@8": 0.75, "pass@8 prompts": 9}
    target = "s3://team/runs/7/sft/model-of-a-long-name/" + "y" * 300
    rounds = [
        Round("round-1", HOSTILE[0], "a@v0001", "v0001", 1234, None, {**gate, HOSTILE[5]: 1.0}, "1f2e", target),
        Round("round-2", target, None, version, 400, 0.25),
    ]
    return Rounds("abc", "made-up", 3, "stopped", f"gate: {HOSTILE[0]}", rounds=rounds)


def candidates(num_prompts: int, start: int = 0, each: int = 4, better: str | None = None) -> Candidates:
    """Prompts of four candidates; the same for the same numbers, whatever they are together with."""
    parts = []
    for number in range(start, start + num_prompts):
        random = np.random.default_rng(number)
        sources = [NAMES[int(i)] for i in random.integers(0, 3, each)]
        tokens = random.integers(20, 200, each)
        scores = -random.exponential(1, each) - 0.1
        scores += np.array([5.0 * (source == better) - 5.0 * (better is not None) for source in sources])
        detail = Detail(pa.array([f"prompt-{number}"]), tokens, scores + random.normal(0, 0.01, each))
        parts.append(
            Candidates(
                np.zeros(each, dtype=np.int64),
                1,
                np.arange(each),
                pa.array(sources),
                tokens + 1,
                scores,
                np.zeros(each, dtype=bool),
                None,
                detail,
            )
        )
    return Candidates.concatenate(parts)


def chosen(found: Candidates) -> Choice:
    return choose(found, SelectConfig())


def weight_batch(rows: int, seed: int = 0, collapse: bool = False) -> WeightBatch:
    random = np.random.default_rng(seed)
    lengths = random.integers(10, 60, rows)
    offsets = offsets_from_lengths(lengths)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    left = np.repeat(lengths, lengths) - place - 1
    weights = np.exp(-0.5 * left) if collapse else np.exp(random.normal(0, 0.2, int(offsets[-1])))
    sources = pa.array([NAMES[int(i)] for i in random.integers(0, 3, rows)])
    return WeightBatch(sources, offsets, weights, random.normal(0, 0.3, int(offsets[-1])))


def facts(better: str | None = None, collapse: bool = False, prompts: int = 300, **over: Any) -> dict[str, Any]:
    """What a page is made from; without arguments nothing is wrong with it."""
    select, weigh = SelectStatistics.empty(NAMES), WeighStatistics.empty(NAMES)
    found = candidates(prompts, better=better)
    select.add_candidates(found, chosen(found))
    batch = weight_batch(prompts, collapse=collapse)
    weigh.add_weights(batch)
    effective = float(batch.weights.sum() ** 2 / (len(batch.weights) * (batch.weights**2).sum()))
    clips = {"ratio_low": 0.1, "ratio_high": 0.05, "weight_low": 0.3 if collapse else 0.0, "weight_high": 0.0}
    pool = {"rows_in": 4 * prompts + 2, "rows": 4 * prompts, "rejected": 1, "rejected_by_reason": {"empty": 1}}
    sums = {"rows": 1, "tokens": 100, "sum": 100.0, "sum_squares": 110.0}
    sums |= {"ratio_low": 1, "ratio_high": 1, "weight_low": 0, "weight_high": 0}
    return {
        "name": "made-up",
        "version": "v0001",
        "created": "2026-01-01T00:00:00Z",
        "rows": prompts,
        "tokens": 100_000,
        "loss_tokens": 50_000,
        "bytes": 1_000_000,
        "counts": {
            "pool": {**pool, "filtered": 1, "truncated": 0},
            "select": {"prompts": prompts, "candidates": 4 * prompts, "kept_rows": prompts, "rows_left_out": {}},
            "weigh": {"rows": prompts, "weighed_rows": prompts, "self_weights": sums, "sources": {NAMES[0]: sums}},
        },
        "config": {
            "select": {"method": "grape"},
            "target": {"model": HOSTILE[0]},
            "weights": {"level": "token", "ratio_clip": [-0.08, 0.3]},
        },
        "parents": {"pool": [{"path": HOSTILE[5], "size": 12}], "policies": [], "libraries": {"numpy": "2"}},
        "statistics": {
            "report": {"select": select.to_json(), "weights": weigh.to_json()},
            "weights": {"mean": 1.0, "effective_share": effective, **clips},
            "stage_seconds": {"select": 1.5},
        },
        **over,
    }


def examples() -> list[dict[str, Any]]:
    """One prompt for each hostile text, which stands in the prompt, the source and the tokens."""
    found = []
    for number, text in enumerate(HOSTILE):
        numbers = [-0.1, -2.5, -5.0]
        loser = {"source": text, "kept": False, "rank": 2, "ratios": None, "weights": None}
        shared = {"num_tokens": 400, "counted_tokens": 399, "truncated": False, "logprobs": numbers, "ids": [1, 2, 3]}
        shared |= {"texts": ["a ", text, " c"], "score": -1.25, "candidate_id": f"c{number}"}
        winner = {**shared, "source": None, "kept": True, "rank": 1, "ratios": [0.1, -0.2, 0.0]}
        winner["weights"] = [0.5, 1.5, 1.0]
        pair = [winner, {**shared, **loser}]
        found.append({"kind": "closest", "prompt_id": f"p{number}", "prompt": text, "candidates": pair})
    return found
