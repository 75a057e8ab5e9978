"""The select stage: from the shards of a partition and their scores to the rows that are kept.

Streams over shards of whole prompts. Held for the partition are the scores of its rows and, where
max_source_share is set, a few numbers per candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.config.schema import Config
from grape_service.rows.columns import LOSS_TOKEN, NO_SOURCE, SHARD, made_fields
from grape_service.rows.counts import Counts
from grape_service.rows.ragged import list_array, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB, TARGET_FIELDS
from grape_service.score.store import KeyIndex, RowKeys, ScoreStore, ScoreTable
from grape_service.select.choose import KEPT, LEFT_OUT_REASONS, Candidates, Choice, Detail, choose, random_keys
from grape_service.select.grape import Ranking, grape_scores
from grape_service.select.limits import keep_column, prompt_limits
from grape_service.select.methods import OURS, TokenStatistics, method_scores, select_method, token_statistics
from grape_service.storage.parquet import array_of, open_parquet, read_tables, write_parquet
from grape_service.storage.storage import Storage

KEPT_COLUMNS = [
    pa.field("target_logprobs", pa.list_(pa.float32())),  # one per token with loss; null where none was needed
    pa.field("grape_score", pa.float64()),
    pa.field("grape_rank", pa.int32()),
    pa.field("grape_margin", pa.float64()),
    pa.field("num_candidates", pa.int32(), nullable=False),
]
"""What every kept row has after the shard's columns."""

CHOICE_COLUMNS = ["row_key", "prompt_id", "candidate_id", "source", "loss_mask"]
"""The shard's columns that a choice depends on."""


@dataclass
class SourceCounts(Counts):
    """Rows of one source."""

    candidates: int = 0
    kept: int = 0


@dataclass
class SelectCounts(Counts):
    """What selection saw, kept and left out."""

    prompts: int = 0
    candidates: int = 0
    kept_prompts: int = 0
    kept_rows: int = 0
    kept_tokens: int = 0
    kept_loss_tokens: int = 0
    failed_candidates: int = 0
    """Rows that were to be scored and have no usable score."""
    unexplained_failures: int = 0
    """Of those, the ones that no failure was reported for."""
    not_finite: int = 0
    """Of those, the ones with an infinite or NaN score."""
    nothing_counted: int = 0
    """Rows of which no token counts in grape_score; they never win."""
    singletons: int = 0
    """Kept prompts with one distinct response: there was nothing to choose."""
    passed_on: int = 0
    """Wins that max_source_share passed to another source."""
    prompts_left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)
    """Rows of prompts that were left out, by the prompt's reason; 'not chosen' for those of kept prompts."""
    sources: dict[str, SourceCounts] = field(default_factory=dict)


class SelectObserver(Protocol):
    """Sees what selection sees, so that a report need not read it again."""

    def add_candidates(self, candidates: Candidates, choice: Choice) -> None:
        """Called for whole prompts; the choice is final."""
        ...


def select_partition(
    storage: Storage,
    partition: str,
    shards: Sequence[str],
    store: ScoreStore | None,
    config: Config,
    failures: RowKeys | None,
    out_path: str,
    observer: SelectObserver | None = None,
) -> SelectCounts:
    """Write the kept rows of a partition to `out_path`, in the order of the shards.

    `store` holds the target's scores; it is not looked at where the method needs none. `failures` are the
    keys of rows whose failure was reported. Raises StageError where a score does not fit its row.
    """
    select = config.select
    made = made_fields(config.statistics, select.makes_select_score)
    scores: dict[str, ScoreTable] | None = None
    if select.needs_scores:
        assert store is not None, "this selection needs scores"
        keys = [table["row_key"].combine_chunks() for table in read_tables(storage, shards, ["row_key"])]
        scores = store.read_statistics(partition, pa.chunked_array(keys, type=pa.binary(16)), config.statistics)
    reader = _CandidateReader(select, scores, KeyIndex(failures) if failures is not None else None)
    reader.with_detail = observer is not None
    counts = SelectCounts()

    def kept_tables() -> Iterator[pa.Table]:
        if select.max_source_share is None:
            for table in read_tables(storage, shards):
                rows = np.arange(reader.row, reader.row + table.num_rows)
                candidates = reader.read(table, counts)
                choice = choose(candidates, select)
                _count(counts, candidates, choice)
                if observer is not None:
                    observer.add_candidates(candidates, choice)
                yield _kept_table(table, rows, candidates, choice, scores, made, counts)
            return
        wanted = [*CHOICE_COLUMNS, keep_column(select), *(reader.method.columns if reader.method else ())]
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
            yield _kept_table(table, np.arange(row, end), candidates.slice(row, end), part, scores, made, counts)
            row = end

    write_parquet(storage, out_path, _kept_schema(storage, shards, made), kept_tables())
    return counts


def kept_columns(made: list[pa.Field]) -> list[pa.Field]:
    """What a kept row has after the shard's columns: `made` are those of `made_fields`."""
    return [*KEPT_COLUMNS[:-1], *made, KEPT_COLUMNS[-1]]


def _kept_schema(storage: Storage, shards: Sequence[str], made: list[pa.Field]) -> pa.Schema:
    if not shards:
        return pa.schema([*SHARD, *kept_columns(made)])
    with open_parquet(storage, shards[0]) as file:
        return pa.schema([*file.schema_arrow.remove_metadata(), *kept_columns(made)])


class _CandidateReader:
    """Turns tables of whole prompts into Candidates, in the order of the rows that `scores` has."""

    def __init__(self, select: SelectConfig, scores: dict[str, ScoreTable] | None, failures: KeyIndex | None):
        self.select = select
        self.method = select_method(select)
        self.scores = scores
        self.finite = {name: table.finite() for name, table in (scores or {}).items()}
        self.failures = failures
        self.row = 0
        self.last_prompt: pa.Scalar = None
        self.with_detail = False

    def read(self, table: pa.Table, counts: SelectCounts) -> Candidates:
        """The next candidates; counts those that have failed."""
        prompt_ids = array_of(table, "prompt_id").dictionary_encode()
        row_keys = array_of(table, "row_key")
        first, last = table["prompt_id"][0], table["prompt_id"][-1]
        assert first != self.last_prompt, f"prompt {first} lies in two shards"
        self.last_prompt = last
        order = pc.sort_indices(
            table.select(["candidate_id", "row_key"]), [("candidate_id", "ascending"), ("row_key", "ascending")]
        )
        ties = np.empty(table.num_rows, dtype=np.int64)
        ties[order.to_numpy()] = np.arange(table.num_rows)
        offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
        loss_tokens = segment_sums(mask > 0, offsets)
        values, other, failed = None, None, np.zeros(table.num_rows, dtype=bool)
        tokens = TokenStatistics({}, offsets_from_lengths(loss_tokens), ~failed)
        counted = mask[mask > 0] == LOSS_TOKEN
        if self.select.count_turn_end:
            counted = np.ones(len(counted), dtype=bool)
        if self.scores is not None:
            rows = np.arange(self.row, self.row + table.num_rows)
            tokens = token_statistics(self.scores, self.finite, rows, loss_tokens, row_keys)
            values, other, failed = self._scores(tokens, rows, row_keys, mask, counted, counts)
        chosen_by, others = None, {}
        if self.method is not None and self.method.name != "grape":
            chosen_by = method_scores(self.method, table, tokens, counted)
            if self.scores is None:
                counts.nothing_counted += int(np.isnan(chosen_by).sum())
        detail = None
        if self.with_detail:
            if self.scores is not None:
                others = {
                    name: method.oriented(method_scores(method, table, tokens, counted))
                    for name, method in OURS.items()
                    if name not in ("grape", self.select.method) and set(method.statistics) <= self.scores.keys()
                }
            detail = Detail(prompt_ids.dictionary, segment_sums(counted, tokens.offsets), other, others)
        random = None
        if self.select.method == "random" or self.select.max_source_share is not None:
            random = random_keys(self.select.seed, array_of(table, "prompt_id"), array_of(table, "candidate_id"))
        self.row += table.num_rows
        prompts = prompt_ids.indices.to_numpy().astype(np.int64)
        distinct, keep = prompt_limits(table, prompts, len(prompt_ids.dictionary), self.select)
        return Candidates(
            prompts=prompts,
            num_prompts=len(prompt_ids.dictionary),
            ties=ties,
            sources=array_of(table, "source"),
            loss_tokens=loss_tokens,
            scores=values,
            failed=failed,
            random=random,
            detail=detail,
            distinct=distinct,
            keep=keep,
            method_scores=chosen_by,
            smallest_wins=self.method is not None and self.method.better == "smallest",
        )

    def _scores(
        self,
        tokens: TokenStatistics,
        rows: npt.NDArray[np.int64],
        row_keys: pa.Array,
        mask: npt.NDArray[np.uint8],
        counted: npt.NDArray[np.bool_],
        counts: SelectCounts,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None, npt.NDArray[np.bool_]]:
        """grape_score of each row, the same with the turn end the other way, and which rows have failed."""
        assert self.scores is not None
        logprobs, finite = tokens.values[LOGPROB], tokens.usable
        found = np.logical_and.reduce([table.found[rows] for table in self.scores.values()])
        usable = np.repeat(finite, np.diff(tokens.offsets))
        values = grape_scores(logprobs, usable & counted, tokens.offsets)
        other = None
        if self.with_detail:
            other_way = usable & (mask[mask > 0] == LOSS_TOKEN) if self.select.count_turn_end else usable
            other = grape_scores(logprobs, other_way, tokens.offsets)
        reported = self.failures.places(row_keys) >= 0 if self.failures is not None else np.zeros(len(rows), dtype=bool)
        counts.failed_candidates += int((~finite).sum())
        counts.unexplained_failures += int((~found & ~reported).sum())
        counts.not_finite += int((found & ~finite).sum())
        counts.nothing_counted += int((finite & np.isnan(values)).sum())
        return values, other, ~finite


def _kept_table(
    table: pa.Table,
    rows: npt.NDArray[np.int64],
    candidates: Candidates,
    choice: Choice,
    tables: dict[str, ScoreTable] | None,
    made: list[pa.Field],
    counts: SelectCounts,
) -> pa.Table:
    """The kept rows of a table with what was found out about them; counts their tokens."""
    kept = np.flatnonzero(choice.kept)
    table = table.take(kept)
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    counts.kept_tokens += int(offsets[-1])
    counts.kept_loss_tokens += int((mask > 0).sum())
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
    for item in kept_columns(made):
        table = table.append_column(item, columns.get(item.name, pa.nulls(len(kept), item.type)))
    return table


def _ranked(
    prefix: str, scores: npt.NDArray[np.float64], ranking: Ranking, kept: npt.NDArray[np.int64]
) -> dict[str, pa.Array]:
    rank = ranking.rank[kept]
    return {
        f"{prefix}_score": pa.array(scores, from_pandas=True),
        f"{prefix}_rank": pa.array(rank, mask=rank == 0),
        f"{prefix}_margin": pa.array(ranking.margin[kept], from_pandas=True),
    }


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
