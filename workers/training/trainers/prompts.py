"""Prompts for RL: those of a release, each once, or those of another pool.

Only as many are kept as a run can use: the ones with the smallest digests of seed and prompt, in that order.
Memory does not grow with the pool.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa

from grape_service.config.training import RlSettings
from grape_service.errors import UserError
from grape_service.pool.listing import list_files
from grape_service.pool.messages import Unusable, prompt_messages
from grape_service.pool.reader import Segment, SegmentReader
from grape_service.release.load import Release
from grape_service.rows.candidate import Rejection
from grape_service.rows.columns import release_schema

_TOKEN_COLUMNS = frozenset(release_schema([], []).names) - {"prompt_id", "source", "messages"}


def rl_prompts(release: Release, settings: RlSettings, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {"messages": the prompt's messages, "row": the other columns}, each prompt once.

    Raises UserError where a pool has no prompts or a reward's answer column is missing.
    """
    limit = settings.max_prompts or settings.steps * settings.prompts_per_step
    pool = settings.prompts
    rows = pool_rows(pool.path, pool.column, options) if pool else release_rows(release)
    chosen: dict[bytes, dict[str, Any]] = {}
    heap: list[tuple[int, bytes]] = []  # largest digest on top
    for row in rows:
        name = hashlib.sha256(f"{settings.seed}|".encode() + orjson.dumps(row["messages"])).digest()
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
        if reward.type != "function" and any(reward.answer_column not in row["row"] for row in chosen.values()):
            raise UserError(
                f"train.rl.rewards: {where} has prompts without the column '{reward.answer_column}', "
                "which should hold the right answer; name another answer_column"
            )
    return [chosen[name] for name in sorted(chosen)]


def release_rows(release: Release) -> Iterator[dict[str, Any]]:
    """Prompts of a release: what comes before the response, that is up to the last turn of the user."""
    columns = [name for name in release.schema.names if name not in _TOKEN_COLUMNS]
    for entry in release.manifest.files:
        with release.open_checked(entry) as file:
            for batch in file.iter_batches(1024, columns=columns):
                yield from _prompts_of(batch)


def _prompts_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for row in batch.to_pylist():
        messages = [{k: v for k, v in message.items() if v is not None} for message in row.pop("messages")]
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is not None:
            yield {"messages": messages[: last + 1], "row": row}


def pool_rows(path: str, column: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prompts of a pool's files. Raises UserError for a row without a usable prompt."""
    for file in list_files(path, options):
        for number, row in SegmentReader(file, Segment(0), options).rows():
            if isinstance(row, Rejection):
                raise UserError(f"{file.url}, row {number}: {row.reason}")
            if column not in row:
                raise UserError(f"{file.url}, row {number}: there is no column '{column}' with the prompt")
            try:
                messages = prompt_messages(row[column])
            except Unusable as unusable:
                raise UserError(f"{file.url}, row {number}: {unusable.rejection.reason}") from None
            yield {"messages": messages, "row": {key: value for key, value in row.items() if key != column}}
