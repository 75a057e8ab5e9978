"""Metrics of a run through Ray: each node's metrics port gives them to Prometheus with the prefix ray_.

Made in the driver, which sees every unit and every replica; without Ray they count for nobody.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from workers.cluster.ray import ray_is_up

SHARD_SECONDS = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 3600]
COUNTERS = {
    "grape_tokens_scored": ("Tokens that went through an engine.", ("dataset", "policy", "replica")),
    "grape_tokens_spared": ("Tokens that no engine had to compute: of stopped rows, or stored.", ("dataset", "policy")),
    "grape_rows_scored": ("Rows whose scores were stored.", ("dataset", "policy")),
    "grape_rows_reused": ("Rows that were scored before.", ("dataset", "policy")),
    "grape_retries": ("Shards that were given to an engine again.", ("dataset", "policy")),
    "grape_restarts": ("Engines that were started again.", ("dataset", "policy")),
    "grape_failures": ("Rows that could not be scored.", ("dataset", "policy")),
    "grape_gpu_seconds": ("Seconds of GPUs on shards.", ("dataset", "policy")),
    "grape_rejects": ("Pool rows that cannot be used.", ("dataset", "reason")),
}
GAUGES = {
    "grape_queue_shards": ("Shards that wait or are being scored.", ("dataset", "policy")),
    "grape_cache_hit_rate": ("Share of tokens that another row had computed.", ("dataset", "policy", "replica")),
}
HISTOGRAMS = {"grape_shard_seconds": ("Seconds of a shard on its engine.", ("dataset", "policy"))}


@cache
def metric(name: str) -> Any:
    """The metric of a name, made once a process."""
    from ray.util.metrics import Counter, Gauge, Histogram

    if name in COUNTERS:
        text, tags = COUNTERS[name]
        return Counter(name, description=text, tag_keys=tags)
    if name in GAUGES:
        text, tags = GAUGES[name]
        return Gauge(name, description=text, tag_keys=tags)
    text, tags = HISTOGRAMS[name]
    return Histogram(name, description=text, boundaries=SHARD_SECONDS, tag_keys=tags)


class ScoringMetrics:
    """Metrics of the scoring of one policy."""

    def __init__(self, dataset: str, policy: str, gpus: int):
        self.tags = {"dataset": dataset, "policy": policy}
        self.gpus = gpus
        for name, (_, keys) in COUNTERS.items():  # what first appears above 0 has not grown, for Prometheus
            if keys == tuple(self.tags) and ray_is_up():
                metric(name)._record(0, tags=self.tags)

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

    def restarted(self) -> None:
        """An engine is started in the place of one that is dead or cannot go on."""
        self.add("grape_restarts", 1)

    def queue(self, shards: int) -> None:
        """Units that wait or are being scored."""
        metric("grape_queue_shards").set(shards, tags=self.tags)

    def begin_replica(self, place: int) -> None:
        """A replica starts, or another takes its place."""
        if ray_is_up():
            metric("grape_tokens_scored")._record(0, tags={**self.tags, "replica": str(place)})

    def replica(self, place: int, tokens: int, cache_hit_rate: float) -> None:
        """What a replica did since the last look."""
        tags = {**self.tags, "replica": str(place)}
        if tokens > 0:
            metric("grape_tokens_scored").inc(tokens, tags=tags)
        metric("grape_cache_hit_rate").set(cache_hit_rate, tags=tags)

    def add(self, name: str, number: float) -> None:
        """To one of this policy's counters."""
        if number > 0 and ray_is_up():
            metric(name).inc(number, tags=self.tags)


def count_rejects(dataset: str, by_reason: dict[str, int]) -> None:
    """Rows of a pool that were left out, by reason."""
    for reason, rows in by_reason.items():
        if rows > 0 and ray_is_up():
            metric("grape_rejects").inc(rows, tags={"dataset": dataset, "reason": reason})
