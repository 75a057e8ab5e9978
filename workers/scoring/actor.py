"""The scoring actor: one engine in one process, fed with units of work, writing scores itself."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError
from grape_service.models.files import policy_id, resolve_model, text_digests
from grape_service.models.lean import collect_rarely, import_lean
from grape_service.rows.columns import FAILURE
from grape_service.rows.ragged import TokenBatch, list_offsets_and_values, offsets_from_lengths
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import open_small, write_parquet
from grape_service.storage.patience import be_patient
from grape_service.storage.storage import Storage
from workers.engines.base import Engine, OutOfMemory, invalid_rows
from workers.engines.canary import check_canary
from workers.engines.choose import imports_transformers, load_engine

Scores = dict[str, npt.NDArray[np.float32]]
"""Statistics by name, one value per token with loss."""

COLUMNS = ["row_key", "prompt_id", "candidate_id", "input_ids", "loss_mask", "prompt_len"]
SLICE_BATCHES = 4
"""Engine batches between two looks at the progress, about."""
SMALLEST_BUDGET = 64
"""A token budget below this is not worth going on with."""


@dataclass(frozen=True)
class Unit:
    """Rows of one file that are scored, retried and counted together."""

    path: str  # of a shard, relative to the workspace
    partition: str
    rows: int
    tokens: int
    check: bool  # some of its rows may have scores already: look before scoring
    statistics: tuple[str, ...] = ()  # that are made beside log-probabilities


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit."""

    scored: int  # rows
    failed: int  # rows
    reused: int  # rows that were scored before
    tokens: int  # that went through the engine
    seconds: float


@dataclass(frozen=True)
class ScoringSpec:
    """What an actor needs to know to score for one policy."""

    policy: PolicyConfig
    policy_id: str
    workspace: Storage
    run_id: str
    reuse: str  # compatible | exact
    text_digests: dict[str, str]  # of the run's tokenizer and chat template files


class ScoringActor:
    """One replica. Methods run in a few threads: some have the engine, others read, check and write."""

    def __init__(self, spec: ScoringSpec, environment: dict[str, str] | None = None):
        be_patient()
        os.environ.update(environment or {})  # before the engine's libraries, which read it once
        self.spec = spec
        self.callers = threading.Semaphore(1)
        self.state_lock = threading.Lock()
        self.tokens_done = 0
        self.waiting: set[int] = set()  # calls of score that are not on the engine yet
        self.taken_back: set[int] = set()
        self.events: deque[str] = deque()

    def start(self) -> dict[str, object]:
        """Load the model, check that it is the run's, and answer with the engine's description."""
        collect_rarely()
        spec = self.spec
        if imports_transformers(spec.policy):
            import_lean()
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
        self.engine: Engine = load_engine(local, files.folder)
        self.callers = threading.Semaphore(num_callers(self.engine))
        check_canary(self.engine, files.folder, spec.workspace, spec.policy_id, spec.reuse)
        return self.describe()

    def describe(self) -> dict[str, object]:
        """The engine's description and running counts, JSON-able."""
        return {
            **asdict(self.engine.description),
            "host": socket.gethostname(),
            "stats": self.engine.stats(),
            "pid": os.getpid(),
            "num_callers": num_callers(self.engine),
        }

    def progress(self) -> tuple[int, list[str], float]:
        """Tokens scored since the start, what happened since the last call, share of tokens found in the cache."""
        events = []
        while self.events:
            events.append(self.events.popleft())
        stats = self.engine.stats()
        return self.tokens_done, events, stats.get("cached_tokens", 0.0) / max(1.0, stats.get("tokens", 0.0))

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
            return self._score_unit(call, unit, store_id, temperature)
        finally:
            with self.state_lock:
                self.waiting.discard(call)
                self.taken_back.discard(call)

    def _score_unit(self, call: int, unit: Unit, store_id: str, temperature: float) -> UnitResult | None:
        store = ScoreStore(self.spec.workspace, store_id)
        table = read_rows(self.spec.workspace, unit.path)
        total = table.num_rows
        if unit.check:
            table = table.filter(pa.array(store.missing(unit.partition, table["row_key"], unit.statistics)))
        table = distinct_rows(table)
        batch = token_batch(table)
        with self.callers:
            with self.state_lock:
                if call in self.taken_back:
                    return None
                self.waiting.discard(call)
            started = time.monotonic()
            scores = self._score_batch(batch, unit.statistics, temperature)
            seconds = time.monotonic() - started
        bad = invalid_rows(scores, batch)
        good = np.ones(len(batch), dtype=bool)
        good[list(bad)] = False
        if good.any():
            self._store(store, unit, table, batch, scores, good)
        if bad:
            failed = table.take(list(bad))
            write_failures(self.spec.workspace, self.spec.run_id, store_id, unit, failed, list(bad.values()))
        return UnitResult(int(good.sum()), len(bad), total - len(batch), batch.num_tokens, seconds)

    def _score_batch(self, batch: TokenBatch, names: tuple[str, ...], temperature: float) -> Scores:
        loss_offsets = batch.loss_offsets
        scores = {name: np.full(int(loss_offsets[-1]), np.nan, dtype=np.float32) for name in ordered(names)}
        for start, stop in prompt_slices(batch, SLICE_BATCHES * self.engine.max_batch_tokens):
            rows = batch.take(np.arange(start, stop))
            for name, values in self._score_slice(rows, names, temperature).items():
                scores[name][loss_offsets[start] : loss_offsets[stop]] = values
            self.tokens_done += rows.num_tokens
        return scores

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
        self,
        store: ScoreStore,
        unit: Unit,
        table: pa.Table,
        batch: TokenBatch,
        scores: Scores,
        good: npt.NDArray[np.bool_],
    ) -> None:
        lengths = batch.loss_lengths
        kept = {name: values[np.repeat(good, lengths)] for name, values in scores.items()}
        keys = table["row_key"].combine_chunks().filter(pa.array(good))
        description = replace(self.engine.description, extra={})
        metadata = {key: str(value) for key, value in asdict(description).items() if key != "extra"}
        offsets, logprobs = offsets_from_lengths(lengths[good]), kept.pop(LOGPROB)
        store.write(unit.partition, keys, offsets, logprobs, metadata, shard=unit.path, statistics=kept)

    def close(self) -> None:
        """Free the device."""
        with self.callers:
            self.engine.close()


def num_callers(engine: Engine) -> int:
    """Units that may be on the engine at once: more than one where it mixes their steps."""
    return int(getattr(engine, "num_callers", 1))


def read_rows(storage: Storage, path: str, columns: list[str] = COLUMNS) -> pa.Table:
    """Columns of a shard; without more, those that scoring needs."""
    with open_small(storage, path) as file:
        return file.read(columns=columns)


def distinct_rows(table: pa.Table) -> pa.Table:
    """Without rows whose tokens stand there already: one score serves them all."""
    keys = table["row_key"].combine_chunks()
    first = np.unique(np.asarray(pc.index_in(keys, keys.unique())), return_index=True)[1]
    return table if len(first) == table.num_rows else table.take(np.sort(first))


def token_batch(table: pa.Table) -> TokenBatch:
    """A shard's rows as an engine takes them."""
    table = table.combine_chunks()
    offsets, ids = list_offsets_and_values(table["input_ids"].combine_chunks())
    _, mask = list_offsets_and_values(table["loss_mask"].combine_chunks())
    prompt_lens = table["prompt_len"].combine_chunks().to_numpy()
    return TokenBatch(ids.astype(np.int32, copy=False), mask > 0, offsets, prompt_lens.astype(np.int32, copy=False))


def prompt_slices(batch: TokenBatch, slice_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `slice_tokens` tokens that do not cut between rows with the same prompt."""
    start, tokens = 0, 0
    lengths = batch.lengths
    for row in range(len(batch)):
        if row > start and tokens >= slice_tokens and not _same_prompt(batch, row - 1, row):
            yield start, row
            start, tokens = row, 0
        tokens += int(lengths[row])
    if start < len(batch):
        yield start, len(batch)


def _same_prompt(batch: TokenBatch, left: int, right: int) -> bool:
    length = int(min(batch.prompt_lens[left], batch.prompt_lens[right]))
    first, second = int(batch.offsets[left]), int(batch.offsets[right])
    return bool((batch.input_ids[first : first + length] == batch.input_ids[second : second + length]).all())


def write_failures(
    workspace: Storage, run_id: str, policy_id: str, unit: Unit, rows: pa.Table, reasons: list[str]
) -> None:
    """Record rows that could not be scored, with the reason for each."""
    table = pa.table(
        {
            "row_key": rows["row_key"],
            "prompt_id": rows["prompt_id"],
            "candidate_id": rows["candidate_id"],
            "policy": pa.array([policy_id] * rows.num_rows, pa.string()),
            "reason": pa.array(reasons, pa.string()),
        }
    ).cast(FAILURE)
    name = unit.path.removesuffix(".parquet").replace("/", "-")
    path = f"runs/{run_id}/failures/{policy_id}-{name[-80:]}.parquet"
    write_parquet(workspace, path, FAILURE, table.to_batches())
