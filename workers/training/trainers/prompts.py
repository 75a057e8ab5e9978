"""Prompts for RL: those of a release, each once and in its own tokens, or those of another pool, rendered as it was.

Only as many are kept as a run can use: the ones with the smallest digests of seed and prompt, in that order.
Memory does not grow with the pool.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from grape_service.config.training import RlSettings
from grape_service.errors import UserError
from grape_service.pool.column_names import PREFILLS
from grape_service.pool.listing import list_files
from grape_service.pool.messages import Unusable, prompt_messages
from grape_service.pool.prefills import with_prefill
from grape_service.pool.reader import Segment, SegmentReader
from grape_service.release.load import Release
from grape_service.release.token_ids import refuse_unknown_ids
from grape_service.rows.candidate import Message, Rejection
from grape_service.rows.columns import PLACES, PREFILL, release_schema
from grape_service.rows.messages import whole_message
from grape_service.rows.prefill import two_turns
from grape_service.storage.options import StorageOptions

_TOKEN_COLUMNS = frozenset(release_schema([], []).names) - {"prompt_id", "source", "messages"}
"""Columns of a release that say nothing to a reward."""


def rl_prompts(
    release: Release,
    settings: RlSettings,
    options: StorageOptions,
    num_ids: int | None = None,
    model: str = "the model",
) -> list[dict[str, Any]]:
    """Rows {"messages": the prompt's messages, "tools": what it offers or None, "ids": its tokens as the release has
    them, None for those of a pool, "response": what the release answers, "row": the other columns}, each prompt once.

    `num_ids`: of the token ids that `model` has. Raises UserError where a pool has no prompts, a reward's answer column
    is missing or a row of the release holds another token id.
    """
    limit = settings.max_prompts or settings.steps * settings.prompts_per_step
    pool = settings.prompts
    rows = pool_rows(pool.path, pool.column, options) if pool else release_rows(release, num_ids, model)
    chosen: dict[bytes, dict[str, Any]] = {}
    heap: list[tuple[int, bytes]] = []  # largest digest on top
    for row in rows:
        asked = orjson.dumps([row["messages"], row["tools"]] if row["tools"] else row["messages"])
        name = hashlib.sha256(f"{settings.seed}|".encode() + asked).digest()
        if name in chosen:
            continue
        if len(heap) == limit:
            if -heap[0][0] <= int.from_bytes(name, "big"):
                continue
            del chosen[heapq.heappop(heap)[1]]
        heapq.heappush(heap, (-int.from_bytes(name, "big"), name))
        chosen[name] = row
    where = pool.path if pool else release.reference
    if not chosen:
        raise UserError(f"there is no prompt in {where}")
    for reward in settings.rewards:
        if reward.type == "function":
            continue
        if any(reward.answer_column not in row["row"] for row in chosen.values()):
            raise UserError(
                f"train.rl.rewards: {where} has prompts without the column '{reward.answer_column}', "
                "which should hold the right answer; name another answer_column"
            )
        empty = sum(row["row"][reward.answer_column] is None for row in chosen.values())
        if empty:
            raise UserError(
                f"train.rl.rewards: {empty} of {len(chosen)} prompts of {where} have no answer in the column "
                f"'{reward.answer_column}': leave them out of the release, or name another answer_column"
            )
    return [chosen[name] for name in sorted(chosen)]


def release_rows(release: Release, num_ids: int | None = None, model: str = "the model") -> Iterator[dict[str, Any]]:
    """Prompts of a release: what comes before the response, in messages and in tokens, a prefill included; rows without
    loss have none.

    `num_ids`: of the token ids that `model` has. Raises UserError for a row that holds another.
    """
    num_rows = 0
    columns = [name for name in release.schema.names if name not in _TOKEN_COLUMNS - {"input_ids", "loss_mask"}]
    for entry in release.manifest.files:
        with release.open_checked(entry) as file:
            for batch in file.iter_batches(1024, columns=columns):
                if num_ids is not None:
                    refuse_unknown_ids(batch, num_ids, model, release.reference, num_rows)
                num_rows += batch.num_rows
                yield from _prompts_of(batch)


def _prompts_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = [name for name in batch.schema.names if name not in ("input_ids", "loss_mask")]
    rows = batch.select(names).to_pylist()
    for row, ids, loss in zip(rows, batch.column("input_ids"), batch.column("loss_mask"), strict=True):
        mask = loss.values.to_numpy(zero_copy_only=False)
        if not mask.any():
            continue
        messages = [whole_message(message) for message in row.pop("messages")]
        told, stretches = row.get(PLACES[0].name), int(np.count_nonzero(mask[1:] & ~mask[:-1]) + mask[0])
        start = response_start(messages, stretches) if told is None else told
        messages, start = two_turns(messages, start, row.pop(PREFILL.name, None))
        tools = row.get("tools")
        yield {
            "messages": messages[:start],
            "tools": orjson.loads(tools) if isinstance(tools, str) and tools else None,
            "ids": ids.values[: int(mask.argmax())].to_pylist(),
            "response": messages[start:],
            "row": row,
        }


def response_start(messages: list[Message], num_stretches: int) -> int:
    """Where the response begins: it ends the conversation, holds assistant and tool turns alone, and has a stretch of
    tokens with loss for each of its assistant turns."""
    start = len(messages)
    left = num_stretches
    while start > 0 and messages[start - 1]["role"] in ("assistant", "tool"):
        if messages[start - 1]["role"] == "assistant":
            if left == 0:
                break
            left -= 1
        elif left == 0:
            break
        start -= 1
    return start


def pool_rows(path: str, column: str, options: StorageOptions) -> Iterator[dict[str, Any]]:
    """Prompts of a pool's files. Raises UserError for a row without a usable prompt."""
    for file in list_files(path, options):
        for number, row in SegmentReader(file, Segment(0), options).rows():
            if isinstance(row, Rejection):
                raise UserError(f"{file.url}:{number + 1}: {row.reason}")
            if column not in row:
                raise UserError(f"{file.url}:{number + 1}: there is no column '{column}' with the prompt")
            try:
                said = next((row[name] for name in PREFILLS if row.get(name) is not None), None)
                messages = with_prefill(prompt_messages(row[column]), said)
            except Unusable as unusable:
                raise UserError(f"{file.url}:{number + 1}: {unusable.rejection.reason}") from None
            others = {key: value for key, value in row.items() if key != column}
            tools = others.get("tools")
            tools = orjson.loads(tools) if isinstance(tools, str) and tools else tools or None
            yield {"messages": messages, "tools": tools, "ids": None, "response": [], "row": others}
