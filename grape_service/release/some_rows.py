"""Rows of a release to look at: for `grape rows`."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from grape_service.display import nearest
from grape_service.errors import UserError
from grape_service.release.load import Release
from grape_service.rows.candidate import Row
from grape_service.rows.messages import shown_content

COLUMNS = ["prompt_id", "candidate_id", "source", "messages", "grape_score", "grape_rank", "grape_margin"]
MORE_COLUMNS = ["num_candidates", "truncated", "weight_source"]


def some_rows(release: Release, source: str | None, prompt: str | None, limit: int) -> dict[str, Any]:
    """The first `limit` rows, each with `prompt` and `response` as text, and how many rows fit.

    `source` keeps rows of one source, `prompt` those whose prompt_id begins so or whose prompt has these words.
    """
    wanted = pc.field("source") == source if source is not None else None
    rows: list[Row] = []
    total = 0
    for batch in release.dataset.to_batches(columns=[*COLUMNS, *MORE_COLUMNS], filter=wanted, batch_size=1024):
        if prompt is None and len(rows) >= limit:
            total += batch.num_rows
            continue
        for row in batch.to_pylist():
            shown = _shown(row)
            if prompt is not None and not is_prompt(prompt, row["prompt_id"], shown["prompt"]):
                continue
            total += 1
            if len(rows) < limit:
                rows.append(shown)
    if not rows and source is not None:
        known = sorted(str(one) for one in release.dataset.to_table(columns=["source"])["source"].unique().to_pylist())
        if source not in known:
            raise UserError(f"{release.reference} has no row of the source '{source}'; {nearest(source, known)}")
    return {"reference": release.reference, "total": total, "rows": rows}


def is_prompt(words: str, prompt_id: str, text: str) -> bool:
    """Whether a prompt is meant by its id, the beginning of it, or words of its text."""
    return prompt_id.startswith(words) or " ".join(words.split()).lower() in " ".join(text.split()).lower()


def _shown(row: Row) -> dict[str, Any]:
    turns = row.pop("messages")
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] == "user"), 0)
    prompt, response = turns[: last + 1], turns[last + 1 :]
    texts = {
        name: "\n\n".join(shown_content(turn["content"]) for turn in part)
        for name, part in (("prompt", prompt[-1:]), ("response", response))
    }
    return {**row, **texts}
