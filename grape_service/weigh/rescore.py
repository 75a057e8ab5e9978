"""Shards that are made of kept rows: what the behavior policies score, and the target at a temperature.

A behavior policy renders the prompt with its own template; the response's token ids are the target's, so
its scores stand token for token beside the target's. A recorded temperature divides the target's logits
too, so those rows are scored again by the target at that temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.config.policy import BehaviorConfig, PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.models.files import folder_here
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.loading import load_renderer, load_same_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import TEMPLATE_KWARGS, Candidate, Rejection, Rendered, Row
from grape_service.rows.columns import LOSS_TURN_END, RESCORED, SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths
from grape_service.score.shards import Shards, ShardWriter
from grape_service.select.steps import Tokenizer
from grape_service.storage.parquet import array_of, open_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.align import Spans, align, written_of
from grape_service.weigh.behavior import RowBehaviors, row_behaviors

BATCH_ROWS = 1024
SPANS = ("target_spans", "own_spans")


@dataclass(frozen=True)
class Group:
    """Kept rows that one policy scores: a behavior policy, or the target at a temperature."""

    name: str  # a folder
    policy: PolicyConfig
    policy_id: str
    folder: str  # of the model's files, on the machine of the driver
    temperature: float
    place: int | None  # in config.behavior.policies(); None for the target
    same_turn_ends: frozenset[int] | None = None
    """Of the target's turn ends those that are the same token in this policy's tokenizer; None: all of them."""
    is_aligned: bool = False
    """Whether this policy's tokenizer is another: it renders tokens of its own, compared by the bytes they cover."""
    has_own_template: bool = True
    """See `Config.has_own_template`."""
    rendering: str | None = None
    """Digest of a behavior policy's renderer on the machine of the driver; None: any will do."""

    @property
    def is_target(self) -> bool:
        return self.place is None


@dataclass(frozen=True)
class GroupShards:
    """What `write_group_shards` wrote for a group."""

    shards: Shards
    unrenderable: int  # rows that the behavior policy's template cannot take; they have no behavior


def rows_of_group(group: Group, behaviors: RowBehaviors) -> npt.NDArray[np.int64]:
    """The rows that a group scores."""
    if group.place is not None:
        return np.flatnonzero(behaviors.policy == group.place)
    if group.temperature == 1.0:
        return np.arange(len(behaviors.policy))
    return np.flatnonzero(behaviors.temperature == group.temperature)


def write_group_shards(
    storage: Storage,
    partition: str,
    kept_path: str,
    out_folder: str,
    groups: list[Group],
    behavior: BehaviorConfig | None,
    render: RenderConfig,
    target_turn_end_id: int | None,
    shard_tokens: int,
    target: Tokenizer | None = None,
) -> dict[str, GroupShards]:
    """Write the rows of a partition's kept file that each group scores as shards `<out_folder>/<group>/*.parquet`:
    the columns of SHARD become those of RESCORED. `target` is the target's tokenizer, for groups that are aligned."""
    renderers = {group.name: _renderer_here(group, render, storage) for group in groups if not group.is_target}
    writers = {
        group.name: ShardWriter(storage, f"{out_folder}/{group.name}", partition, shard_tokens) for group in groups
    }
    unrenderable = dict.fromkeys(writers, 0)
    for batch in kept_batches(storage, kept_path):
        behaviors = row_behaviors(batch, behavior) if behavior is not None else RowBehaviors.not_asked(batch)
        for group in groups:
            chosen = batch.take(pa.array(rows_of_group(group, behaviors)))
            if chosen.num_rows == 0:
                continue
            if group.is_target:
                table = target_rows(chosen)
            elif group.is_aligned:
                assert target is not None, "tokens are compared with the target's"
                table = aligned_rows(chosen, renderers[group.name], target.vocabulary())
            else:
                table = behavior_rows(chosen, renderers[group.name], target_turn_end_id, group.same_turn_ends)
                unrenderable[group.name] += chosen.num_rows - table.num_rows
            writers[group.name].add(table)
    return {name: GroupShards(writer.close(), unrenderable[name]) for name, writer in writers.items()}


def _renderer_here(group: Group, render: RenderConfig, storage: Storage) -> Renderer:
    """A behavior policy's renderer on this machine. Raises StageError where it is not that of the run."""
    options = storage.options
    parts = folder_here(group.policy, group.folder, options), group.policy, render, group.has_own_template, options
    return load_renderer(*parts) if group.rendering is None else load_same_renderer(group.rendering, *parts)


def kept_batches(storage: Storage, path: str) -> Iterator[pa.Table]:
    """The columns of kept rows that are needed to render them again."""
    with open_parquet(storage, path) as file:
        names = [*SHARD.names, *({TEMPLATE_KWARGS} & set(file.schema_arrow.names))]
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            yield pa.Table.from_batches([batch])


def target_rows(kept: pa.Table) -> pa.Table:
    """Kept rows as they are."""
    columns: dict[str, Any] = {name: kept[name] for name in RESCORED.names if name in kept.column_names}
    columns["target_row_key"] = kept["row_key"]
    columns["turn_end_differs"] = pa.array(np.zeros(kept.num_rows, dtype=bool))
    columns |= dict.fromkeys(SPANS, pa.nulls(kept.num_rows, RESCORED.field(SPANS[0]).type))
    return pa.table(columns).select(RESCORED.names).cast(RESCORED)


def behavior_rows(
    kept: pa.Table,
    renderer: Renderer,
    target_turn_end_id: int | None,
    same_turn_ends: frozenset[int] | None = None,
) -> pa.Table:
    """Kept rows in another policy's rendering; rows that it cannot take are left out.

    A turn end differs where its id does, or where the id is another token there: not one of `same_turn_ends`.
    """
    reads = [*CANDIDATE_READS, *({TEMPLATE_KWARGS} & set(kept.column_names))]
    candidates = [candidate_of(row) for row in kept.select(reads).to_pylist()]
    targets = rendered_by_target(kept)
    rendered = renderer.render_behavior(candidates, targets, target_turn_end_id)
    good = [row for row, result in enumerate(rendered) if not isinstance(result, Rejection)]
    results: list[Rendered] = [result for result in rendered if not isinstance(result, Rejection)]
    differs = [_turn_end_differs(targets[row], own, same_turn_ends) for row, own in zip(good, results, strict=True)]
    return _rescored(kept.take(pa.array(good, pa.int64())), results, differs, [None] * len(good))


def aligned_rows(kept: pa.Table, renderer: Renderer, target: Vocabulary) -> pa.Table:
    """Kept rows in the rendering and the tokens of a policy with another tokenizer, with the spans that both cover;
    rows that it cannot take, or of which it writes other text, are left out."""
    reads = [*CANDIDATE_READS, *({TEMPLATE_KWARGS} & set(kept.column_names))]
    rendered = renderer.render([candidate_of(row) for row in kept.select(reads).to_pylist()])
    good: list[int] = []
    results: list[Rendered] = []
    spans: list[tuple[Spans, Spans] | None] = []
    for row, (ours, own) in enumerate(zip(rendered_by_target(kept), rendered, strict=True)):
        if isinstance(own, Rejection):
            continue
        found = align(written_of(ours, target), written_of(own, renderer.vocabulary))
        if found is not None:
            good.append(row)
            results.append(own)
            spans.append(found)
    return _rescored(kept.take(pa.array(good, pa.int64())), results, [False] * len(good), spans)


def _rescored(
    chosen: pa.Table, results: list[Rendered], differs: list[bool], spans: Sequence[tuple[Spans, Spans] | None]
) -> pa.Table:
    """RESCORED of kept rows [N], their tokens, whether their turn ends are others, and the spans that are compared."""
    offsets = offsets_from_lengths([len(result.input_ids) for result in results])
    ids = np.concatenate([result.input_ids for result in results]) if results else np.empty(0, np.int32)
    mask = np.concatenate([result.loss_mask for result in results]) if results else np.empty(0, np.uint8)
    list_offsets = pa.array(offsets.astype(np.int32))
    prompt_lens = np.asarray([result.prompt_len for result in results], dtype=np.int32)
    return pa.table(
        {
            "row_key": pa.array(row_keys(ids, mask, offsets), pa.binary(16)),
            "prompt_id": chosen["prompt_id"],
            "candidate_id": chosen["candidate_id"],
            "source": chosen["source"],
            "input_ids": pa.ListArray.from_arrays(list_offsets, pa.array(ids, pa.int32())),
            "loss_mask": pa.ListArray.from_arrays(list_offsets, pa.array(mask, pa.uint8())),
            "prompt_len": pa.array(prompt_lens),
            "target_row_key": chosen["row_key"],
            "turn_end_differs": pa.array(differs, pa.bool_()),
            **{
                name: pa.array([None if pair is None else pair[place] for pair in spans], RESCORED.field(name).type)
                for place, name in enumerate(SPANS)
            },
        }
    ).cast(RESCORED)


def _turn_end_differs(target: Rendered, own: Rendered, same: frozenset[int] | None) -> bool:
    theirs = target.input_ids[target.loss_mask == LOSS_TURN_END]
    if not np.array_equal(theirs, own.input_ids[own.loss_mask == LOSS_TURN_END]):
        return True
    return same is not None and not set(theirs.tolist()) <= same


CANDIDATE_READS = ["messages", "num_prompt_messages", "prompt_id", "candidate_id", "source", "truncated", "tools"]


def candidate_of(row: Row) -> Candidate:
    """A kept row as it was before rendering."""
    messages = orjson.loads(row["messages"])
    prompt, response = messages[: row["num_prompt_messages"]], messages[row["num_prompt_messages"] :]
    is_text = len(response) == 1 and set(response[0]) <= {"role", "content"}
    return Candidate(
        prompt=prompt,
        response=response[0]["content"] if is_text else response,
        prompt_id=row["prompt_id"],
        candidate_id=row["candidate_id"],
        source=row["source"],
        truncated=row["truncated"],
        tools=orjson.loads(row["tools"]) if row["tools"] else None,
        template_kwargs=orjson.loads(row[TEMPLATE_KWARGS]) if row.get(TEMPLATE_KWARGS) else None,
    )


def rendered_by_target(kept: pa.Table) -> list[Rendered]:
    """The tokens of kept rows [N] under the target."""
    offsets, ids = list_offsets_and_values(array_of(kept, "input_ids"))
    _, mask = list_offsets_and_values(array_of(kept, "loss_mask"))
    bounds = itertools.pairwise(offsets.tolist())
    lens = kept["prompt_len"].to_pylist()
    return [Rendered(ids[a:b], mask[a:b], prompt_len) for (a, b), prompt_len in zip(bounds, lens, strict=True)]
