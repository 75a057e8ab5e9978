"""The select stage: from the shards of a partition and their scores to the rows that are kept.

Streams over shards of whole prompts. Held for the partition are the scores of its rows and, where
max_source_share is set, a few numbers per candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.config.schema import Config
from grape_service.rows.columns import (
    KEPT_COLUMNS,
    MARGIN_AT_LEAST,
    NO_SOURCE,
    SHARD,
    TARGET_FIELDS,
    computed_fields,
    kept_columns,
)
from grape_service.rows.prefill import prefills_of
from grape_service.rows.ragged import list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.rows.spans import are_told_by_tokens
from grape_service.rows.statistics import LOGPROB
from grape_service.score.stopped import Stopped, read_stopped
from grape_service.score.store import ScoreStore
from grape_service.score.tables import KeyIndex, RowKeys, ScoreTable
from grape_service.score.windows import WINDOW_READS
from grape_service.select.candidate_reader import CandidateReader
from grape_service.select.choose import KEPT, LEFT_OUT_REASONS, Candidates, Choice, choose, without
from grape_service.select.counts import SelectCounts, SourceCounts
from grape_service.select.limits import keep_column
from grape_service.select.race_rows import Race
from grape_service.select.ranking import Ranking
from grape_service.select.steps import STEP_READS, Tokenizer
from grape_service.select.windows import WindowScores, window_keys
from grape_service.storage.parquet import array_of, open_parquet, read_tables, write_parquet
from grape_service.storage.storage import Storage

SELECT_READS = ["row_key", "prompt_id", "candidate_id", "source", "loss_mask"]
"""The shard's columns that a choice depends on, beside those that the method and select.keep name."""


class SelectObserver(Protocol):
    """Sees what selection sees, so that a report need not read it again."""

    def add_candidates(self, candidates: Candidates, choice: Choice) -> None:
        """Called for whole prompts; the choice is final."""
        ...


@dataclass(frozen=True)
class SelectContext:
    """What select is given for all partitions."""

    storage: Storage
    config: Config
    store: ScoreStore | None
    """The target's scores; not looked at where the method needs none."""
    stop_ids: frozenset[int]
    """Tokens that end the target's turns."""
    tokenizer: Tokenizer | None = None
    """The target's, for methods that cut steps; without it a report compares with none of them."""
    stopped: ScoreStore | None = None
    """Rows that a race stopped; None where there was none."""
    cut_share: float = 1.0
    """Of the prompts whose responses are cut into steps for a report, where the choice does not cut them."""

    @property
    def race(self) -> Race | None:
        """How the candidates were raced."""
        return Race.of(self.config.select, self.config.score)


@dataclass(frozen=True)
class SelectPartition:
    """A partition that select works on."""

    name: str
    shards: Sequence[str]
    out_path: str


def select_partition(
    context: SelectContext,
    partition: SelectPartition,
    failures: RowKeys | None = None,
    observer: SelectObserver | None = None,
) -> SelectCounts:
    """Write the kept rows of a partition to its `out_path`, in the order of the shards: SELECT_READS of a row decide,
    and `columns.kept_columns` are added to it.

    `failures` are the keys of rows whose failure was reported. Raises StageError where a score does not fit its row.
    """
    storage, config, store, shards = context.storage, context.config, context.store, partition.shards
    select = config.select
    race = context.race
    computed = computed_fields(config.statistics, select.makes_select_score, race is not None)
    scores: dict[str, ScoreTable] | None = None
    stopped: Stopped | None = None
    if select.needs_scores:
        assert store is not None, "this selection needs scores"
        keys = [table["row_key"].combine_chunks() for table in read_tables(storage, shards, ["row_key"])]
        row_keys = pa.chunked_array(keys, type=pa.binary(16))
        scores = store.read_statistics(partition.name, row_keys, config.statistics)
        if race is not None:
            assert context.stopped is not None, "a race has stopped rows"
            stopped = read_stopped(context.stopped, partition.name, row_keys, config.statistics)
    vocabulary = context.tokenizer.vocabulary() if context.tokenizer is not None and scores is not None else None
    failed = KeyIndex(failures) if failures is not None else None
    windows = None
    if select.windows is not None:
        assert vocabulary is not None, "a method that cuts steps needs the tokenizer"
        assert store is not None, "windows are scored"
        window_tables = read_tables(storage, shards, WINDOW_READS)
        keys_of_rows = window_keys(window_tables, vocabulary, select.step_end, select.windows)
        windows = WindowScores(store, partition.name, keys_of_rows, failed)
    reader = CandidateReader(select, scores, failed, vocabulary, windows, race, stopped)
    reader.with_detail, reader.cut_share = observer is not None, context.cut_share
    counts = SelectCounts()

    def kept_tables() -> Iterator[pa.Table]:
        if select.max_source_share is None:
            for table in read_tables(storage, shards):
                rows = np.arange(reader.row, reader.row + table.num_rows)
                candidates = reader.read(table, counts)
                choice = choose(candidates, select)
                _count(counts, candidates, choice)
                _audit(counts, candidates, choice, select)
                if observer is not None:
                    observer.add_candidates(candidates, choice)
                kept = _kept_table(table, rows, candidates, choice, scores, computed)
                _count_kept(counts, kept, context.stop_ids)
                yield kept
            return
        wanted = [*SELECT_READS, keep_column(select), *(reader.method.columns if reader.method else ())]
        wanted += STEP_READS if vocabulary is not None else []
        columns = [name for name in dict.fromkeys(wanted) if name is not None]
        parts = [reader.read(table, counts) for table in read_tables(storage, shards, columns)]
        if not parts:
            return
        candidates = Candidates.concatenate(parts)
        choice = choose(candidates, select)
        _count(counts, candidates, choice)
        if observer is not None:
            observer.add_candidates(candidates, choice)
        row = 0
        for table in read_tables(storage, shards):
            end = row + table.num_rows
            part = choice.slice(row, end)
            kept = _kept_table(table, np.arange(row, end), candidates.slice(row, end), part, scores, computed)
            _count_kept(counts, kept, context.stop_ids)
            yield kept
            row = end

    write_parquet(storage, partition.out_path, _kept_schema(storage, shards, computed), kept_tables())
    return counts


def _kept_schema(storage: Storage, shards: Sequence[str], computed: list[pa.Field]) -> pa.Schema:
    if not shards:
        return pa.schema([*SHARD, *kept_columns(computed)])
    with open_parquet(storage, shards[0]) as file:
        return pa.schema([*file.schema_arrow.remove_metadata(), *kept_columns(computed)])


def _kept_table(
    table: pa.Table,
    rows: npt.NDArray[np.int64],
    candidates: Candidates,
    choice: Choice,
    tables: dict[str, ScoreTable] | None,
    computed: list[pa.Field],
) -> pa.Table:
    """The kept rows of a table with what was found out about them."""
    kept = np.flatnonzero(choice.kept)
    table = table.take(kept)
    columns: dict[str, pa.Array] = {"num_candidates": pa.array(choice.num_candidates[kept])}
    if tables is not None and candidates.scores is not None:
        for name, scores in tables.items():
            item = KEPT_COLUMNS[0] if name == LOGPROB else TARGET_FIELDS[name]
            lengths = offsets_from_lengths(scores.lengths[rows[kept]])
            values = scores.take(rows[kept]).astype(item.type.value_type.to_pandas_dtype(), copy=False)
            columns[item.name] = list_array(lengths, values, item.type.value_type)
        by_grape = choice.grape_ranking or choice.ranking
        assert by_grape is not None
        columns |= _ranked("grape", candidates.scores[kept], by_grape, kept)
    if candidates.method_scores is not None:
        assert choice.ranking is not None
        columns |= _ranked("select", candidates.method_scores[kept], choice.ranking, kept)
    if candidates.reach is not None and choice.ranking is not None:
        known = ~np.isnan(choice.ranking.margin[kept])
        columns[MARGIN_AT_LEAST.name] = pa.array(choice.ranking.at_least[kept], mask=~known)
    for item in kept_columns(computed):
        table = table.append_column(item, columns.get(item.name, pa.nulls(len(kept), item.type)))
    return table


def _count_kept(counts: SelectCounts, kept: pa.Table, stop_ids: frozenset[int]) -> None:
    """Tokens of kept rows, and what of them a release has to say."""
    offsets, mask = list_offsets_and_values(array_of(kept, "loss_mask"))
    _, ids = list_offsets_and_values(array_of(kept, "input_ids"))
    counts.kept_tokens += int(offsets[-1])
    counts.kept_loss_tokens += int((mask > 0).sum())
    counts.kept_with_tools += kept.num_rows - kept["tools"].null_count
    messages, prompt_messages = (kept[name].to_pylist() for name in ("messages", "num_prompt_messages"))
    counts.kept_with_prefill += sum(one is not None for one in prefills_of(messages, prompt_messages))
    told = are_told_by_tokens(ids, mask, offsets, stop_ids, messages, prompt_messages)
    counts.kept_not_told += int((~told).sum())


def _ranked(
    prefix: str, scores: npt.NDArray[np.float64], ranking: Ranking, kept: npt.NDArray[np.int64]
) -> dict[str, pa.Array]:
    rank = ranking.rank[kept]
    return {
        f"{prefix}_score": pa.array(scores, from_pandas=True),
        f"{prefix}_rank": pa.array(rank, mask=rank == 0),
        f"{prefix}_margin": pa.array(ranking.margin[kept], from_pandas=True),
    }


def _audit(counts: SelectCounts, c: Candidates, choice: Choice, select: SelectConfig) -> None:
    """Of audited prompts, whether what is kept is what would be kept without the candidates that the race stopped."""
    if c.audit_reach is None or c.scores is None:
        return
    audited = np.zeros(c.num_prompts, dtype=bool)
    audited[c.prompts[~np.isnan(c.audit_reach)]] = True
    audited &= choice.left_out == KEPT
    gone = np.isfinite(c.audit_reach) & np.isfinite(c.scores)
    raced = choose(without(c, gone), select)
    least = np.full(c.num_prompts, np.inf)
    np.minimum.at(least, c.prompts[raced.kept], c.scores[raced.kept])
    runs_on = gone & ~(c.audit_reach < least[c.prompts])  # stopped for fewer kept, or beside candidates that are gone
    if runs_on.any():
        raced = choose(without(c, gone & ~runs_on), select)
    differs = np.bincount(c.prompts[raced.kept != choice.kept], minlength=c.num_prompts) > 0
    counts.audited += int(audited.sum())
    counts.audited_same += int((audited & ~differs).sum())


def _count(counts: SelectCounts, candidates: Candidates, choice: Choice) -> None:
    counts.prompts += candidates.num_prompts
    counts.candidates += len(candidates.prompts)
    counts.kept_prompts += int((choice.left_out == KEPT).sum())
    counts.kept_rows += int(choice.kept.sum())
    if candidates.distinct is not None:
        counts.singletons += int(((choice.left_out == KEPT) & (candidates.distinct == 1)).sum())
    counts.passed_on += choice.passed_on
    row_reasons = choice.left_out[candidates.prompts]
    for reason, name in enumerate(LEFT_OUT_REASONS):
        num_prompts, num_rows = int((choice.left_out == reason).sum()), int((row_reasons == reason).sum())
        if reason == KEPT:
            num_rows = int((~choice.kept[row_reasons == KEPT]).sum())
            counts.rows_left_out["not chosen"] = counts.rows_left_out.get("not chosen", 0) + num_rows
        elif num_prompts:
            counts.prompts_left_out[name] = counts.prompts_left_out.get(name, 0) + num_prompts
            counts.rows_left_out[name] = counts.rows_left_out.get(name, 0) + num_rows
    for source, num_candidates in count_sources(candidates.sources).items():
        counts.sources.setdefault(source, SourceCounts()).candidates += num_candidates
    for source, num_kept in count_sources(candidates.sources.filter(pa.array(choice.kept))).items():
        counts.sources.setdefault(source, SourceCounts()).kept += num_kept


def count_sources(sources: pa.Array) -> dict[str, int]:
    """Rows of each source, sorted by name; NO_SOURCE for rows without."""
    counted = pc.value_counts(pc.fill_null(sources, NO_SOURCE)).to_pylist()
    return dict(sorted((item["values"], item["counts"]) for item in counted))
