"""The scores that the rows of a partition have under their several policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import StageError
from grape_service.rows.columns import BEHAVIOR_ROW_COLUMNS, NO_SOURCE
from grape_service.rows.keys import candidate_keys
from grape_service.rows.ragged import Int64s, gather_rows, list_offsets_and_values, segment_sums
from grape_service.score.store import ScoreStore
from grape_service.score.tables import KeyIndex, ScoreTable
from grape_service.storage.parquet import array_of, read_row_groups
from grape_service.storage.storage import Storage
from grape_service.weigh.align import NOT_COMPARED, one_to_one, shared_logprobs
from grape_service.weigh.behavior import LOW_COVERAGE, NOT_RENDERED, RowBehaviors
from grape_service.weigh.counts import AlignedCounts


@dataclass(frozen=True)
class BehaviorScores:
    """Scores of one behavior policy, and the rows that it scored.

    `row_paths` are Parquet files with a row for each kept row of the policy's sources that it could render:
    BEHAVIOR_ROW_COLUMNS: the candidate, `target_row_key`, the policy's own `row_key`, and `turn_end_differs`, true
    where its turn end is another token.
    """

    store: ScoreStore
    row_paths: Sequence[str]


@dataclass(frozen=True)
class BehaviorRows:
    """The kept rows of one behavior policy: M of the N kept rows."""

    rows: Int64s  # [M] places among the kept rows
    keys: pa.Array  # [M] row keys in the policy's own rendering
    turn_end_differs: npt.NDArray[np.bool_]  # [M]
    aligned: AlignedSpans | None = None  # [M]; None where the policy shares the target's tokens


@dataclass(frozen=True)
class AlignedSpans:
    """The spans of the tokens with loss of M rows, under the target and under a policy with another tokenizer."""

    target: pa.ListArray  # [M]
    own: pa.ListArray  # [M]

    def take(self, rows: Int64s) -> AlignedSpans:
        """Those of some rows."""
        return AlignedSpans(self.target.take(pa.array(rows)), self.own.take(pa.array(rows)))

    def flat(self) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """Offsets and spans of both, a number of its own for each span of each row."""
        offsets, ours = list_offsets_and_values(self.target)
        own_offsets, theirs = list_offsets_and_values(self.own)
        most = int(max(ours.max(initial=-1), theirs.max(initial=-1))) + 1
        found = []
        for bounds, spans in ((offsets, ours), (own_offsets, theirs)):
            rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
            found += [bounds, np.where(spans == NOT_COMPARED, NOT_COMPARED, spans + rows * most)]
        return found[0], found[1], found[2], found[3]


class RowScores:
    """Scores that some of N rows have; a row's may come from any of several tables."""

    def __init__(self, num_rows: int):
        self.table = np.full(num_rows, -1, dtype=np.int64)  # which table, -1 for none
        self.place = np.zeros(num_rows, dtype=np.int64)  # where in it
        self.usable = np.zeros(num_rows, dtype=bool)
        self.tables: list[ScoreTable] = []
        self.aligned: list[AlignedSpans | None] = []

    def add(self, rows: Int64s, table: ScoreTable, aligned: AlignedSpans | None = None) -> None:
        """`table` holds the scores of `rows`, in that order; `aligned` where they are of other tokens."""
        self.aligned.append(aligned)
        self.table[rows] = len(self.tables)
        self.place[rows] = np.arange(len(rows))
        self.usable[rows] = table.finite()
        self.tables.append(table)

    @property
    def has_unknown(self) -> bool:
        """Whether some token of a row of other tokens is compared with none."""
        return any(
            one is not None and bool((list_offsets_and_values(one.target)[1] == NOT_COMPARED).any())
            for one in self.aligned
        )

    def fill(
        self,
        flat: npt.NDArray[np.float32],
        offsets: Int64s,
        rows: Int64s,
        keys: pa.Array,
        target: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Put the usable scores of `rows` [N] into their places in a flat array [L]; those of other tokens as they
        stand beside the `target`'s [L].

        Raises StageError where a score is not as long as its row, naming the row by its key in `keys`.
        """
        for number, (table, aligned) in enumerate(zip(self.tables, self.aligned, strict=True)):
            local = np.flatnonzero((self.table[rows] == number) & self.usable[rows])
            places = self.place[rows[local]]
            if aligned is not None:
                assert target is not None, "what is shared among spans needs the target's log-probabilities"
                bounds, spans, own_bounds, own_spans = aligned.take(places).flat()
                check_lengths(np.diff(bounds), np.diff(offsets)[local], keys, local)
                check_lengths(table.lengths[places], np.diff(own_bounds), keys, local)
                index = gather_rows(offsets[local], np.diff(bounds))
                flat[index] = shared_logprobs(target[index], spans, table.take(places), own_spans)
                continue
            check_lengths(table.lengths[places], np.diff(offsets)[local], keys, local)
            flat[gather_rows(offsets[local], table.lengths[places])] = table.take(places)


@dataclass(frozen=True)
class PartitionScores:
    """All scores that the weights of a partition's N kept rows need."""

    target: dict[str, RowScores] | None
    """The target's statistics at temperature 1, by name; None where the kept rows bring them."""
    tempered: RowScores
    """The target's of rows that were recorded at another temperature, at that one."""
    behavior: RowScores
    turn_end_differs: npt.NDArray[np.bool_]  # [N]


def find_behavior_rows(
    storage: Storage,
    keys: pa.Array,
    behaviors: RowBehaviors,
    behavior_scores: list[BehaviorScores],
    min_coverage: float = 0.0,
    counts: dict[str, AlignedCounts] | None = None,
) -> tuple[list[BehaviorRows], RowBehaviors]:
    """What each behavior policy calls the kept rows with these `keys` [N], those of their tokens under the target; rows
    that it could not render become nobody's, and those of other tokens of which less than `min_coverage` is compared
    one with one. `counts` by source get what was compared.

    Rows are found by their candidate: the target may render two prompts alike that the behavior policy tells apart.
    Raises StageError where a candidate was rendered twice, or from other tokens than it has now.
    """
    found = []
    for number, scores in enumerate(behavior_scores):
        rows = np.flatnonzero(behaviors.policy == number)
        scored = read_columns(storage, scores.row_paths, BEHAVIOR_ROW_COLUMNS)
        index = KeyIndex(candidate_keys(array_of(scored, "prompt_id"), array_of(scored, "candidate_id")))
        if index.num_unique != scored.num_rows:
            raise StageError(f"a candidate was rendered twice for a behavior policy, in {scores.row_paths[0]}")
        place_of = np.empty(index.num_unique, dtype=np.int64)
        place_of[index.inverse] = np.arange(scored.num_rows)
        wanted = behaviors.candidates.take(pa.array(rows)).combine_chunks()
        places = index.places(candidate_keys(array_of(wanted, "prompt_id"), array_of(wanted, "candidate_id")))
        there = places >= 0
        behaviors = behaviors.without(rows[~there], NOT_RENDERED)
        scored = scored.take(pa.array(place_of[places[there]])).combine_chunks()
        now, then = keys.take(pa.array(rows[there])), array_of(scored, "target_row_key")
        if not now.equals(then):
            place = pc.index(pc.equal(now, then), False).as_py()
            raise StageError(
                f"candidate {scored['candidate_id'][place].as_py()!a} of prompt {scored['prompt_id'][place].as_py()!a} "
                "was rendered for a behavior policy from other tokens than it has now"
            )
        differs = scored["turn_end_differs"].to_numpy(zero_copy_only=False)
        mine = BehaviorRows(rows[there], array_of(scored, "row_key"), differs)
        if scored.num_rows and scored["target_spans"].null_count == 0:
            spans = AlignedSpans(array_of(scored, "target_spans"), array_of(scored, "own_spans"))
            coverage = count_aligned(spans, behaviors.sources.take(pa.array(mine.rows)), min_coverage, counts)
            enough = np.flatnonzero(coverage >= min_coverage)
            behaviors = behaviors.without(mine.rows[coverage < min_coverage], LOW_COVERAGE)
            taken = mine.keys.take(pa.array(enough))
            mine = BehaviorRows(mine.rows[enough], taken, differs[enough], spans.take(enough))
        found.append(mine)
    return found, behaviors


def count_aligned(
    spans: AlignedSpans, sources: pa.Array, min_coverage: float, counts: dict[str, AlignedCounts] | None
) -> npt.NDArray[np.float64]:
    """The share of each row's tokens [M] that are in spans of one token each; `counts` by source get what was found."""
    offsets, ours, _, theirs = spans.flat()
    single, _ = one_to_one(ours, theirs)
    coverage = segment_sums(single, offsets) / np.maximum(1, np.diff(offsets))
    if counts is not None:
        _count_by_source(counts, sources, offsets, ours, single, coverage < min_coverage)
    return coverage


def _count_by_source(
    counts: dict[str, AlignedCounts],
    sources: pa.Array,
    offsets: Int64s,
    spans: Int64s,
    single: npt.NDArray[np.bool_],
    low: npt.NDArray[np.bool_],
) -> None:
    """Add rows [M] with tokens [L] in spans, each with a number of its own, to the `counts` of their sources."""
    coded = sources.fill_null(NO_SOURCE).dictionary_encode()
    of_row = coded.indices.to_numpy()
    of_token = np.repeat(of_row, np.diff(offsets))
    there = spans != NOT_COMPARED
    _, first, lengths = np.unique(spans[there], return_index=True, return_counts=True)
    of_span = of_token[there][first]
    for code, name in enumerate(coded.dictionary.to_pylist()):
        rows, tokens = of_row == code, of_token == code
        sizes, numbers = np.unique(lengths[of_span == code], return_counts=True)
        by_size = dict(zip(map(str, sizes.tolist()), numbers.tolist(), strict=True))
        found = AlignedCounts(
            int(rows.sum()), int(low[rows].sum()), int(tokens.sum()), int(single[tokens].sum()), by_size
        )
        counts[name] = counts.get(name, AlignedCounts()) + found


def read_columns(storage: Storage, paths: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Columns of all rows of some files, in one chunk each."""
    tables = [table for path in paths for table in read_row_groups(storage, path, schema.names)]
    return pa.concat_tables(
        [schema.empty_table(), *(table.select(schema.names).cast(schema) for table in tables)]
    ).combine_chunks()


@dataclass(frozen=True)
class Stores:
    """Where the scores are that weights need and the kept rows do not bring."""

    target: ScoreStore | None = None
    """None where the kept rows bring their target_logprobs."""
    behaviors: Sequence[ScoreStore] = ()
    """In the order of config.behavior.policies()."""
    at_temperature: Mapping[float, ScoreStore] = field(default_factory=dict)
    """The target's with its logits divided by a temperature, for rows that were recorded at that one."""
    repeat: ScoreStore | None = None
    """A second scoring of some rows by the target, for the comparison of the target with itself."""


def read_scores(
    stores: Stores,
    partition: str,
    keys: pa.Array,
    behaviors: RowBehaviors,
    behavior_rows: list[BehaviorRows],
    statistics: Sequence[str],
) -> PartitionScores:
    """Read the scores of the kept rows with these `keys` [N]; a score that does not exist is not usable.

    `statistics` are what is read of the target beside log-probabilities.
    """
    num_rows = len(keys)
    target = None
    if stores.target is not None:
        target = {}
        for name, table in stores.target.read_statistics(partition, keys, statistics).items():
            target[name] = RowScores(num_rows)
            target[name].add(np.arange(num_rows), table)
    tempered = RowScores(num_rows)
    for temperature, store in sorted(stores.at_temperature.items()):
        rows = np.flatnonzero(behaviors.temperature == temperature)
        tempered.add(rows, store.read(partition, keys.take(pa.array(rows))))

    behavior, turn_end_differs = RowScores(num_rows), np.zeros(num_rows, dtype=bool)
    for store, found in zip(stores.behaviors, behavior_rows, strict=True):
        behavior.add(found.rows, store.read(partition, found.keys), found.aligned)
        turn_end_differs[found.rows] = found.turn_end_differs
    return PartitionScores(target, tempered, behavior, turn_end_differs)


def check_lengths(found: Int64s, wanted: Int64s, keys: pa.Array, rows: Int64s) -> None:
    """Raises StageError naming the first of `rows`, places in `keys`, that has more or fewer scores than tokens."""
    wrong = np.flatnonzero(found != wanted)
    if len(wrong):
        place = int(wrong[0])
        raise StageError(
            f"row {keys[int(rows[place])].as_py().hex()} has {wanted[place]} tokens with loss "
            f"but {found[place]} log-probabilities are stored for it"
        )
