"""The windows of a pool's candidates, for select methods that score each step with what stands right before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grape_service.config.methods import SelectConfig
from grape_service.keys import windows_key
from grape_service.prepare.result import Prepared
from grape_service.score.shards import Shards, ShardWriter, shards_of_pool
from grape_service.score.store import ScoreStore
from grape_service.score.windows import WINDOW, WINDOW_READS, WINDOWS_FORMAT, windows_of
from grape_service.select.steps import Tokenizer, token_steps
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.rows import read_rows
from workers.scoring.work import ScoreTotals
from workers.stages.score import Scoring, score_shards

TITLE = "score windows"


def score_windows(run: Run, engines: Engines, prepared: Prepared, scored: ScoreTotals) -> ScoreTotals:
    """log p of every token of the pool in the window of its step: what `score` did, and this."""
    select = run.config.select
    store, key = ScoreStore(run.workspace, run.policy_id(run.config.target)), key_of_windows(prepared, select)
    with run.stage("score windows"):
        if run.config.workers.reuse != "exact" and store.is_complete(key):
            run.event(f"{TITLE}: all have stored scores, no engine is started")
            return scored
        windows = windows_of_pool(run, shards_of_pool(prepared))
        share = run.config.workers.max_failed_share
        totals = score_shards(run, engines, Scoring(run.config.target, TITLE, max_failed_share=share), windows)
        if totals.failed == 0 and not totals.failed_units:
            store.note_complete(key)
    return replace(
        scored,
        rows=scored.rows + totals.rows,
        reused=scored.reused + totals.reused,
        failed=scored.failed + totals.failed,
        tokens=scored.tokens + totals.tokens,
        engine_seconds=scored.engine_seconds + totals.engine_seconds,
        failed_units=[*scored.failed_units, *totals.failed_units],
    )


def write_windows(
    shards: Shards, storage: Storage, tokenizer: Tokenizer, select: SelectConfig, folder: str, shard_tokens: int
) -> Shards:
    """The windows of the rows of a partition as shards `<folder>/<partition>/*.parquet` of WINDOW (a Ray task)."""
    assert select.windows is not None, "this method scores windows"
    writer = ShardWriter(storage, f"{folder}/{shards.partition}", shards.partition, shard_tokens)
    vocabulary = tokenizer.vocabulary()
    columns = list(dict.fromkeys([*WINDOW.names, *WINDOW_READS]))
    for path in shards.paths:
        table = read_rows(storage, path, columns).combine_chunks()
        windows = windows_of(table, token_steps(table, vocabulary, select.step_end), select.windows)
        for part in windows.distinct().tables(table):
            writer.add(part)
    return writer.close()


def windows_of_pool(run: Run, shards: Sequence[Shards]) -> list[Shards]:
    """The windows of all rows of `shards`, in the run's folder."""
    workers = run.config.workers
    written = run_tasks(
        write_windows,
        ({"shards": one} for one in shards),
        workers,
        shared={
            "storage": run.workspace,
            "tokenizer": run.target_tokenizer,
            "select": run.config.select,
            "folder": f"{run.folder}/windows",
            "shard_tokens": workers.shard_tokens,
        },
        together=together(workers, len(shards)),
    )
    return [one for one in written if one.number]


def key_of_windows(prepared: Prepared, select: SelectConfig) -> str:
    """Names a scoring of the windows of a prepared pool that has ended; see `ScoreStore.note_complete`."""
    assert select.windows is not None, "this method scores windows"
    return windows_key(prepared.prepare_id, select.step_end, select.windows, WINDOWS_FORMAT)


def forget_windows(store: ScoreStore, prepared: Prepared, select: SelectConfig) -> None:
    """Some of the windows turned out to lack a score."""
    if select.windows is not None:
        store.forget_complete(key_of_windows(prepared, select))
