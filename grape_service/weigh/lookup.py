"""The scores that the rows of a partition have under their several policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.rows.ragged import Int64s, gather_rows
from grape_service.score.store import KeyIndex, ScoreStore, ScoreTable
from grape_service.storage.parquet import array_of, read_row_groups
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import RowBehaviors


@dataclass(frozen=True)
class BehaviorScores:
    """Scores of one behavior policy, and the rows that it scored.

    `row_paths` are Parquet files with a row for each kept row of the policy's sources that it could render:
    `target_row_key`, the policy's own `row_key`, and `turn_end_differs`, true where its turn end is
    another token.
    """

    store: ScoreStore
    row_paths: Sequence[str]


@dataclass(frozen=True)
class BehaviorRows:
    """The kept rows of one behavior policy: M of the N kept rows."""

    rows: Int64s  # [M] places among the kept rows
    keys: pa.Array  # [M] row keys in the policy's own rendering
    turn_end_differs: npt.NDArray[np.bool_]  # [M]


BEHAVIOR_ROW_COLUMNS = pa.schema(
    [
        pa.field("target_row_key", pa.binary(16)),
        pa.field("row_key", pa.binary(16)),
        pa.field("turn_end_differs", pa.bool_()),
    ]
)


class RowScores:
    """Scores that some of N rows have; a row's may come from any of several tables."""

    def __init__(self, num_rows: int):
        self.table = np.full(num_rows, -1, dtype=np.int64)  # which table, -1 for none
        self.place = np.zeros(num_rows, dtype=np.int64)  # where in it
        self.usable = np.zeros(num_rows, dtype=bool)
        self.tables: list[ScoreTable] = []

    def add(self, rows: Int64s, table: ScoreTable) -> None:
        """`table` holds the scores of `rows`, in that order."""
        self.table[rows] = len(self.tables)
        self.place[rows] = np.arange(len(rows))
        self.usable[rows] = table.finite()
        self.tables.append(table)

    def fill(self, flat: npt.NDArray[np.float32], offsets: Int64s, rows: Int64s, keys: pa.Array) -> None:
        """Put the usable scores of `rows` [N] into their places in a flat array [L].

        Raises StageError where a score is not as long as its row, naming the row by its key in `keys`.
        """
        for number, table in enumerate(self.tables):
            local = np.flatnonzero((self.table[rows] == number) & self.usable[rows])
            places = self.place[rows[local]]
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
    storage: Storage, keys: pa.Array, behaviors: RowBehaviors, behavior_scores: list[BehaviorScores]
) -> tuple[list[BehaviorRows], RowBehaviors]:
    """What each behavior policy calls its kept rows; rows that it could not render become nobody's."""
    found = []
    for number, scores in enumerate(behavior_scores):
        rows = np.flatnonzero(behaviors.policy == number)
        scored = read_columns(storage, scores.row_paths, BEHAVIOR_ROW_COLUMNS)
        index = KeyIndex(scored["target_row_key"])
        first = np.zeros(index.num_unique, dtype=np.int64)
        first[index.inverse[::-1]] = np.arange(scored.num_rows)[::-1]
        places = index.places(keys.take(pa.array(rows)))
        there = places >= 0
        behaviors = behaviors.without_rendering(rows[~there])
        scored = scored.take(pa.array(first[places[there]]))
        differs = scored["turn_end_differs"].to_numpy()
        found.append(BehaviorRows(rows[there], array_of(scored.combine_chunks(), "row_key"), differs))
    return found, behaviors


def read_columns(storage: Storage, paths: Sequence[str], schema: pa.Schema) -> pa.Table:
    """Columns of all rows of some files, in one chunk each."""
    tables = [table for path in paths for table in read_row_groups(storage, path, schema.names)]
    return pa.concat_tables(
        [schema.empty_table(), *(table.select(schema.names).cast(schema) for table in tables)]
    ).combine_chunks()


def read_scores(
    storage: Storage,
    partition: str,
    keys: pa.Array,
    behaviors: RowBehaviors,
    target_store: ScoreStore | None,
    statistics: Sequence[str],
    behavior_scores: list[BehaviorScores],
    behavior_rows: list[BehaviorRows],
    at_temperature: dict[float, ScoreStore],
) -> PartitionScores:
    """Read the scores of the kept rows with these `keys` [N]; a score that does not exist is not usable.

    `statistics` are what is read of the target beside log-probabilities.
    """
    num_rows = len(keys)
    target = None
    if target_store is not None:
        target = {}
        for name, table in target_store.read_statistics(partition, keys, statistics).items():
            target[name] = RowScores(num_rows)
            target[name].add(np.arange(num_rows), table)
    tempered = RowScores(num_rows)
    for temperature, store in sorted(at_temperature.items()):
        rows = np.flatnonzero(behaviors.temperature == temperature)
        tempered.add(rows, store.read(partition, keys.take(pa.array(rows))))

    behavior, turn_end_differs = RowScores(num_rows), np.zeros(num_rows, dtype=bool)
    for scores, found in zip(behavior_scores, behavior_rows, strict=True):
        behavior.add(found.rows, scores.store.read(partition, found.keys))
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
