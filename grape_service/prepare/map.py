"""The map half of prepare: rows of a piece become rendered candidates, dealt to partitions."""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.column_types import Kind, join, join_columns, kind_of
from grape_service.pool.file_candidates import FileCandidates
from grape_service.pool.lines import beginning
from grape_service.pool.outcomes import Accepted, Filtered, Rejected
from grape_service.prepare.counts import MAX_OTHER_COLUMNS, PieceCounts, refuse_too_many
from grape_service.prepare.groups import GroupCounts
from grape_service.prepare.plan import FOLDER_OF_MAP, Piece, PreparePlan, reject_path, row_path
from grape_service.render.proof import problem_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import TEMPLATE_KWARGS, Candidate, Rejection, Rendered, RendersCandidates
from grape_service.rows.columns import MAP_REJECT, MAPPED
from grape_service.rows.keys import prompt_order, row_keys
from grape_service.rows.messages import field_of, only_text, response_messages
from grape_service.rows.ragged import list_array, offsets_from_lengths, segment_sums
from grape_service.storage.once import once
from grape_service.storage.slices import top_bits, write_slices
from grape_service.storage.storage import Storage

BATCH_ROWS = 1024
BATCH_TOKENS = 2**20
"""A batch is rendered when it has so many rows or about so many tokens, taken as a third of its characters."""
FILE_BYTES = 96 * 2**20
"""Arrow data that a task holds before it writes a file."""
FILE_REJECTS = 100_000
"""Rejects that a task holds before it writes a file."""

PROVED_ROWS = 16
"""Rows of each file group whose tokens a task compares with those of the whole conversation."""


@dataclass(slots=True)
class Placed:
    """Something of a piece and where it was."""

    item: Accepted | Rejected
    segment: int
    place: int


def map_piece(
    plan: PreparePlan,
    piece: Piece,
    config: Config,
    renderer: RendersCandidates,
    storage: Storage,
) -> PieceCounts:
    """Read, filter, normalise and render a piece; returns at once what a finished task counted.

    Writes `dealt/piece-k-000.arrow` and on, `dealt/piece-k-rejects-000.arrow` and on, then `dealt/piece-k.json`.
    Raises UserError where a file is damaged, gone or changed.
    """

    def work() -> dict[str, Any]:
        with _without_collector():
            task = _MapTask(plan, piece, config, renderer, storage)
            for batch in _batches(task.placed()):
                task.render(batch)
            return task.finish().to_json()

    def is_there(value: Any) -> bool:
        counts = PieceCounts.from_json(value)
        paths = [row_path(plan, piece, number) for number in range(counts.num_files)]
        paths += [reject_path(plan, piece, number) for number in range(counts.num_reject_files)]
        return all(map(storage.exists, paths))

    return PieceCounts.from_json(once(storage, f"{plan.folder}/{FOLDER_OF_MAP}/{piece.name}.json", work, is_there))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Rows are many small objects without cycles: looking for some among them takes an eighth of map's time.

    What is there before is left out of the collections that map asks for itself.
    """
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _batches(placed: Iterator[Placed]) -> Iterator[list[Placed]]:
    batch: list[Placed] = []
    characters = 0
    for one in placed:
        batch.append(one)
        if isinstance(one.item, Accepted):
            characters += one.item.num_characters
        if len(batch) >= BATCH_ROWS or characters > 3 * BATCH_TOKENS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _MapTask:
    def __init__(self, plan: PreparePlan, piece: Piece, config: Config, renderer: RendersCandidates, storage: Storage):
        self.plan, self.piece, self.renderer, self.storage = plan, piece, renderer, storage
        self.config = config
        self.counts = PieceCounts(piece.index)
        self.kinds: dict[str, Kind] = {}
        self.settled: set[tuple[str, type]] = set()
        """Columns and types of values that cannot change `kinds` any more."""
        self.message_fields: set[str] = set()
        self.proved: dict[int, int] = {}
        self.waiting: list[pa.RecordBatch] = []
        self.waiting_bytes = 0
        self.rejects: list[pa.RecordBatch] = []
        self.waiting_rejects = 0

    def placed(self) -> Iterator[Placed]:
        """Everything of the piece but what is filtered, which is only counted."""
        for index, segment in enumerate(self.piece.segments):
            file = self.plan.files[segment.file]
            candidates = FileCandidates(self.config, file, segment, self.plan.contracts[file.group])
            group = self.counts.groups.setdefault(file.group, GroupCounts())
            columns: dict[str, None] = {}
            num_parsed = 0
            for place, row in candidates.rows():
                if isinstance(row, Rejection):
                    group.rows_in += 1
                    yield Placed(Rejected(row), index, place)
                    continue
                num_parsed += 1
                if len(columns) < MAX_OTHER_COLUMNS:
                    columns.update(dict.fromkeys(row))
                for item in candidates.normaliser.candidates(row):
                    group.rows_in += 1
                    if isinstance(item, Filtered):
                        group.filtered += 1
                    else:
                        if isinstance(item, Accepted):
                            item.column_kinds = candidates.reader.column_kinds
                        yield Placed(item, index, place)
            group.add_file(segment.start == 0, num_parsed, columns, candidates.normaliser)
            self.counts.segment_lines.append(candidates.reader.num_lines)

    def _prove(self, one: Placed, item: Accepted, rendered: Rendered) -> None:
        """Compare the first rows of each file group with their text and with the whole conversation encoded in one go.

        Raises UserError for a row whose tokens are not its conversation's.
        """
        file = self.plan.files[self.piece.segments[one.segment].file]
        if not isinstance(self.renderer, Renderer) or self.proved.get(file.group, 0) >= PROVED_ROWS:
            return
        self.proved[file.group] = self.proved.get(file.group, 0) + 1
        problem = problem_of(self.renderer, item.candidate, rendered)
        if problem is not None:
            raise UserError(f"the pool file '{file.url}', line {one.place + 1} of its part: {problem}")

    def render(self, batch: list[Placed]) -> None:
        """Render a batch and keep it as Arrow data."""
        accepted = [(one, one.item) for one in batch if isinstance(one.item, Accepted)]
        rendered = self.renderer.render([item.candidate for _, item in accepted])
        good: list[tuple[Placed, Accepted, Rendered]] = []
        rejected = [(one, one.item) for one in batch if isinstance(one.item, Rejected)]
        for (one, item), result in zip(accepted, rendered, strict=True):
            if isinstance(result, Rejection):
                ids = item.candidate.prompt_id, item.candidate.candidate_id
                text = only_text(item.candidate.response) or item.candidate.prompt[-1]["content"]
                rejected.append((one, Rejected(replace(result, text=beginning(text)), *ids)))
            else:
                self._prove(one, item, result)
                good.append((one, item, result))
        if rejected:
            self._reject(rejected)
        if good:
            self._learn_columns([item for _, item, _ in good])
            rows = _record_batch(good, self.piece.index)
            self.waiting.append(rows)
            self.waiting_bytes += rows.nbytes
            self.counts.rows += len(good)
            self.counts.tokens += sum(len(result.input_ids) for _, _, result in good)
            if self.waiting_bytes >= FILE_BYTES:
                self._flush()

    def _learn_columns(self, items: list[Accepted]) -> None:
        for item in items:
            candidate = item.candidate
            for name, value in candidate.other.items():
                if name == TEMPLATE_KWARGS:
                    self.kinds[name] = "json"
                    continue
                if (name, type(value)) in self.settled and name not in item.column_kinds:
                    continue
                known = self.kinds.get(name, "null")
                if known != "json":
                    kind = kind_of(value)
                    override = item.column_kinds.get(name)
                    if override is not None and value is not None:
                        kind = override
                    elif isinstance(value, str | bool | float | None):
                        self.settled.add((name, type(value)))
                    if kind != known:
                        self.kinds[name] = join(known, kind)
                    elif name not in self.kinds:
                        self.kinds[name] = kind
            for message in itertools.chain(candidate.prompt, response_messages(candidate.response)):
                if len(message) != 2 or not isinstance(message.get("content"), str):  # not role and text alone
                    self.message_fields.update(itertools.starmap(field_of, message.items()))
        refuse_too_many(self.kinds, self.plan.pool)

    def _reject(self, rejected: list[tuple[Placed, Rejected]]) -> None:
        rejected.sort(key=lambda pair: (pair[0].segment, pair[0].place))
        for _, item in rejected:
            reason = item.rejection.reason
            self.counts.rejects[reason] = self.counts.rejects.get(reason, 0) + 1
        columns = {
            "segment": [one.segment for one, _ in rejected],
            "place": [one.place for one, _ in rejected],
            "prompt_id": [_encodable(item.prompt_id) for _, item in rejected],
            "candidate_id": [_encodable(item.candidate_id) for _, item in rejected],
            "reason": [item.rejection.reason for _, item in rejected],
            "detail": [_encodable(item.rejection.detail) for _, item in rejected],
            "text": [_encodable(item.rejection.text) for _, item in rejected],
        }
        self.rejects.append(pa.RecordBatch.from_pydict(columns, schema=MAP_REJECT))

        self.waiting_rejects += len(rejected)
        if self.waiting_rejects >= FILE_REJECTS:
            self._flush_rejects()

    def _flush_rejects(self) -> None:
        name = reject_path(self.plan, self.piece, self.counts.num_reject_files)
        with self.storage.open_write(name) as file, pa.ipc.new_file(file, MAP_REJECT) as writer:
            for batch in self.rejects:
                writer.write_batch(batch)
        self.rejects, self.waiting_rejects = [], 0
        self.counts.num_reject_files += 1

    def _flush(self) -> None:
        """Write what is waiting as one file."""
        table = pa.Table.from_batches(self.waiting, MAPPED)
        self.waiting, self.waiting_bytes = [], 0
        bits = self.plan.level_bits[0]
        slices = top_bits(table["prompt_order"].to_numpy(), 0, bits)
        name = row_path(self.plan, self.piece, self.counts.num_files)
        gc.collect()
        self.counts.bounds.append(write_slices(self.storage, name, table, slices, 1 << bits))

    def finish(self) -> PieceCounts:
        """Write what is left; the counts."""
        if self.waiting:
            self._flush()
        if self.rejects:
            self._flush_rejects()
        counts = self.counts
        counts.rows_in = sum(group.rows_in for group in counts.groups.values())
        counts.filtered = sum(group.filtered for group in counts.groups.values())
        join_columns(counts.other_columns, self.kinds)
        counts.message_fields = sorted(self.message_fields)
        return counts


def _record_batch(good: list[tuple[Placed, Accepted, Rendered]], piece: int) -> pa.RecordBatch:
    results = [result for _, _, result in good]
    candidates = [item.candidate for _, item, _ in good]
    offsets = offsets_from_lengths([len(result.input_ids) for result in results])
    ids = np.concatenate([result.input_ids for result in results])
    mask = np.concatenate([result.loss_mask for result in results])
    other = [orjson.dumps(candidate.other, option=orjson.OPT_SORT_KEYS) for candidate in candidates]
    sampling = [_json_text(candidate.sampling) for candidate in candidates]
    recorded = [result.recorded_logprobs for result in results]
    prompt_ids = [candidate.prompt_id for candidate in candidates]
    orders = {prompt_id: prompt_order(prompt_id) for prompt_id in set(prompt_ids)}
    messages = [
        orjson.dumps([*candidate.prompt, *response_messages(candidate.response)]).decode() for candidate in candidates
    ]
    rest = [_rest_digest(*parts) for parts in zip(candidates, recorded, sampling, messages, other, strict=True)]
    columns: dict[str, Any] = {
        "row_key": row_keys(ids, mask, offsets),
        "prompt_id": prompt_ids,
        "candidate_id": [candidate.candidate_id for candidate in candidates],
        "source": [candidate.source for candidate in candidates],
        "input_ids": list_array(offsets, ids, pa.int32()),
        "loss_mask": list_array(offsets, mask, pa.uint8()),
        "prompt_len": [result.prompt_len for result in results],
        "truncated": [candidate.truncated for candidate in candidates],
        "messages": messages,
        "num_prompt_messages": [len(candidate.prompt) for candidate in candidates],
        # In the order of their keys: templates write tools as they are.
        "tools": [None if c.tools is None else orjson.dumps(c.tools).decode() for c in candidates],
        "recorded_logprobs": pa.array(recorded, pa.list_(pa.float32())),
        "sampling": sampling,
        "prompt_order": [orders[prompt_id] for prompt_id in prompt_ids],
        "prompt_digest": [item.prompt_digest for _, item, _ in good],
        "content_digest": [item.content_digest for _, item, _ in good],
        "rest_digest": rest,
        "piece": [piece] * len(good),
        "segment": [one.segment for one, _, _ in good],
        "place": [one.place for one, _, _ in good],
        "num_loss": segment_sums(mask != 0, offsets),
        "other": other,
    }
    return pa.RecordBatch.from_pydict(columns, schema=MAPPED)


def _json_text(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _rest_digest(candidate: Candidate, recorded: Any, sampling: str | None, messages: str, other: bytes) -> int:
    """Tells apart rows that are equal in prompt, source, response and tokens, whatever file they came from."""
    parts = [
        b"" if recorded is None else recorded.tobytes(),
        (sampling or "").encode(),
        b"1" if candidate.truncated else b"0",
        messages.encode(),
        other,
    ]
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "big")


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()[:1000]
