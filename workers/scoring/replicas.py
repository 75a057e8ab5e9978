"""Scoring actors as a pool: units are pulled by whichever replica is free, and replicas that die are replaced."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError, best_effort
from grape_service.progress.reporter import reporter
from workers.cluster.ray import check_ray_is_alive, node_gpus, num_nodes, num_slots, wait
from workers.cluster.tasks import ENGINE_CPUS
from workers.engines.vllm.available import version_sentence
from workers.run import Events
from workers.scoring.actor import ScoringSpec
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.queue import WorkQueue
from workers.scoring.rows import halves
from workers.scoring.work import ScoreTotals, UnitResult, Work

WAITING = 1
"""Units that a replica reads while others are on its engine."""
MAX_CALLERS = 4
"""No engine takes more units at once."""
ATTEMPTS = 3
"""A unit that failed this often is recorded as failed."""
START_SECONDS = 1800
"""A run that has no engine for so long fails: none starts, or none finds room on the cluster."""
STUCK_SECONDS = 300.0
STUCK_FACTOR = 5.0
"""An engine is taken for dead after STUCK_SECONDS without progress, or STUCK_FACTOR times what its largest unit takes
at the rate that it has shown, whichever is longer; one that has shown none yet, after START_SECONDS."""
ANSWER_SECONDS = 20
"""How long the driver waits for a short answer of an actor that may be lost."""


@dataclass
class Replica:
    """An actor and what it was given, oldest first."""

    actor: Any
    started: ray.ObjectRef
    in_flight: dict[ray.ObjectRef, Work] = field(default_factory=dict)
    asked: ray.ObjectRef | None = None  # for its progress, not answered yet
    tokens_seen: int = 0
    spared_seen: int = 0
    looked_at: float = field(default_factory=time.monotonic)
    moved: float = 0.0  # as it last said
    moved_at: float = field(default_factory=time.monotonic)  # when that last changed, or it had nothing to do
    tokens_done: int = 0
    busy_seconds: float = 0.0
    description: dict[str, Any] = field(default_factory=dict)
    is_ready: bool = False

    @property
    def room(self) -> int:
        """Units that it may hold."""
        return min(int(self.description.get("num_callers", 1)), MAX_CALLERS) + WAITING


def num_replicas(config: Config, tensor_parallel: int, units: int) -> int:
    """How many replicas a policy gets: no more than there are units; with auto as many as fit, on CPUs one per node."""
    wanted = config.workers.replicas
    if isinstance(wanted, int):
        return max(1, min(wanted, units))
    gpus = node_gpus()
    places = sum(here // tensor_parallel for here in gpus) if gpus else num_nodes()
    return max(1, min(places, units))


class Replicas:
    """The actors of one policy. None is detached: they end with `close`, or with the driver.

    They load beside whatever the driver does until `wait_ready`. Work begins when the first has started. One that
    finds no room on the cluster, or whose node is lost and has no other, holds nobody up: the others go on without it.
    """

    def __init__(self, config: Config, spec: ScoringSpec, count: int):
        self.config = config
        self.spec = spec
        self.events = Events()
        self.failed_starts = 0  # one after the other
        self.said_version = False
        self.calls = itertools.count()
        self.gpus = spec.policy.tensor_parallel if node_gpus() else 0  # of a replica
        processes = max(count, num_nodes()) * (1 if self.gpus else spec.policy.tensor_parallel)
        self.threads = max(1, num_slots(config.workers) // processes)  # of each
        self.metrics = ScoringMetrics(config.name, spec.policy_id, self.gpus)
        whose = f"the target, {spec.policy.model}" if spec.policy == config.target else spec.policy.model
        reporter().event(f"starting {count} engine{'s' * (count > 1)} for {whose}")
        self.replicas = [self._start() for _ in range(count)]
        for place in range(count):
            self.metrics.begin_replica(place)

    def close(self) -> None:
        """End every actor."""
        for replica in self.replicas:
            self._end(replica)

    def wait_ready(self, count: int) -> None:
        """Wait until `count` replicas have started. Raises StageError when that takes longer than START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while sum(replica.is_ready for replica in self.replicas) < min(count, len(self.replicas)):
            if time.monotonic() > deadline:
                raise self._no_engine()
            check_ray_is_alive()
            self._look_for_started(timeout=1.0)

    def _start(self) -> Replica:
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning costs twenty times the work where cores are shared
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_NO_USAGE_STATS": "1",
        }
        actor = ray.remote(self.spec.actor).options(
            num_cpus=ENGINE_CPUS,
            num_gpus=self.gpus,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_concurrency=MAX_CALLERS + WAITING + 3,
        )
        handle = actor.remote(self.spec, environment)
        return Replica(handle, handle.start.remote())  # type: ignore[attr-defined]

    def _look_for_started(self, timeout: float) -> None:
        starting = {replica.started: replica for replica in self.replicas if not replica.is_ready}
        if starting:
            for reference in wait(list(starting), num_returns=1, timeout=timeout):
                self._take_started(starting[reference])

    def _take_started(self, replica: Replica) -> None:
        """Note that a replica has started. Where that failed it is started again, and given up the third time."""
        try:
            replica.description = ray.get(replica.started, timeout=ANSWER_SECONDS)
            replica.is_ready = True
            self.failed_starts = 0
            if replica.description["engine"] == "vllm" and not self.said_version:
                self.said_version = True
                self._event(version_sentence(str(replica.description["version"])))
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._end(replica)
            raise_if_ours(error)
            self.failed_starts += 1
            if self.failed_starts < ATTEMPTS:
                self._event(f"an engine did not start ({short(error)}); starting it again")
                self._replace(replica)
                return
            self.replicas.remove(replica)
            if not self.replicas:
                raise StageError(f"the engine for {self.spec.policy.model} does not start: {short(error)}") from None
            self._event(f"an engine does not start ({short(error)}); going on with {len(self.replicas)}")

    def _no_engine(self) -> StageError:
        wanted = f"{self.gpus} free GPUs of one node" if self.gpus else "a node with CPUs"
        return StageError(
            f"no engine for {self.spec.policy.model} has started for {START_SECONDS // 60} minutes: "
            f"each needs {wanted}; see `ray status` for what the cluster has"
        )

    def _end(self, replica: Replica) -> None:
        with best_effort("end a scoring actor"):
            ray.kill(replica.actor)

    def _event(self, text: str) -> None:
        self.events.add(text)
        reporter().event(text)

    def descriptions(self) -> list[dict[str, Any]]:
        """What each replica is and did: its engine's description, GPUs, tokens per second and GPU seconds."""
        asked = [replica.actor.describe.remote() for replica in self.replicas if replica.is_ready]
        found = [one for one in answers(asked, ANSWER_SECONDS).values() if one is not None]
        for one in found:
            stats = one["stats"]
            seconds = stats["seconds"]
            stats["cache_hit_rate"] = stats.get("cached_tokens", 0.0) / max(1.0, stats["tokens"])
            stats["tokens_per_second"] = stats["tokens"] / seconds if seconds else 0.0
            stats["gpu_seconds"] = self.gpus * seconds
        return found

    def score(
        self,
        queue: WorkQueue[Work],
        advance: Callable[[int], None],
        look: Callable[[ScoreTotals], None] = lambda totals: None,
        may_give: Callable[[ScoreTotals], bool] = lambda totals: True,
    ) -> ScoreTotals:
        """Score every unit; `advance(tokens)` is called about once a second, `look(totals)` whenever one has ended: it
        may raise to stop. `may_give(totals)` is asked before a unit is given out: where it says no, those that wait
        are left, and the others are waited for."""
        totals = ScoreTotals()
        last_progress = last_ready = time.monotonic()
        while (queue and may_give(totals)) or any(replica.in_flight for replica in self.replicas):
            check_ray_is_alive()
            if any(replica.is_ready for replica in self.replicas):
                last_ready = time.monotonic()
            elif time.monotonic() - last_ready > START_SECONDS:
                raise self._no_engine()
            for replica in self.replicas:
                while queue and replica.is_ready and len(replica.in_flight) < replica.room and may_give(totals):
                    self._give(replica, queue.popleft())
            if not queue:
                self._rebalance()
            starting = {replica.started: replica for replica in self.replicas if not replica.is_ready}
            references = [reference for replica in self.replicas for reference in replica.in_flight]
            ready = wait([*references, *starting], num_returns=1, timeout=1.0)
            for reference in ready:
                if reference in starting:
                    self._take_started(starting[reference])
                else:
                    self._collect(reference, queue, totals)
                    look(totals)
            if time.monotonic() - last_progress >= 1.0:
                self._poll(advance)
                self.metrics.queue(len(queue) + sum(len(replica.in_flight) for replica in self.replicas))
                last_progress = time.monotonic()
                self._replace_stuck(queue, totals)
        self._poll(advance, wait=5.0)
        self.metrics.queue(0)
        return totals

    def _give(self, replica: Replica, work: Work) -> None:
        work.call = next(self.calls)
        reference = replica.actor.score.remote(work.call, work.unit, work.store_id, work.temperature)
        replica.in_flight[reference] = work

    def _collect(self, reference: ray.ObjectRef, queue: WorkQueue[Work], totals: ScoreTotals) -> None:
        replica = next(replica for replica in self.replicas if reference in replica.in_flight)
        oldest = next(iter(replica.in_flight)) == reference
        work = replica.in_flight.pop(reference)
        try:
            result: UnitResult | None = ray.get(reference, timeout=ANSWER_SECONDS)
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
        except (ray.exceptions.RayError, TimeoutError) as error:  # the process or its node is gone
            waiting = [work, *replica.in_flight.values()] if oldest else [*replica.in_flight.values(), work]
            replica.in_flight.clear()
            self._event(f"an engine died ({short(error)}); its {len(waiting)} shards are given to others")
            waiting[0].attempts += 1
            for lost in reversed(waiting):
                self._again(lost, f"its engine died: {short(error)}", queue, totals)
            self._replace(replica)
            return
        if result is None:  # taken back, although the answer to that was lost
            queue.appendleft(work)
            return
        self.metrics.unit_done(result.scored, result.reused, result.failed, result.seconds)
        totals.rows += result.scored
        totals.failed += result.failed
        totals.reused += result.reused
        totals.stopped += result.stopped
        totals.tokens += result.tokens
        totals.spared += result.spared
        totals.engine_seconds += result.seconds

    def _replace_stuck(self, queue: WorkQueue[Work], totals: ScoreTotals) -> None:
        """Take a replica for dead that has work and shows no progress for far longer than its work should take."""
        for replica in self.replicas:
            if not replica.is_ready or not replica.in_flight:
                replica.moved_at = time.monotonic()
                continue
            largest = max(work.unit.tokens for work in replica.in_flight.values())
            seconds = float(START_SECONDS)  # until it has shown a rate
            if replica.tokens_done:
                seconds = max(STUCK_SECONDS, STUCK_FACTOR * largest * replica.busy_seconds / replica.tokens_done)
            if time.monotonic() - replica.moved_at < seconds:
                continue
            reason = f"its engine made no progress for {seconds:.0f} seconds"
            self._event(f"an engine made no progress for {seconds:.0f} seconds and is replaced")
            waiting = list(replica.in_flight.values())
            waiting[0].attempts += 1
            for lost in reversed(waiting):
                self._again(lost, reason, queue, totals)
            self._replace(replica)

    def _is_usable(self, replica: Replica) -> bool:
        try:
            return bool(ray.get(replica.actor.is_usable.remote(), timeout=ANSWER_SECONDS))
        except (ray.exceptions.RayError, TimeoutError):
            return False

    def _replace(self, replica: Replica) -> None:
        """A new actor in the place of one that is dead or cannot go on."""
        check_ray_is_alive()
        self._end(replica)
        replica.in_flight.clear()
        self.metrics.restarted()
        fresh = self._start()
        replica.actor, replica.started, replica.is_ready = fresh.actor, fresh.started, False
        replica.asked, replica.tokens_seen, replica.moved, replica.moved_at = None, 0, 0.0, time.monotonic()
        replica.spared_seen = 0

    def _again(self, work: Work, reason: str, queue: WorkQueue[Work], totals: ScoreTotals) -> None:
        """Put a unit back in front. After the last attempt its halves get one each, until the row that fails stands
        alone: it is recorded as failed, and the others are scored."""
        if work.attempts >= ATTEMPTS:
            parts = halves(self.spec.workspace, work.unit)
            if not parts:
                totals.failed_units.append((work, reason))
                return
            for part in reversed(parts):
                self.metrics.retried()
                queue.appendleft(replace(work, unit=part, attempts=ATTEMPTS - 1))
            return
        self.metrics.retried()
        work.unit = replace(work.unit, check=True)
        queue.appendleft(work)

    def _rebalance(self) -> None:
        """Give units that wait at a busy replica to idle ones."""
        idle = [replica for replica in self.replicas if replica.is_ready and not replica.in_flight]
        for replica in idle:
            busiest = max(self.replicas, key=lambda other: len(other.in_flight))
            if len(busiest.in_flight) < 2:
                return
            reference, work = list(busiest.in_flight.items())[-1]
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                if ray.get(busiest.actor.take_back.remote(work.call), timeout=ANSWER_SECONDS):
                    del busiest.in_flight[reference]
                    self._give(replica, work)

    def _poll(self, advance: Callable[[int], None], wait: float = 0.1) -> None:
        """Take what replicas have answered about their progress; a lost one holds nobody up."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        for replica in ready:
            replica.asked = replica.asked or replica.actor.progress.remote()
        found = answers([replica.asked for replica in ready], wait)
        for place, replica in enumerate(self.replicas):
            if replica.asked not in found:
                continue
            answer, replica.asked = found[replica.asked], None
            if answer is None:
                continue
            seen, now = max(0, answer.done - replica.tokens_seen), time.monotonic()
            spared = max(0, answer.spared - replica.spared_seen)
            replica.tokens_done += seen
            replica.busy_seconds += now - replica.looked_at if replica.in_flight else 0.0
            self.metrics.replica(place, seen - spared, answer.cached_share)
            self.metrics.add("grape_tokens_spared", spared)
            replica.tokens_seen, replica.spared_seen, replica.looked_at = answer.done, answer.spared, now
            if answer.moved != replica.moved:
                replica.moved, replica.moved_at = answer.moved, now
            if seen:
                advance(seen)
            for event in answer.events:
                self._event(event)


def answers(references: Sequence[Any], seconds: float) -> dict[Any, Any]:
    """What was answered within some seconds: None by an actor that is lost."""
    if not references:
        return {}
    ready = wait(list(references), num_returns=len(references), timeout=seconds)
    found = dict.fromkeys(ready)
    for reference in ready:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            found[reference] = ray.get(reference, timeout=seconds)
    return found


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
