"""How many windows a pool has, and their tokens: what a select method that scores them adds to a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.models.vocabulary import Vocabulary
from grape_service.prepare.result import Prepared
from grape_service.rows.candidate import Rendered
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.score.shards import shards_of_pool
from grape_service.score.store import ScoreStore
from grape_service.score.windows import WINDOW_READS, Windows, windows_of
from grape_service.select.steps import token_steps
from grape_service.storage.parquet import read_tables


def windows_of_rendered(rendered: Sequence[Rendered], vocabulary: Vocabulary, select: SelectConfig) -> tuple[int, int]:
    """Windows of some rows, a prompt's next to each other, and their tokens."""
    if not rendered:
        return 0, 0
    offsets = offsets_from_lengths([len(row.input_ids) for row in rendered])
    columns = {
        "input_ids": list_array(offsets, np.concatenate([row.input_ids for row in rendered]), pa.int32()),
        "loss_mask": list_array(offsets, np.concatenate([row.loss_mask for row in rendered]), pa.uint8()),
        "prompt_len": pa.array([row.prompt_len for row in rendered], pa.int32()),
    }
    windows = _windows(pa.table(columns), vocabulary, select)
    return len(windows), int(windows.lengths.sum())


def windows_left(
    prepared: Prepared, store: ScoreStore, vocabulary: Vocabulary, select: SelectConfig
) -> tuple[int, int, int]:
    """Windows of a prepared pool, those of them without a score, and the tokens of these."""
    total = rows = tokens = 0
    for shards in shards_of_pool(prepared):
        keys, lengths = [], []
        for table in read_tables(store.storage, shards.paths, WINDOW_READS):
            windows = _windows(table, vocabulary, select)
            keys.append(windows.keys())
            lengths.append(windows.lengths)
        missing = store.missing(shards.partition, pa.chunked_array(keys, pa.binary(16)))
        total, rows = total + len(missing), rows + int(missing.sum())
        tokens += int(np.concatenate(lengths)[missing].sum())
    return total, rows, tokens


def _windows(table: pa.Table, vocabulary: Vocabulary, select: SelectConfig) -> Windows:
    assert select.windows is not None, "this method scores windows"
    return windows_of(table, token_steps(table, vocabulary, select.step_end), select.windows).distinct()
