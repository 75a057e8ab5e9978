"""One prompt with all its candidates, token by token: from the workspace, or the kept rows alone where that is gone."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from grape_service.display import cut, visible
from grape_service.errors import StageError, UserError
from grape_service.models.local_vocabulary import vocabulary_of
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.release.candidates import ScoredPool
from grape_service.release.load import Release
from grape_service.report.examples import (
    MODES,
    ExampleContext,
    ExamplePartition,
    FinalRows,
    KeptValues,
    PromptExample,
    ShownCandidate,
    add_token_texts,
    margin_of,
    read_examples,
    reason_of,
    why_kept,
)
from grape_service.rows.candidate import Message, Row
from grape_service.rows.keys import partition_of
from grape_service.rows.messages import shown_content
from grape_service.ui.folder import Folder

MAX_TOKENS = 4096
"""Tokens of a response that a page shows."""
MAX_CANDIDATES = 64
MAX_TEXT = 20_000


class PromptPage(TypedDict):
    """What the page of a row shows."""

    prompt: str
    candidates: list[PageCandidate]  # kept ones first
    more: int  # candidates beyond those
    modes: list[str]  # what tokens are shaded by: MODES, then other statistics of a release under their own names
    note: str


class PageCandidate(ShownCandidate):
    """A candidate with what each token is shaded by."""

    statistics: dict[str, list[float | None]]
    tokens: list[PageToken]


class PageToken(TypedDict):
    """A token's text and its value of each of `modes`."""

    text: str
    numbers: list[float | None]


def prompt_of_row(folder: Folder, release: Release, row: Row, siblings: list[Row]) -> PromptPage:
    """What the page of a row shows: prompt, candidates (kept ones first), modes of shading, and `note` where the
    candidates that lost cannot be shown."""
    final = {
        (kept["prompt_id"], kept["candidate_id"]): KeptValues(_values(kept), *margin_of(kept)) for kept in siblings
    }
    candidates, prompt, note = [], "", ""
    try:
        found = candidates_of(folder, release, row["prompt_id"], final)
        candidates, prompt = found["candidates"], found["prompt"]
    except (UserError, StageError) as error:
        note = str(error)
    if not candidates:
        candidates = [_from_release(kept) for kept in siblings]
        prompt = _conversation(row["messages"])
    return _page(release, prompt, candidates, final, note)


def prompt_of_pool(folder: Folder, release: Release, prompt_id: str) -> PromptPage:
    """The same for a prompt of which the version has no row. Raises UserError where it is not there."""
    found = candidates_of(folder, release, prompt_id, {})
    return _page(release, found["prompt"], found["candidates"], {}, "")


def candidates_of(folder: Folder, release: Release, prompt_id: str, final: FinalRows) -> PromptExample:
    """The prompt with its candidates, best first, each with its `reason`. Raises UserError where they are gone."""
    pool = opened_pool(folder, release)
    partition = partition_of(prompt_id, pool.num_partitions)
    shards = shard_paths(pool.prepared, partition) if partition in pool.prepared.partitions else []
    try:
        context = ExampleContext(pool.workspace, pool.store, pool.select, pool.tokenizer)
        found = read_examples(context, ExamplePartition(partition, shards, [prompt_id], final))
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"the candidates of this prompt cannot be read from {pool.workspace.root}: {type(error).__name__}"
        ) from error
    if prompt_id not in found:
        raise UserError(f"the pool of {release.reference} has no prompt {prompt_id!a}")
    prompt = found[prompt_id]
    for candidate in prompt["candidates"]:
        candidate["reason"] = reason_of(candidate, prompt["candidates"], pool.select)
    return prompt


def opened_pool(folder: Folder, release: Release) -> ScoredPool:
    """The candidates that a release was made of. Raises UserError where they are not in a workspace of the folder."""
    parents = release.manifest.parents
    path = f"prepared/{parents.prepare_id}/prepared.json"
    workspace = folder.workspace_with(path) if parents.prepare_id else None
    if workspace is None:
        known = f"; the run's was {parents.workspace}: start `grape ui` with --workspace" if parents.workspace else ""
        raise UserError(f"the candidates that lost are not in the workspace {folder.workspaces[0].root}{known}")
    try:
        return ScoredPool(release, workspace, Prepared.from_json(workspace.read_json(path)))
    except UserError:
        raise
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{workspace.url(path)} is damaged ({type(error).__name__}): candidates are not shown"
        ) from error


def _page(release: Release, prompt: str, candidates: list[ShownCandidate], final: FinalRows, note: str) -> PromptPage:
    others = {candidate_id: values for (_, candidate_id), values in final.items()}
    vocabulary = vocabulary_of(release.manifest.config.get("target"))
    add_token_texts(candidates, vocabulary.bytes_of if vocabulary else None)
    if vocabulary is None:
        problem = "the tokenizer of the target is not on this machine, so tokens are shown by number"
        note = f"{note}; {problem}" if note else problem
    statistics: list[dict[str, list[float | None]]] = []
    for candidate in candidates:
        kept_values = others.get(candidate["candidate_id"])
        arrays = kept_values.arrays if kept_values is not None else {}
        statistics.append({name: _rounded(array) for name, array in arrays.items() if name not in MODES})
    extra = list(dict.fromkeys(name for found in statistics for name in found))
    keys = [key for key in MODES if any(candidate.get(key) for candidate in candidates)]
    modes = [*(MODES[key] for key in keys), *(name.replace("_", " ") for name in extra)]
    both = list(zip(candidates, statistics, strict=True))
    kept = [item for item in both if item[0]["kept"]]
    shown: list[PageCandidate] = []
    for candidate, found in [*kept, *(item for item in both if not item[0]["kept"])][:MAX_CANDIDATES]:
        rows = [*(candidate.get(key) for key in keys), *(found.get(name) for name in extra)]
        tokens: list[PageToken] = [
            {"text": cut(text, 200), "numbers": [row[at] if row and at < len(row) else None for row in rows]}
            for at, text in enumerate(candidate["texts"])
        ]
        shown.append({**candidate, "statistics": found, "tokens": tokens})
    return {
        "prompt": cut(prompt, MAX_TEXT),
        "candidates": shown,
        "more": len(candidates) - len(shown),
        "modes": modes,
        "note": visible(note[:1].upper() + note[1:]),
    }


def _values(row: Row) -> dict[str, npt.NDArray[np.float64]]:
    """A row's values per token with loss, under the names that candidates have them."""
    mask = np.array(row["loss_mask"], dtype=bool)
    columns = {"logprobs": "target_logprobs", "behavior": "behavior_logprobs", "weights": "loss_weights"}
    columns |= {
        name.removeprefix("target_"): name for name in row if name.startswith("target_") and name != "target_logprobs"
    }
    found = {
        key: np.array(row[name], dtype=np.float64)[mask]
        for key, name in columns.items()
        if isinstance(row.get(name), list) and len(row[name]) == len(mask)
    }
    behavior = found.pop("behavior", None)
    if behavior is not None and "logprobs" in found:
        found["ratios"] = found["logprobs"] - behavior
    if row.get("weight_source") == "uniform":
        found.pop("weights", None)
    return found


def _from_release(row: Row) -> ShownCandidate:
    """A kept row as a candidate, from the release alone."""
    mask = np.array(row["loss_mask"], dtype=bool)
    ids = np.array(row["input_ids"])[mask]
    values = {key: _rounded(array) for key, array in _values(row).items()}
    margin, margin_at_least = margin_of(row)
    return {
        "candidate_id": row["candidate_id"],
        "source": row["source"],
        "truncated": row.get("truncated", False),
        "score": row.get("grape_score"),
        "rank": row.get("grape_rank"),
        "kept": True,
        "num_tokens": len(ids),
        "counted_tokens": len(ids),
        "ids": ids[:MAX_TOKENS].tolist(),
        "margin": margin,
        "margin_at_least": margin_at_least,
        "reason": why_kept(row.get("grape_rank"), margin, margin_at_least) or "kept",
        "logprobs": values.get("logprobs"),
        "ratios": values.get("ratios"),
        "weights": values.get("weights"),
    }


def _rounded(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [round(float(value), 4) for value in values[:MAX_TOKENS]]


def _conversation(messages: list[Message]) -> str:
    """The messages before the last response."""
    before = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    texts = [shown_content(message.get("content")) for message in before]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message.get('role')}: {text}" for message, text in zip(before, texts, strict=True))
