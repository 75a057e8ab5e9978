"""Two releases of one pool against each other: who was chosen, and how their targets rank the candidates."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.release.candidates import ScoredPool, open_scored_pool
from grape_service.release.diff import Diff, diff, render_text
from grape_service.release.load import Release
from grape_service.release.turnover import Turnover, turnover
from grape_service.select.ranking import order_within_prompts, places_within_groups

MOST_DIFFERENT = 20
MOVES = 12
BINS = 20


def compare(first: Release, second: Release) -> dict[str, Any]:
    """What `grape compare` tells: the rows and choices that differ (`diff`, whose figures are here too), and, where
    both workspaces still have the scores, how alike the rankings within prompts are: `rank_correlation` (mean
    Spearman's rho over prompts), its histogram, the prompts where the choice of the other costs most, in score, and
    the absolute differences of the candidates' scores, on average and at most. `turnover`: of versions that follow each
    other, how much changed in each and which prompts keep changing their winner."""
    rows = diff(first, second)
    both = rows.prompts_common
    pools = open_scored_pool(first), open_scored_pool(second)
    settings = differences(first.manifest.config, second.manifest.config)
    moved = turnover_between(first, second)
    return {
        **rows.to_json(),
        "first": first.reference,
        "second": second.reference,
        "prompts": {"first": rows.prompts_a, "second": rows.prompts_b, "both": both},
        "same_choice": rows.same_choice,
        "agreement": rows.same_choice / both if both else None,
        "moves": rows.source_changes[:MOVES],
        "ranking": ranking(*pools) if all(pool and pool.has_scores for pool in pools) else None,
        "settings": settings + differences(_policies(first), _policies(second), "policies."),
        "turnover": moved.to_json() if moved is not None else None,
        "text": render_text(rows, prompts_of(rows, first, second)),
    }


def prompts_of(found: Diff, first: Release, second: Release) -> dict[str, str]:
    """What the prompts of a diff's examples ask, by their ids."""
    ids, asked = [one.prompt_id for one in found.examples], {}
    for release in (second, first):
        missing = [one for one in ids if one not in asked]
        if missing:
            rows = release.dataset.to_table(["prompt_id", "messages"], filter=pc.field("prompt_id").isin(missing))
            for row in rows.to_pylist():
                of_user = [one["content"] for one in row["messages"] if one["role"] == "user"]
                asked[row["prompt_id"]] = str((of_user or [row["messages"][0]["content"]])[-1] or "")
    return asked


def turnover_between(first: Release, second: Release) -> Turnover | None:
    """What changed on the way from a version to a later one of the same dataset; None for others, and where versions in
    between are gone. Raises UserError, StageError: see `turnover`."""
    if (first.storage.root, first.name) != (second.storage.root, second.name):
        return None
    return turnover(first.storage, first.name, first.version, second.version)


def ranking(first: ScoredPool | None, second: ScoredPool | None) -> dict[str, Any]:
    """How alike two targets rank the candidates that both scored, prompt by prompt."""
    assert first is not None
    assert second is not None
    same = _score_name(first) == _score_name(second)  # scores of different methods are no differences
    groups = min(first.num_partitions, second.num_partitions)
    num_prompts, total, same_first = 0, 0.0, 0
    num_scores, sum_apart, most_apart = 0, 0.0, 0.0
    histogram = np.zeros(BINS, dtype=np.int64)
    worst: list[tuple[float, str, dict[str, Any]]] = []
    for left, right in zip(first.tables(groups), second.tables(groups), strict=True):
        right = right.select(["prompt_id", "candidate_id", "score"])
        joined = left.join(right, ["prompt_id", "candidate_id"], join_type="inner", right_suffix="_other")
        joined = joined.filter(pc.and_(pc.is_finite(joined["score"]), pc.is_finite(joined["score_other"])))
        joined = joined.sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")]).combine_chunks()
        apart = np.abs(joined["score"].to_numpy() - joined["score_other"].to_numpy())
        num_scores, sum_apart = num_scores + len(apart), sum_apart + float(apart.sum())
        most_apart = max(most_apart, float(apart.max(initial=0.0)))
        part = _rank_agreement(joined, (first.smallest_wins, second.smallest_wins))
        if part is None:
            continue
        rho, lost, rows = part
        num_prompts += len(rho)
        total += float(rho.sum())
        same_first += int((lost == 0).sum())
        histogram += np.histogram(rho, bins=BINS, range=(-1, 1))[0]
        for place in np.argsort(-lost, kind="stable")[:MOST_DIFFERENT]:
            if lost[place] > 0:
                entry = _difference(joined, rows[:, place], float(lost[place]), float(rho[place]))
                worst.append((-entry["lost"], entry["prompt_id"], entry))
        worst = heapq.nsmallest(MOST_DIFFERENT, worst, key=lambda item: item[:2])
    return {
        "prompts": num_prompts,
        "rank_correlation": total / num_prompts if num_prompts else None,
        "same_first": same_first / num_prompts if num_prompts else None,
        "score_difference": {"mean": sum_apart / num_scores, "largest": most_apart} if num_scores and same else None,
        "histogram": histogram.tolist(),
        "most_different": [entry for _, _, entry in worst],
    }


def _score_name(pool: ScoredPool) -> str:
    return pool.method.name if pool.method is not None else "grape"


def _rank_agreement(
    joined: pa.Table, smallest_wins: tuple[bool, bool]
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray] | None:
    """Of prompts with two candidates or more [M]: Spearman's rho, what is lost in both scores together if each took
    the other's first choice, and the rows of both first choices [2, M]."""
    ids = joined["prompt_id"].combine_chunks() if joined.num_rows else None
    if ids is None:
        return None
    prompts = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    sizes = np.bincount(prompts)
    ties = np.arange(len(prompts))
    columns = zip(("score", "score_other"), smallest_wins, strict=True)
    scores = [-joined[name].to_numpy() if smallest else joined[name].to_numpy() for name, smallest in columns]
    ranks = np.empty((2, len(prompts)))
    best = np.empty((2, len(sizes)), dtype=np.int64)
    for side, values in enumerate(scores):
        order = order_within_prompts(prompts, -values, ties)
        place = places_within_groups(prompts[order])
        ranks[side, order] = place
        best[side] = order[place == 0]
    centred = ranks - ((sizes - 1) / 2)[prompts]
    products = np.bincount(prompts, weights=centred[0] * centred[1])
    squares = np.bincount(prompts, weights=centred[0] ** 2)
    many = sizes > 1
    if not many.any():
        return None
    lost = (scores[0][best[0]] - scores[0][best[1]]) + (scores[1][best[1]] - scores[1][best[0]])
    return products[many] / squares[many], lost[many], best[:, many]


def _difference(joined: pa.Table, rows: npt.NDArray, lost: float, rho: float) -> dict[str, Any]:
    first, second = (joined.slice(int(row), 1).to_pylist()[0] for row in rows)
    keys = ("candidate_id", "source", "tokens", "score", "score_other")
    return {
        "prompt_id": first["prompt_id"],
        "lost": lost,
        "rank_correlation": rho,
        "first": {key: first[key] for key in keys},
        "second": {key: second[key] for key in keys},
    }


def _policies(release: Release) -> dict[str, list[str]]:
    """The ids of a release's policies by role: other weights in the same place are another policy."""
    found: dict[str, list[str]] = {}
    for policy in release.manifest.parents.policies:
        found.setdefault(policy.role, []).append(policy.policy_id)
    return found


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Settings that differ, by their key."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        left, right = first.get(key), second.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append({"key": f"{prefix}{key}", "first": left, "second": right})
    return found
