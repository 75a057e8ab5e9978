"""The steps of candidates: where the text of their tokens is cut, as the target's tokenizer spells it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.models.files import folder_here, resolve_model
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.loading import load_renderer
from grape_service.rows.columns import LOSS_TURN_END
from grape_service.rows.ragged import Int64s, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.spans import span_starts
from grape_service.rows.steps import step_numbers, step_starts
from grape_service.storage.options import StorageOptions
from grape_service.storage.parquet import array_of

STEP_READS = ["input_ids", "loss_mask"]
"""The shard's columns that steps depend on."""


@dataclass(frozen=True)
class Tokenizer:
    """The target's tokenizer, where a task finds it."""

    policy: PolicyConfig
    render: RenderConfig
    options: StorageOptions  # of storage
    folder: str | None = None  # of the model's files, on the machine of the driver

    def vocabulary(self) -> Vocabulary:
        """What its ids stand for. Raises UserError where the model is no longer there."""
        folder = (
            resolve_model(self.policy, self.options).folder
            if self.folder is None
            else folder_here(self.policy, self.folder, self.options)
        )
        return load_renderer(folder, self.policy, self.render, storage_options=self.options).vocabulary


def token_steps(table: pa.Table, vocabulary: Vocabulary, step_end: str) -> Int64s:
    """The step, from 0 in its row, of each token with loss [L] of a table with STEP_READS."""
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    _, ids = list_offsets_and_values(array_of(table, "input_ids"))
    has_loss = mask > 0
    loss_ids, is_text = ids[has_loss], mask[has_loss] != LOSS_TURN_END
    text, starts = vocabulary.spelled(loss_ids[is_text])
    lengths = np.zeros(len(loss_ids), dtype=np.int64)
    lengths[is_text] = np.diff(starts)
    spans = span_starts(has_loss, offsets)[has_loss]
    first = step_starts(text, offsets_from_lengths(lengths), spans, re.compile(step_end))
    return step_numbers(first, offsets_from_lengths(segment_sums(has_loss, offsets)))
