"""Which rows have no score yet, in units that engines take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.score.shards import Shards, ShardWriter
from grape_service.score.stopped import read_stopped, stopped_store
from grape_service.score.store import ScoreStore
from grape_service.select.race_rows import Race, RacedRows
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.rows import COLUMNS, read_rows
from workers.scoring.work import Unit


@dataclass(frozen=True)
class Unscored:
    """What is to be scored of a partition: some of its shards as they are, and shards that were put together."""

    shards: Shards
    whole: npt.NDArray[np.int32] | None = None
    """Which shards; None for all of them."""
    rest: Shards | None = None
    stored: int = 0
    """Rows that have a score."""
    stopped: int = 0
    """Rows that a race had stopped, and that stay so."""
    statistics: tuple[str, ...] = ()
    """What is made beside log-probabilities."""
    race: Race | None = None
    """Between the candidates of a prompt."""
    has_stored: bool = False
    """Something is stored of rows of the partition, whole or in part."""

    @property
    def num_units(self) -> int:
        whole = self.shards.number if self.whole is None else len(self.whole)
        return whole + (self.rest.number if self.rest is not None else 0)

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units()) if self.whole is not None else self.shards.tokens

    def units(self) -> Iterator[Unit]:
        """A unit for each shard, made as it is asked for."""
        whole = range(self.shards.number) if self.whole is None else self.whole.tolist()
        for shards, places in ((self.shards, whole), (self.rest, range(self.rest.number if self.rest else 0))):
            for place in places:
                assert shards is not None
                rows, tokens = shards.part(shards.rows, place), shards.part(shards.tokens, place)
                yield Unit(
                    shards.paths[place],
                    shards.partition,
                    rows,
                    tokens,
                    check=self.race is not None and self.has_stored,
                    statistics=self.statistics,
                    race=self.race,
                    partly=self.has_stored,
                )


def plan_units(
    run: Run, store_id: str, shards: Sequence[Shards], statistics: tuple[str, ...] = (), race: Race | None = None
) -> list[Unscored]:
    """What is to be scored of each partition. Those without any score are not looked at."""
    store = ScoreStore(run.workspace, store_id).with_folders()
    stopped = stopped_store(store).with_folders()
    scored = [one for one in shards if store.related(one.partition) or stopped.related(one.partition)]
    workers = run.config.workers
    planned = run_tasks(
        plan_partition,
        ({"shards": one} for one in scored),
        workers,
        shared={
            "store": store,
            "stopped": stopped,
            "race": race,
            "folder": f"{run.folder}/todo/{store_id}",
            "shard_tokens": workers.shard_tokens,
            "statistics": statistics,
        },
        together=together(workers, len(scored)),
    )
    found = {one.shards.partition: one for one in planned}
    return [found.get(one.partition) or Unscored(one, statistics=statistics, race=race) for one in shards]


def plan_partition(
    shards: Shards,
    store: ScoreStore,
    stopped: ScoreStore,
    folder: str,
    shard_tokens: int,
    statistics: tuple[str, ...] = (),
    race: Race | None = None,
) -> Unscored:
    """What is to be scored of a partition (a Ray task).

    A shard without any score is a unit as it is. What is missing of the others is put together in files of
    about `shard_tokens` tokens, so that a pool that grew by a tenth is a tenth of the work in full units. A race gets
    whole prompts: those of which a row is not settled.
    """
    storage, partition = store.storage, shards.partition
    has_stopped = bool(stopped.related(partition))
    columns = ["row_key"] if race is None else race.columns
    tables = [read_rows(storage, path, columns) for path in shards.paths]
    table = pa.concat_tables(tables)
    left = 0
    if race is None:
        missing = store.missing(partition, table["row_key"], statistics)
    else:
        rows = stored_rows(race, table, store, stopped, partition, statistics)
        missing = rows.of_prompts(rows.running())
        left = int((~rows.progress.whole[rows.contest.rows] & ~missing).sum())
    whole: list[int] = []
    rest = ShardWriter(storage, f"{folder}/{partition}", partition, shard_tokens)
    ends = np.cumsum([table.num_rows for table in tables])[:-1]
    columns = list(dict.fromkeys([*COLUMNS, *columns]))
    for place, here in enumerate(np.split(missing, ends)):
        if here.all():
            whole.append(place)
        elif here.any():
            rest.add(read_rows(storage, shards.paths[place], columns).filter(pa.array(here)))
    return Unscored(
        shards,
        np.array(whole, dtype=np.int32),
        rest.close(),
        int((~missing).sum()) - left,
        left,
        statistics,
        race,
        has_stored=race is not None or has_stopped,
    )


def stored_rows(
    race: Race, table: pa.Table, store: ScoreStore, stopped: ScoreStore, partition: str, names: Iterable[str]
) -> RacedRows:
    """Candidates of whole prompts with what is stored of them."""
    rows = RacedRows.of(race, table, names)
    found = read_stopped(stopped, partition, rows.keys, names)
    return rows.with_stored(store.read_statistics(partition, rows.keys, names), found)
