"""Scoring actors as a pool: units are pulled by whichever replica is free, and replicas that die are replaced."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from grape_service.config import Config
from grape_service.errors import StageError, UserError
from grape_service.progress import reporter
from workers.actor import ScoringActor, ScoringSpec, Unit, UnitResult
from workers.cluster import import_path, num_cores, num_gpus
from workers.metrics import ScoringMetrics
from workers.run import utc_now

WAITING = 1
"""Units that a replica reads ahead while others are on its engine."""
MAX_CALLERS = 4
"""No engine takes more units at once."""
ATTEMPTS = 3
"""A unit that failed this often is recorded as failed."""
START_SECONDS = 1800
"""An engine that has not started by then has failed."""


@dataclass
class Work:
    """A unit, under which policy id and at what temperature it is scored, and how often that failed."""

    unit: Unit
    store_id: str
    temperature: float = 1.0
    attempts: int = 0


@dataclass
class Replica:
    """An actor and what it was given, oldest first."""

    actor: Any
    started: ray.ObjectRef
    in_flight: dict[ray.ObjectRef, Work] = field(default_factory=dict)
    tokens_seen: int = 0
    looked_at: float = field(default_factory=time.monotonic)
    description: dict[str, Any] = field(default_factory=dict)
    is_ready: bool = False

    @property
    def room(self) -> int:
        """Units that it may hold."""
        return min(int(self.description.get("num_callers", 1)), MAX_CALLERS) + WAITING


@dataclass
class ScoreTotals:
    """What a scoring stage did."""

    rows: int = 0
    reused: int = 0
    failed: int = 0
    tokens: int = 0
    engine_seconds: float = 0.0
    failed_units: list[tuple[Work, str]] = field(default_factory=list)


def num_replicas(config: Config, tensor_parallel: int, units: int) -> int:
    """How many replicas a policy gets: no more than there are units."""
    wanted = config.workers.replicas
    count = wanted if isinstance(wanted, int) else max(1, num_gpus() // tensor_parallel)
    return max(1, min(count, units))


class Replicas:
    """The actors of one policy. None is detached: they end with `close`, or with the driver."""

    def __init__(self, config: Config, spec: ScoringSpec, count: int):
        self.config = config
        self.spec = spec
        self.events: list[dict[str, str]] = []
        self.failed_starts = 0
        self.metrics = ScoringMetrics(config.name, spec.policy_id, spec.policy.tensor_parallel if num_gpus() else 0)
        reporter().event(f"starting {count} engine{'s' * (count > 1)} for {spec.policy_id}")
        self.count = count
        self.replicas = [self._start() for _ in range(count)]
        self._wait_ready(self.replicas)

    def close(self) -> None:
        """End every actor."""
        for replica in self.replicas:
            self._end(replica)

    def _start(self) -> Replica:
        gpus = self.spec.policy.tensor_parallel if num_gpus() else 0
        threads = max(1, num_cores(self.config.workers) // self.count)
        environment = {
            "PYTHONPATH": os.pathsep.join(import_path()),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning costs twenty times the work where cores are shared
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1",
        }
        actor = ray.remote(ScoringActor).options(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=0,
            max_concurrency=MAX_CALLERS + WAITING + 3,
            runtime_env={"env_vars": environment},
        )
        handle = actor.remote(self.spec)
        return Replica(handle, handle.start.remote())  # type: ignore[attr-defined]

    def _wait_ready(self, replicas: list[Replica]) -> None:
        for replica in replicas:
            while not replica.is_ready:
                self._look_ready(replica, START_SECONDS)

    def _look_ready(self, replica: Replica, timeout: float) -> None:
        """Note that a replica has started, or start it again where that failed; wait at most `timeout` seconds."""
        try:
            replica.description = ray.get(replica.started, timeout=timeout)
            replica.is_ready = True
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._end(replica)
            raise_if_ours(error)
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise StageError(f"the engine for {self.spec.policy.model} does not start: {short(error)}") from None
            self._event(f"an engine did not start ({short(error)}); starting it again")
            fresh = self._start()
            replica.actor, replica.started = fresh.actor, fresh.started

    def _end(self, replica: Replica) -> None:
        with contextlib.suppress(Exception):
            ray.kill(replica.actor)

    def _event(self, text: str) -> None:
        self.events.append({"time": utc_now(), "event": text})
        reporter().event(text)

    def descriptions(self) -> list[dict[str, Any]]:
        """What each replica is and did."""
        found = []
        for replica in (replica for replica in self.replicas if replica.is_ready):
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                found.append(ray.get(replica.actor.describe.remote(), timeout=60))
        return found

    def score(self, works: Sequence[Work], advance: Callable[[int], None]) -> ScoreTotals:
        """Score every unit; `advance(tokens)` is called about once a second while it goes on."""
        queue = deque(works)
        totals = ScoreTotals()
        last_progress = time.monotonic()
        while queue or any(replica.in_flight for replica in self.replicas):
            for replica in self.replicas:
                while queue and replica.is_ready and len(replica.in_flight) < replica.room:
                    self._give(replica, queue.popleft())
            if not queue:
                self._rebalance()
            # A replacement starts while the others work: where its node is gone, there may be no room for it.
            starting = {replica.started: replica for replica in self.replicas if not replica.is_ready}
            references = [reference for replica in self.replicas for reference in replica.in_flight]
            ready, _ = ray.wait([*references, *starting], num_returns=1, timeout=1.0)
            for reference in ready:
                if reference in starting:
                    self._look_ready(starting[reference], timeout=60)
                else:
                    self._collect(reference, queue, totals)
            if time.monotonic() - last_progress >= 1.0:
                self._poll(advance)
                self.metrics.queue(len(queue) + sum(len(replica.in_flight) for replica in self.replicas))
                last_progress = time.monotonic()
        self._poll(advance)
        self.metrics.queue(0)
        return totals

    def _give(self, replica: Replica, work: Work) -> None:
        reference = replica.actor.score.remote(work.unit, work.store_id, work.temperature)
        replica.in_flight[reference] = work

    def _collect(self, reference: ray.ObjectRef, queue: deque[Work], totals: ScoreTotals) -> None:
        replica = next(replica for replica in self.replicas if reference in replica.in_flight)
        oldest = next(iter(replica.in_flight)) == reference
        work = replica.in_flight.pop(reference)
        try:
            result: UnitResult | None = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            waiting = [work, *replica.in_flight.values()] if oldest else [*replica.in_flight.values(), work]
            replica.in_flight.clear()
            self._event(f"an engine died ({short(error)}); its {len(waiting)} shards are given to others")
            waiting[0].attempts += 1
            for lost in reversed(waiting):
                self._again(lost, f"its engine died: {short(error)}", queue, totals)
            self._replace(replica)
            return
        except ray.exceptions.RayTaskError as error:
            raise_if_ours(error, (UserError,))
            work.attempts += 1
            self._event(f"shard {work.unit.path} failed, attempt {work.attempts} of {ATTEMPTS}: {short(error)}")
            self._again(work, short(error), queue, totals)
            if not self._is_usable(replica):
                for other in reversed(list(replica.in_flight.values())):
                    self._again(other, "its engine stopped", queue, totals)
                self._replace(replica)
            return
        if result is None:
            return
        self.metrics.unit_done(result.scored, result.reused, result.failed, result.seconds)
        totals.rows += result.scored
        totals.failed += result.failed
        totals.reused += result.reused
        totals.tokens += result.tokens
        totals.engine_seconds += result.seconds

    def _is_usable(self, replica: Replica) -> bool:
        try:
            return bool(ray.get(replica.actor.is_usable.remote(), timeout=60))
        except (ray.exceptions.RayError, TimeoutError):
            return False

    def _replace(self, replica: Replica) -> None:
        """A new actor in the place of one that is dead or cannot go on."""
        self._end(replica)
        replica.in_flight.clear()
        fresh = self._start()
        replica.actor, replica.started, replica.tokens_seen, replica.is_ready = fresh.actor, fresh.started, 0, False

    def _again(self, work: Work, reason: str, queue: deque[Work], totals: ScoreTotals) -> None:
        """Put a unit back in front; after the last attempt it is recorded as failed."""
        if work.attempts >= ATTEMPTS:
            totals.failed_units.append((work, reason))
            return
        self.metrics.retried()
        unit = work.unit
        work.unit = Unit(unit.path, unit.partition, unit.rows, unit.tokens, check=True)
        queue.appendleft(work)

    def _rebalance(self) -> None:
        """Give units that wait at a busy replica to idle ones."""
        idle = [replica for replica in self.replicas if replica.is_ready and not replica.in_flight]
        for replica in idle:
            busiest = max(self.replicas, key=lambda other: len(other.in_flight))
            if len(busiest.in_flight) < 2:
                return
            reference, work = list(busiest.in_flight.items())[-1]
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(busiest.actor.take_back.remote(work.unit.path)):
                    del busiest.in_flight[reference]
                    self._give(replica, work)

    def _poll(self, advance: Callable[[int], None]) -> None:
        for place, replica in enumerate(self.replicas):
            with contextlib.suppress(ray.exceptions.RayError):
                tokens, events, cached = ray.get(replica.actor.progress.remote(), timeout=5)
                seen, now = max(0, tokens - replica.tokens_seen), time.monotonic()
                self.metrics.replica(place, seen, now - replica.looked_at, cached)
                replica.tokens_seen, replica.looked_at = tokens, now
                if seen:
                    advance(seen)
                for event in events:
                    self._event(event)


def short(error: BaseException) -> str:
    """The last line of an error, without Ray's traceback."""
    cause = getattr(error, "cause", None)
    text = str(cause or error).strip() or type(error).__name__
    line = next((line for line in reversed(text.splitlines()) if line.strip()), text)
    return f"{type(cause or error).__name__}: {line.strip()[:300]}"


def raise_if_ours(error: BaseException, kinds: tuple[type[Exception], ...] = (UserError, StageError)) -> None:
    """Raise the UserError or StageError inside a Ray error, if there is one."""
    seen: BaseException | None = getattr(error, "cause", None) or error.__cause__
    while seen is not None:
        if isinstance(seen, kinds):
            raise type(seen)(*seen.args) from None
        seen = getattr(seen, "cause", None) or seen.__cause__
