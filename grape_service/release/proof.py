"""Proof, before a version exists, that its rows can be weighed again: for a sample of each data file

- the inverse of the release (`rows.kept_rows`) gives back the row that it was made of, and
- messages, tools, template and system prompt render to the row's own prompt tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.release.rows import kept_rows
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import TEMPLATE_KWARGS, Candidate, Message, Rendered, Row
from grape_service.rows.columns import SHARD, TARGET_FIELDS, kept_columns
from grape_service.rows.messages import THOUGHTS, response_messages
from grape_service.rows.ragged import list_offsets_and_values
from grape_service.rows.spans import span_starts
from grape_service.storage.parquet import array_of
from grape_service.weigh.rescore import candidate_of

PROVED_ROWS = 64
"""Rows of a data file that are looked at, at least, or all of a smaller one."""

AS_THEY_WERE = ("row_key", "prompt_id", "candidate_id", "source", "input_ids", "loss_mask", "prompt_len", "truncated")
ALSO = ("num_prompt_messages", "target_logprobs", *(item.name for item in TARGET_FIELDS.values()))


class RowProof:
    """Looks at rows as they are released: evenly spread ones of a file with `num_rows`."""

    def __init__(self, num_rows: int, computed: list[pa.Field], stop_ids: frozenset[int], renderer: Renderer | None):
        """`computed` are those of `columns.computed_fields`, `stop_ids` what ends turns of whoever rendered the rows;
        without its `renderer` prompts are not rendered again."""
        self.step = max(1, num_rows // PROVED_ROWS)
        self.schema = pa.schema([*SHARD, *kept_columns(computed)])
        self.stop_ids = stop_ids
        self.renderer = renderer
        self.place = 0
        self.rows = 0

    def look(self, table: pa.Table, released: pa.RecordBatch) -> None:
        """The next rows of the file, and the same as they are released. Raises StageError naming the first row that
        does not come back as it was."""
        places = np.arange(-self.place % self.step, table.num_rows, self.step)
        self.place += table.num_rows
        if not len(places):
            return
        self.rows += len(places)
        before = table.take(pa.array(places)).combine_chunks()
        schema = self.schema
        if TEMPLATE_KWARGS in released.schema.names:
            schema = schema.append(released.schema.field(TEMPLATE_KWARGS))
        after = kept_rows(pa.Table.from_batches([released]).take(pa.array(places)), schema, self.stop_ids, True)
        one, other = _comparable(before, released.schema), _comparable(after, released.schema)
        for row, (was, comes_back) in enumerate(zip(one, other, strict=True)):
            for name, value in was.items():
                if value != comes_back[name]:
                    raise StageError(
                        f"{_name(before, row)} would not come back from its release: {name} was {_short(value)} and "
                        f"would be {_short(comes_back[name])}"
                    )
        if self.renderer is not None:
            self._render_again(after)

    def _render_again(self, kept: pa.Table) -> None:
        assert self.renderer is not None
        offsets, ids = list_offsets_and_values(array_of(kept, "input_ids"))
        _, mask = list_offsets_and_values(array_of(kept, "loss_mask"))
        starts = np.flatnonzero(span_starts(mask > 0, offsets))
        for row, values in enumerate(kept.to_pylist()):
            start, end = int(offsets[row]), int(offsets[row + 1])
            prompt = ids[start : start + values["prompt_len"]]
            first = int(starts[np.searchsorted(starts, start)])
            rest = np.flatnonzero(mask[first:end] == 0)
            span = ids[first : first + int(rest[0]) if len(rest) else end]
            candidate = candidate_of(values)
            if not renders_to(self.renderer, candidate, prompt, span):
                raise StageError(
                    f"{_name(kept, row)} would be released with messages that render to other prompt tokens than its "
                    f"own under {self.renderer.tokenizer.name_or_path}"
                )


def renders_to(renderer: Renderer, candidate: Candidate, prompt: np.ndarray, span: np.ndarray) -> bool:
    """Whether a candidate's prompt becomes the tokens `prompt`, before its response as text or, where the pool brought
    response_ids, before the tokens `span`, which may hold a control token. Behind it may stand a beginning of the
    response that has no loss."""
    answer = [{"role": "assistant", "content": ""}]
    as_ids = replace(candidate, response_ids=span.tolist())
    for result in renderer.render([candidate, replace(as_ids, response=answer), as_ids]):
        if not isinstance(result, Rendered) or result.prompt_len > len(prompt):
            continue
        rendered, behind = result.input_ids[: result.prompt_len], prompt[result.prompt_len :]
        if np.array_equal(rendered, prompt[: len(rendered)]) and _begin(
            renderer.token_bytes(behind.tolist()), candidate
        ):
            return True
    return False


def _begin(tokens: list[bytes | None], candidate: Candidate) -> bool:
    """Whether tokens, of which there are none as nearly always, say how a candidate's response begins."""
    if not tokens:
        return True
    said = b"".join(token or b"" for token in tokens).strip()
    first = response_messages(candidate.response)[0]
    texts = [text for name in ("content", *THOUGHTS) if isinstance(text := first.get(name), str)]
    return bool(said) and any(text.strip().encode(errors="replace").startswith(said) for text in texts)


def _comparable(table: pa.Table, released: pa.Schema) -> list[dict[str, Any]]:
    """What of kept or weighed rows has to come back: NaN as None, so that equal rows are equal."""
    names = [name for name in (*AS_THEY_WERE, *ALSO) if name in table.column_names]
    has = {name: name in released.names for name in ("tools", "sampling")}
    rows = []
    for row in table.to_pylist():
        values: dict[str, Any] = {name: _none_for_nan(row[name]) for name in names}
        values["messages"] = [_plain(message) for message in orjson.loads(row["messages"])]
        values["tools"] = orjson.loads(row["tools"]) if row["tools"] else None
        if has["sampling"]:
            values["sampling"] = row["sampling"]
        values["behavior"] = _none_for_nan(_behavior(row))
        rows.append(values)
    return rows


def _behavior(row: Row) -> list[float] | None:
    """The behavior's log-probabilities of a row, NaN where one is not known."""
    if "behavior_logprobs" not in row:  # it has no weights, or weights that compare with no behavior
        return row["recorded_logprobs"]
    known = row.get("behavior_known")
    if row["behavior_logprobs"] is None or known is None:
        return row["behavior_logprobs"]
    return [value if there else np.nan for value, there in zip(row["behavior_logprobs"], known, strict=True)]


def _none_for_nan(value: Any) -> Any:
    return [None if item != item else item for item in value] if isinstance(value, list) else value


def _plain(message: Message) -> Message:
    """A message as templates take it: nothing that is null, tool calls as objects."""
    plain = {name: value for name, value in message.items() if value is not None}
    if isinstance(plain.get("tool_calls"), str):
        plain["tool_calls"] = orjson.loads(plain["tool_calls"])
    return plain


def _name(table: pa.Table, row: int) -> str:
    ids = (table[name][row].as_py() for name in ("candidate_id", "prompt_id"))
    return "candidate {!a} of prompt {!a}".format(*ids)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
