"""The scoring actor: one engine in one process, fed with units of work, writing scores itself."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError
from grape_service.models.files import policy_id, resolve_model, text_digests
from grape_service.models.imports import collect_rarely, import_without_extras
from grape_service.rows.ragged import TokenBatch, offsets_from_lengths
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.score.stopped import Limits, read_stopped, stopped_store, write_stopped
from grape_service.score.store import ScoreStore
from grape_service.select.race import Known
from grape_service.select.race_rows import RacedRows, take_stored
from grape_service.storage.options import wait_for_first_answer
from grape_service.storage.storage import Storage
from workers.cluster.closed import refuse_open_ray
from workers.engines.base import OutOfMemory
from workers.engines.canary import check_canary
from workers.engines.choose import imports_transformers, load_engine
from workers.logs import LogFile
from workers.scoring.failures import write_failures
from workers.scoring.race import Ends, Scores, Waves, race_slices, score_rest
from workers.scoring.rows import COLUMNS, distinct_rows, prompt_slices, read_unit, token_batch
from workers.scoring.turns import Turn, Turns
from workers.scoring.work import Progress, Unit, UnitResult

SLICE_BATCHES = 4
"""Engine batches between two looks at the progress, about."""
SMALLEST_BUDGET = 64
"""A token budget below this is not worth going on with."""


@dataclass(frozen=True)
class ScoringSpec:
    """What an actor needs to know to score for one policy."""

    policy: PolicyConfig
    policy_id: str
    workspace: Storage
    run_id: str
    reuse: str  # compatible | exact
    text_digests: dict[str, str]  # of the run's tokenizer and chat template files

    @property
    def actor(self) -> type[ScoringActor]:
        """What a replica is."""
        return ScoringActor


class ScoringActor:
    """One replica. Methods run in a few threads: some have the engine, others read, check and write."""

    def __init__(self, spec: ScoringSpec, environment: dict[str, str] | None = None):
        wait_for_first_answer()
        os.environ.update(environment or {})  # before the engine's libraries, which read it once
        self.spec = spec
        self.callers = threading.Semaphore(1)
        self.state_lock = threading.Lock()
        self.turns = Turns()
        self.tokens_done = 0
        self.tokens_spared = 0  # of those, what no engine has to compute
        self.waiting: set[int] = set()  # calls of score that are not on the engine yet
        self.taken_back: set[int] = set()
        self.events: deque[str] = deque()
        name = f"{type(self).__name__}-{socket.gethostname()}-{os.getpid()}"
        self.log = LogFile(spec.workspace, f"runs/{spec.run_id}/logs/{name}.log")

    def start(self) -> dict[str, object]:
        """Load the model, check that it is the run's, and answer with the engine's description."""
        self.log.begin()
        with self.log.errors():
            self._start()
        description = self.describe()
        self.log.say(f"started: {description}")
        return description

    def _start(self) -> None:
        refuse_open_ray()
        collect_rarely()
        spec = self.spec
        if imports_transformers(spec.policy):
            import_without_extras()
        files = resolve_model(spec.policy, spec.workspace.options)
        here = policy_id(spec.policy, files)
        if here != spec.policy_id:
            raise StageError(
                f"this replica's weights of {spec.policy.model} are not those of the run: "
                f"their id is {here}, expected {spec.policy_id}"
            )
        texts = text_digests(files.folder)
        if texts != spec.text_digests:
            names = {*texts, *spec.text_digests}
            differ = sorted(name for name in names if texts.get(name) != spec.text_digests.get(name))
            raise StageError(
                f"this replica's tokenizer or chat template of {spec.policy.model} is not that of the run: "
                f"{', '.join(differ)} differ; give every node the same model files"
            )
        local = spec.policy.model_copy(update={"adapter": files.adapter_folder})
        self.engine: Any = self.load(local, files.folder)
        self.callers = threading.Semaphore(num_callers(self.engine))

    def load(self, policy: PolicyConfig, folder: str) -> Any:
        """The engine, whose scores of the canary rows are those of earlier replicas; `policy.adapter` is local."""
        engine = load_engine(policy, folder)
        check_canary(engine, folder, self.spec.workspace, self.spec.policy_id, self.spec.reuse)
        return engine

    def describe(self) -> dict[str, object]:
        """The engine's description and running counts, JSON-able; asked before an actor is ended."""
        self.log.flush()
        return {
            **asdict(self.engine.description),
            "host": socket.gethostname(),
            "stats": self.engine.stats(),
            "pid": os.getpid(),
            "num_callers": num_callers(self.engine),
        }

    def progress(self) -> Progress:
        """How far it is."""
        events = []
        while self.events:
            events.append(self.events.popleft())
        stats = self.engine.stats()
        cached = stats.get("cached_tokens", 0.0) / max(1.0, stats.get("tokens", 0.0))
        return Progress(self.tokens_done, self.moved(), tuple(events), cached, self.tokens_spared)

    def moved(self) -> float:
        """See Progress."""
        return self.tokens_done

    def is_usable(self) -> bool:
        """Whether the engine can go on after an error; if not, this replica has to be replaced."""
        return bool(getattr(self.engine, "is_usable", True))

    def take_back(self, call: int) -> bool:
        """Give up a call of `score` that waits for the engine; False when it was begun, ended or did not come yet."""
        with self.state_lock:
            if call not in self.waiting:
                return False
            self.waiting.discard(call)
            self.taken_back.add(call)
            return True

    def score(self, call: int, unit: Unit, store_id: str, temperature: float = 1.0) -> UnitResult | None:
        """Score the rows of a unit that have no scores yet and store them; None when it was taken back.

        `call` is a number of this call's own; `store_id` is the policy id under which scores at this temperature
        are kept.
        """
        with self.state_lock:
            self.waiting.add(call)
        try:
            with self.log.errors():
                return self.score_unit(call, unit, store_id, temperature)
        finally:
            with self.state_lock:
                self.waiting.discard(call)
                self.taken_back.discard(call)

    @contextlib.contextmanager
    def on_engine(self, call: int) -> Iterator[Turn | None]:
        """The block has the engine; None where the call was taken back while it waited."""
        with self.callers:
            with self.state_lock:
                was_taken = call in self.taken_back
                self.waiting.discard(call)
            if was_taken:
                yield None
            else:
                with self.turns.turn() as turn:
                    yield turn

    def score_unit(self, call: int, unit: Unit, store_id: str, temperature: float) -> UnitResult | None:
        """`score`, whose bookkeeping of calls is around it."""
        storage, names, race = self.spec.workspace, unit.statistics, unit.race
        store = ScoreStore(storage, store_id)
        table = read_unit(storage, unit, COLUMNS if race is None else list(dict.fromkeys([*COLUMNS, *race.columns])))
        total = table.num_rows
        if unit.check and race is None:
            table = table.filter(pa.array(store.missing(unit.partition, table["row_key"], names)))
        unscored, table = table, distinct_rows(table)
        keys, batch = table["row_key"].combine_chunks(), token_batch(table)
        rows = RacedRows.of(race, unscored, names) if race is not None else None
        progress = rows.progress if rows is not None else Known.of(batch.loss_offsets, ordered(names))
        if unit.check or unit.partly:
            stopped = read_stopped(stopped_store(store), unit.partition, keys, names)
            if rows is not None:
                rows = rows.with_stored(store.read_statistics(unit.partition, keys, names), stopped)
            else:
                take_stored(progress, keys, None, stopped)
        before = progress.known.copy()
        was_whole = progress.whole
        waves = Waves(batch, lambda wave: self._score_slice(wave, names, temperature), self._add_done)
        with self.on_engine(call) as turn:
            if turn is None:
                return None
            progress.undivided[:] = ~self.engine.divides(batch.lengths)
            slices = prompt_slices(batch, SLICE_BATCHES * self.engine.max_batch_tokens)
            ends = Ends(before.copy(), np.full(len(before), np.inf))
            ended = race_slices(rows, waves, slices, ends) if rows is not None else score_rest(progress, waves, slices)
            through = 0
            for start, stop in ended:
                tokens = int(batch.offsets[stop] - batch.offsets[start])
                self._add_done(tokens - (waves.tokens - through), spared=True)
                through = waves.tokens
        scored, left = progress.whole & ~was_whole, ~progress.whole & ~progress.failed
        if rows is not None:
            stopped_at = replace(progress, known=ends.known)  # also of rows that were scored on for the audit
            limits, old = rows.limits_now(ends.known, ends.reach), rows.limits
            as_stored = (ends.known == before) & (limits.reach == old.reach) & (limits.method == old.method)
            self._store_stopped(
                store, unit, keys, stopped_at, ~stopped_at.whole & ~progress.failed & ~as_stored, limits
            )
        self._store(store, unit, keys, progress, scored)
        num_failed = 0
        if waves.reasons:
            place = pc.index_in(unscored["row_key"], keys.take(list(waves.reasons)))
            failed = unscored.filter(pc.is_valid(place))  # all that have those tokens
            reasons = pa.array(list(waves.reasons.values())).take(place.combine_chunks().drop_null())
            write_failures(storage, self.spec.run_id, store_id, unit, failed, reasons.to_pylist())
            num_failed = failed.num_rows
        num_scored, num_stopped = int(scored.sum()), int(left.sum())
        reused = total - num_scored - num_failed - num_stopped
        spared = int(waves.left(progress)[left].sum())
        return UnitResult(num_scored, num_failed, reused, waves.tokens, turn.seconds, num_stopped, spared)

    def _add_done(self, tokens: int, spared: bool = False) -> None:
        self.tokens_done += tokens
        self.tokens_spared += tokens * spared

    def _score_slice(self, batch: TokenBatch, names: tuple[str, ...], temperature: float) -> Scores:
        while True:
            try:
                if names:
                    return self.engine.score_statistics(batch, names, temperature)
                return {LOGPROB: self.engine.score(batch, temperature)}
            except OutOfMemory as error:
                budget = self.engine.max_batch_tokens
                if budget < SMALLEST_BUDGET:
                    raise StageError(f"the engine runs out of memory even at {budget} tokens: {error}") from None
                self.events.append(f"out of memory: token budget halved to {budget}")

    def _store(
        self, store: ScoreStore, unit: Unit, keys: pa.Array, progress: Known, rows: npt.NDArray[np.bool_]
    ) -> None:
        """Keep the scores of some rows [U], which are whole."""
        if not rows.any():
            return
        kept = progress.first_tokens(rows)
        offsets, logprobs = offsets_from_lengths(progress.known[rows]), kept.pop(LOGPROB)
        keys = keys.filter(pa.array(rows))
        store.write(unit.partition, keys, offsets, logprobs, self._made_by(), shard=unit.path, statistics=kept)

    def _store_stopped(
        self,
        store: ScoreStore,
        unit: Unit,
        keys: pa.Array,
        progress: Known,
        rows: npt.NDArray[np.bool_],
        limits: Limits,
    ) -> None:
        """Keep what is known of some rows [U] that were stopped."""
        if not rows.any():
            return
        offsets, keys = offsets_from_lengths(progress.known[rows]), keys.filter(pa.array(rows))
        kept, limits = progress.first_tokens(rows), limits.take(rows)
        write_stopped(
            stopped_store(store), unit.partition, keys, offsets, kept, limits, self._made_by(), shard=unit.path
        )

    def _made_by(self) -> dict[str, str]:
        """What score files say of the engine."""
        description = self.engine.description
        made_by = {key: str(value) for key, value in asdict(replace(description, extra={})).items() if key != "extra"}
        torch = description.extra.get("torch")
        return made_by if torch is None else {**made_by, "torch": str(torch)}

    def close(self) -> None:
        """Free the device."""
        with self.callers:
            self.engine.close()
        self.log.end()


def num_callers(engine: Any) -> int:
    """Units that may be on the engine at once: more than one where it mixes their steps."""
    return int(getattr(engine, "num_callers", 1))
