"""What a race will spare: it is run on scores that are there, of some shards, without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.schema import Config
from grape_service.rows.ragged import Int64s, gather_rows
from grape_service.score.shards import Shards
from grape_service.score.stopped import read_stopped, stopped_store
from grape_service.score.store import ScoreStore
from grape_service.select.race import SourceResults, race
from grape_service.select.race_rows import Race, RacedRows
from grape_service.storage.parquet import array_of, read_tables

SAMPLED_SHARDS = 16
"""From which prompts with scores are taken, drawn anew from the same seed each time."""


@dataclass(frozen=True)
class RaceSaving:
    """What a race spares of the prompts whose candidates are all scored, or were stopped."""

    prompts: int
    loss_tokens: int
    spared: int  # of them

    @property
    def share(self) -> float | None:
        """Of response tokens; None where no prompt has scores."""
        return self.spared / self.loss_tokens if self.loss_tokens else None

    def sentence(self) -> str:
        """In words."""
        if self.share is None:
            return (
                "what score.race spares is not known: no prompt of the sample has scores yet; the figures are those of "
                "race: off"
            )
        return (
            f"score.race would spare {self.share:.0%} of the response tokens of {self.prompts:,} prompts that have "
            "scores; prompts are read anyhow, and the figures are those of race: off"
        )


def race_saving(config: Config, pool: Sequence[Shards], store: ScoreStore) -> RaceSaving | None:
    """Race the prompts of some shards by the scores that are stored of them; None where the config does not race."""
    settings = Race.of(config.select, config.score)
    if settings is None:
        return None
    everywhere = [(shards.partition, path) for shards in pool for path in shards.paths]
    chosen = random.Random(0).sample(everywhere, min(SAMPLED_SHARDS, len(everywhere)))
    prompts = loss_tokens = spared = 0
    for partition, path in chosen:
        for table in read_tables(store.storage, [path], settings.columns):
            found = _raced(settings, table, store, partition, config.statistics)
            prompts, loss_tokens, spared = (
                prompts + found.prompts,
                loss_tokens + found.loss_tokens,
                spared + found.spared,
            )
    return RaceSaving(prompts, loss_tokens, spared)


def _raced(
    settings: Race, table: pa.Table, store: ScoreStore, partition: str, statistics: tuple[str, ...]
) -> RaceSaving:
    """Of the prompts of a shard whose candidates all have scores, or were stopped by an earlier race: what that spared,
    or what this one would."""
    keys = array_of(table, "row_key")
    missing = store.missing(partition, pa.chunked_array([keys]), statistics)
    stopped = missing & (read_stopped(stopped_store(store), partition, keys, statistics).known > 0)
    lacking = pc.unique(table["prompt_id"].filter(pa.array(missing & ~stopped)))
    table = table.filter(pc.invert(pc.is_in(table["prompt_id"], value_set=lacking)))
    if not table.num_rows:
        return RaceSaving(0, 0, 0)
    rows = RacedRows.of(settings, table, statistics)
    total = rows.progress.total
    if stopped.any():  # the prompts of which nothing was stopped are not a sample of all
        ends = read_stopped(stopped_store(store), partition, rows.keys, statistics).known
        known = np.where(store.missing(partition, pa.chunked_array([rows.keys]), statistics), ends, total)
    else:
        known = _ends(rows, store, partition)
    return RaceSaving(len(rows.prompt_ids), int(total.sum()), int((total - known).sum()))


def _ends(rows: RacedRows, store: ScoreStore, partition: str) -> Int64s:
    """How many tokens of each row [U] are scored in a race; all rows have scores."""
    stored = store.read_statistics(partition, rows.keys, rows.names)
    flat = {name: one.take(np.arange(len(rows.keys))) for name, one in stored.items()}

    def more(places: Int64s, begins: Int64s, ends: Int64s) -> dict[str, npt.NDArray[np.float32]]:
        taken = gather_rows(rows.progress.offsets[:-1][places] + begins, ends - begins)
        return {name: values[taken] for name, values in flat.items()}

    raced = replace(rows, estimates=True)
    race(raced.contest, raced.progress, raced.stand, more, SourceResults(), doubling=rows.race.risk > 0)
    return np.where(raced.audited(), raced.progress.total, raced.progress.known)
