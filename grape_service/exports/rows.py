"""Rows of a release in batches, with what exports ask of their weights, and how they are written."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.exports.effects import Level
from grape_service.exports.summary import Target
from grape_service.models.local_vocabulary import vocabulary_of
from grape_service.release.load import Release
from grape_service.release.token_ids import refuse_unknown_ids
from grape_service.rows.columns import PREFILL, release_schema
from grape_service.rows.keys import in_eval_share
from grape_service.rows.messages import whole_message
from grape_service.rows.ragged import Int64s, list_offsets_and_values, segment_sums
from grape_service.storage.parquet import open_writer, row_groups

BATCH_ROWS = 512
BATCH_BYTES = 16 * 2**20
"""Bytes in memory of the rows that are read at a time, about; a longer row is read alone."""
FILE_BYTES = 1024 * 2**20
"""Bytes in memory of a Parquet file, about: 200 to 400 MB on disk."""
TINY = np.float32(2.0**-126)
"""Stands for a weight of 0 on a token with loss where a trainer takes weight 0 for no loss and counts tokens by it:
the smallest normal float32, whose share of a gradient is lost in rounding."""


def batches(release: Release, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The release's rows with those columns, a few hundred at a time, in order.

    Raises UserError for a token id that the release's target does not have, as far as its tokenizer is on this machine.
    """
    num_ids, model, num_rows = 2**31, "the release's target", 0
    if "input_ids" in columns:
        target = release.manifest.config.get("target")
        vocabulary = vocabulary_of(target)
        num_ids, model = (vocabulary.size, str(target["model"])) if vocabulary and target else (num_ids, model)
    for file in release.manifest.files:
        row_bytes = 16 * file.tokens // max(1, file.rows) + 1
        with release.open_checked(file) as parquet:
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
            for batch in parquet.iter_batches(rows, columns=list(columns)):
                if "input_ids" in columns:
                    refuse_unknown_ids(batch, num_ids, model, release.reference, num_rows)
                num_rows += batch.num_rows
                yield batch


def split_batches(release: Release, columns: Sequence[str], target: Target, split: str) -> Iterator[pa.RecordBatch]:
    """`batches` of the rows for training, or of those for evaluation, that the target wants. A prompt's rows are all in
    one of both."""
    if not target.eval_share and not target.whole_turns:
        yield from batches(release, columns)
        return
    for batch in batches(release, list(dict.fromkeys(["prompt_id", *columns, *([PREFILL.name] * target.whole_turns)]))):
        is_wanted = np.ones(batch.num_rows, bool)
        if target.eval_share:
            chosen = [in_eval_share(prompt, target.eval_share) for prompt in batch.column("prompt_id").to_pylist()]
            is_wanted = np.array(chosen, bool) == (split == "eval")
        if target.whole_turns:
            is_wanted &= batch.column(PREFILL.name).is_null().to_numpy(zero_copy_only=False)
        kept = batch.filter(pa.array(is_wanted))
        if kept.num_rows:
            yield kept.select(list(columns))


def other_columns(release: Release) -> list[str]:
    """The columns that a pool brought along, its tools among them, and statistics."""
    ours = set(release_schema([], []).names)
    return [name for name in release.schema.names if name not in ours]


def message_fields(release: Release) -> list[str]:
    """The fields of a release's messages."""
    return [item.name for item in release.schema.field("messages").type.value_type]


def row_weights(batch: pa.RecordBatch) -> npt.NDArray[np.float64]:
    """Mean weight of each row [N] over its tokens with loss."""
    mask_offsets, mask = list_offsets_and_values(batch.column("loss_mask"))
    _, weights = list_offsets_and_values(batch.column("loss_weights"))
    mask = mask.astype(bool)
    return segment_sums(np.where(mask, weights, 0.0), mask_offsets) / np.maximum(segment_sums(mask, mask_offsets), 1)


def loss_spans(batch: pa.RecordBatch) -> Int64s:
    """Stretches of tokens with loss in each row [N]: the turns that the policy wrote."""
    offsets, mask = list_offsets_and_values(batch.column("loss_mask"))
    mask = mask.astype(bool)
    before = np.zeros(len(mask), bool)
    before[1:] = mask[:-1]
    before[offsets[:-1][offsets[:-1] < len(mask)]] = False
    return segment_sums(mask & ~before, offsets)


@dataclass
class WeightTotals:
    """What is seen of the weights while rows pass."""

    rows: int = 0
    total: float = 0.0  # of the rows' mean weights
    tokens: int = 0  # with loss
    weighted: bool = False  # whether a token with loss has another weight than 1
    varies: bool = False  # whether two tokens of a row do

    def add(self, batch: pa.RecordBatch) -> None:
        """Look at `loss_mask` and `loss_weights` of a batch."""
        offsets, mask = list_offsets_and_values(batch.column("loss_mask"))
        _, weights = list_offsets_and_values(batch.column("loss_weights"))
        mask = mask.astype(bool)
        self.rows += batch.num_rows
        self.total += float(row_weights(batch).sum())
        self.tokens += int(np.count_nonzero(mask))
        self.weighted = self.weighted or bool((weights[mask] != 1.0).any())
        if not self.varies:
            row = np.repeat(np.arange(batch.num_rows), segment_sums(mask, offsets))
            self.varies = bool(((np.diff(weights[mask]) != 0) & (np.diff(row) == 0)).any())

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The same batches, looked at."""
        for batch in batches:
            self.add(batch)
            yield batch

    def notes(self, drop_weights: bool) -> list[str]:
        """A line where nothing would be trained."""
        if not self.tokens:
            return ["No token has loss, so that nothing would be trained."]
        nothing = self.weighted and not self.total and not drop_weights
        return ["All loss weights are 0, so that nothing would be trained."] if nothing else []

    @property
    def unweighted_words(self) -> str:
        """Of rows without another weight than 1, as part of a sentence."""
        return "in which every token has weight 1" if self.tokens else "in which no token has loss"

    @property
    def level(self) -> Level:
        """How the weights vary."""
        return "token" if self.varies else "sequence" if self.weighted else "uniform"


def weights_for_counting(batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
    """Flat `loss_weights` [T], TINY in the place of 0 on tokens with loss."""
    _, mask = list_offsets_and_values(batch.column("loss_mask"))
    _, weights = list_offsets_and_values(batch.column("loss_weights"))
    return np.where(mask.astype(bool), np.maximum(weights, TINY), 0.0).astype(np.float32)


def system_prompt_of(release: Release) -> str | None:
    """The system prompt of the policy that rendered a release's rows: it is among their tokens, not their messages."""
    return release.manifest.rendered_with[0]


def chat_messages(row: list[dict[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """A row's messages as trainers know them: without empty fields, tool calls as objects, and begun by the target's
    system prompt where they bring none, so that the template makes the row's own tokens of them."""
    messages = [whole_message(message) for message in row]
    if system_prompt is None or messages[0].get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def arrays_of(batch: pa.RecordBatch, name: str, values: npt.NDArray | None = None) -> list[npt.NDArray]:
    """A list column's rows as arrays, for orjson; `values` in the place of its own."""
    offsets, own = list_offsets_and_values(batch.column(name))
    values = np.ascontiguousarray(own if values is None else values)
    return [values[start:end] for start, end in itertools.pairwise(offsets.tolist())]


def write_parquet(
    target: Target, folder: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> tuple[int, list[str]]:
    """Write rows as <folder>/part-00000.parquet and so on, each of about FILE_BYTES in memory.

    Returns the number of rows and the file names; without rows there is one file that has none.
    """
    groups = row_groups(batches, schema)
    group = next(groups, None)
    rows = 0
    names: list[str] = []
    while group is not None or not names:
        names.append(f"{folder}/part-{len(names):05d}.parquet")
        filled = 0
        with target.storage.open_write(names[-1]) as file, open_writer(file, schema) as writer:
            while group is not None and (filled == 0 or filled + group.nbytes <= FILE_BYTES):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
                filled += group.nbytes
                rows += group.num_rows
                group = next(groups, None)
    return rows, names


def carried_columns(release: Release, tokens: Sequence[str], drop_weights: bool) -> list[str]:
    """`tokens` and every other column of the release that is not a list of numbers, in the release's order."""
    left = {"loss_weights", "weight_source"} if drop_weights else set()
    return [
        field.name
        for field in release.schema
        if field.name not in left and (field.name in tokens or not _is_number_list(field.type))
    ]


def left_behind(release: Release, kept: Sequence[str]) -> list[str]:
    """What of the release is not in an export with the columns `kept`; labels and loss_mask stand for each other."""
    have = set(kept)
    if have & {"labels", "loss_mask"}:
        have |= {"labels", "loss_mask"}
    return [name for name in release.schema.names if name not in have]


def _is_number_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return bool(pa.types.is_primitive(kind.value_type))
