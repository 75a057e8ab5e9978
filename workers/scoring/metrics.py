"""Metrics of a run through Ray: each node's metrics port gives them to Prometheus with the prefix ray_.

Made in the driver, which sees every unit and every replica; without Ray they count for nobody.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from workers.cluster.ray import ray_is_up

SHARD_SECONDS = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 3600]
_COUNTERS = {
    "grape_tokens_scored": ("Tokens that went through an engine.", ("dataset", "policy", "replica")),
    "grape_rows_scored": ("Rows whose scores were stored.", ("dataset", "policy")),
    "grape_rows_reused": ("Rows that were scored before.", ("dataset", "policy")),
    "grape_retries": ("Shards that were given to an engine again.", ("dataset", "policy")),
    "grape_failures": ("Rows that could not be scored.", ("dataset", "policy")),
    "grape_gpu_seconds": ("Seconds of GPUs on shards.", ("dataset", "policy")),
    "grape_rejects": ("Pool rows that cannot be used.", ("dataset", "reason")),
}
_GAUGES = {
    "grape_tokens_per_second": ("Tokens a second of a replica since the last look.", ("dataset", "policy", "replica")),
    "grape_queue_shards": ("Shards that wait or are being scored.", ("dataset", "policy")),
    "grape_cache_hit_rate": ("Share of tokens that another row had computed.", ("dataset", "policy", "replica")),
}
_HISTOGRAMS = {"grape_shard_seconds": ("Seconds of a shard on its engine.", ("dataset", "policy"))}


@cache
def metric(name: str) -> Any:
    """The metric of a name, made once a process."""
    from ray.util.metrics import Counter, Gauge, Histogram

    if name in _COUNTERS:
        text, tags = _COUNTERS[name]
        return Counter(name, description=text, tag_keys=tags)
    if name in _GAUGES:
        text, tags = _GAUGES[name]
        return Gauge(name, description=text, tag_keys=tags)
    text, tags = _HISTOGRAMS[name]
    return Histogram(name, description=text, boundaries=SHARD_SECONDS, tag_keys=tags)


def exported_names() -> set[str]:
    """Names as a scrape of Ray's metrics port has them."""
    names = {f"ray_{name}_total" for name in _COUNTERS} | {f"ray_{name}" for name in _GAUGES}
    return names | {f"ray_{name}_{part}" for name in _HISTOGRAMS for part in ("bucket", "sum", "count")}


class ScoringMetrics:
    """Metrics of the scoring of one policy."""

    def __init__(self, dataset: str, policy: str, gpus: int):
        self.tags = {"dataset": dataset, "policy": policy}
        self.gpus = gpus

    def unit_done(self, scored: int, reused: int, failed: int, seconds: float) -> None:
        """A unit came back."""
        self.add("grape_rows_scored", scored)
        self.add("grape_rows_reused", reused)
        self.add("grape_failures", failed)
        self.add("grape_gpu_seconds", seconds * self.gpus)
        metric("grape_shard_seconds").observe(seconds, tags=self.tags)

    def retried(self) -> None:
        """A unit is given out again."""
        self.add("grape_retries", 1)

    def queue(self, shards: int) -> None:
        """Units that wait or are being scored."""
        metric("grape_queue_shards").set(shards, tags=self.tags)

    def replica(self, place: int, tokens: int, seconds: float, cache_hit_rate: float) -> None:
        """What a replica did since the last look."""
        tags = {**self.tags, "replica": str(place)}
        if tokens > 0:
            metric("grape_tokens_scored").inc(tokens, tags=tags)
        metric("grape_tokens_per_second").set(tokens / max(seconds, 1e-9), tags=tags)
        metric("grape_cache_hit_rate").set(cache_hit_rate, tags=tags)

    def add(self, name: str, number: float) -> None:
        """Counters take no 0; the first look at one should give 0 all the same."""
        if number > 0 and ray_is_up():
            metric(name).inc(number, tags=self.tags)


def count_rejects(dataset: str, by_reason: dict[str, int]) -> None:
    """Rows of a pool that were left out, by reason."""
    for reason, rows in by_reason.items():
        if rows > 0 and ray_is_up():
            metric("grape_rejects").inc(rows, tags={"dataset": dataset, "reason": reason})
