"""Single prompts with all of their candidates, token by token: for the report's examples and `grape explain`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.json_types import JsonObject
from grape_service.report.facts import ExampleChoice
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.keys import partition_of
from grape_service.rows.messages import shown_content
from grape_service.rows.prefill import prefill_of
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB
from grape_service.score.store import ScoreStore
from grape_service.score.windows import WINDOW_READS
from grape_service.select.methods import select_method, stored_scores
from grape_service.select.steps import Tokenizer
from grape_service.storage.parquet import array_of, open_parquet
from grape_service.storage.storage import Storage

if TYPE_CHECKING:
    from grape_service.release.load import Release

MAX_TOKENS = 160
"""Tokens of a response that a page shows; the others are counted."""
MAX_CANDIDATES = 6
MAX_TEXT = 1_500
"""Characters of a prompt that a page shows."""

EXAMPLE_KINDS = ("closest", "clearest", "random")

Mode = Literal["logprobs", "ratios", "weights"]
MODES: dict[Mode, str] = {"logprobs": "log-probability", "ratios": "ratio", "weights": "weight"}
"""What tokens of a page are shaded by; its script knows them by their place."""

MARGINS = ("grape_margin", "select_margin", "margin_at_least")


@dataclass(frozen=True)
class KeptValues:
    """What is known of a kept row."""

    arrays: dict[str, npt.NDArray]
    """One value per token with loss, under the names of MODES and of a release's other statistics."""
    margin: float | None
    """By the method that chose the row."""
    margin_at_least: bool
    """The margin is to a candidate that a race stopped."""


FinalRows = dict[tuple[str, str], KeptValues]
"""Kept rows by prompt and candidate."""


class ShownCandidate(TypedDict):
    """A candidate token by token: lists have one value for each of its first tokens with loss."""

    candidate_id: str
    source: str | None
    truncated: bool
    score: float | None
    rank: NotRequired[int | None]
    kept: bool
    margin: NotRequired[float | None]  # of a kept one, by the method that chose it
    margin_at_least: NotRequired[bool]
    num_tokens: int  # with loss, those that are not in the lists among them
    counted_tokens: int  # of those, the ones that count in the score
    ids: list[int]
    logprobs: list[float | None] | None
    ratios: list[float | None] | None
    weights: list[float | None] | None
    texts: NotRequired[list[str]]
    reason: NotRequired[str]  # why it was kept or not


class PromptExample(TypedDict):
    """A prompt with its candidates, best first."""

    prompt_id: str
    prompt: str
    candidates: list[ShownCandidate]
    kind: NotRequired[str]  # of EXAMPLE_KINDS


PROMPT_READS = ["messages", "num_prompt_messages"]
COLUMNS = ["row_key", "prompt_id", "candidate_id", "source", *WINDOW_READS, "truncated", *PROMPT_READS]


def rows_of_prompts(storage: Storage, paths: Sequence[str], prompt_ids: list[str], columns: list[str]) -> pa.Table:
    """The rows of some prompts in Parquet files; of files without one the ids alone are read."""
    wanted = pa.array(prompt_ids, type=pa.string())
    found = []
    for path in paths:
        with open_parquet(storage, path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["prompt_id"])["prompt_id"]
                rows = pc.is_in(ids, value_set=wanted)
                if pc.any(rows).as_py():
                    found.append(file.read_row_group(group, columns=there).filter(rows))
    return pa.concat_tables(found).combine_chunks() if found else pa.table({"prompt_id": pa.array([], pa.string())})


@dataclass(frozen=True)
class ExampleContext:
    """What the examples of all partitions have in common."""

    storage: Storage
    store: ScoreStore | None
    """Of the target; without one only kept rows have scores, of the log-probabilities there."""
    select: SelectConfig
    tokenizer: Tokenizer | None
    """The target's, for a method that cuts steps."""
    max_tokens: int = MAX_TOKENS
    """Of a response, whose values are shown; `num_tokens` says how many there are."""


@dataclass(frozen=True)
class ExamplePartition:
    """The prompts that are shown of one partition, and where they lie."""

    name: str
    shards: Sequence[str]
    prompt_ids: list[str]
    kept: str | FinalRows | None
    """Who was kept, with weights: the path of the kept or weighed file, or its rows already read."""


def read_examples(context: ExampleContext, partition: ExamplePartition) -> dict[str, PromptExample]:
    """Prompts of one partition by id, each with its candidates, best first (a Ray task).

    Raises UserError where the method cuts steps and the target's model is no longer there.
    """
    storage, store, select, prompt_ids = context.storage, context.store, context.select, partition.prompt_ids
    method = select_method(select)
    own_columns = method.columns if method is not None else ()
    names = list(dict.fromkeys([*COLUMNS, "select_score", *own_columns]))
    table = rows_of_prompts(storage, partition.shards, prompt_ids, names)
    if table.num_rows == 0:
        return {}
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    _, ids = list_offsets_and_values(array_of(table, "input_ids"))
    lengths = segment_sums(mask > 0, offsets)
    loss_offsets = offsets_from_lengths(lengths)
    loss_ids, loss_kind = ids[mask > 0], mask[mask > 0]
    counted = np.ones(len(loss_ids), dtype=bool) if select.count_turn_end else loss_kind == LOSS_TOKEN
    logprobs: npt.NDArray[np.float32] | None = None
    has_score = np.zeros(table.num_rows, dtype=bool)
    if store is None and "select_score" in table.column_names:
        scores = table["select_score"].to_numpy(zero_copy_only=False)
    else:
        tokens, scores = stored_scores(method, table, counted, select, store, partition.name, context.tokenizer)
        if store is not None:
            has_score = tokens.usable
            logprobs = np.where(np.repeat(has_score, lengths), tokens.values[LOGPROB], np.nan).astype(np.float32)
    final = (
        _final_rows(storage, partition.kept, prompt_ids) if isinstance(partition.kept, str) else partition.kept or {}
    )
    prompts: dict[str, PromptExample] = {}
    shown = ["prompt_id", "candidate_id", "source", "truncated", *PROMPT_READS]
    for row, light in enumerate(table.select(shown).to_pylist()):
        begin, end = int(loss_offsets[row]), int(loss_offsets[row + 1])
        span = slice(begin, min(end, begin + context.max_tokens))
        kept = final.get((light["prompt_id"], light["candidate_id"]))
        candidate: ShownCandidate = {
            "candidate_id": light["candidate_id"],
            "source": light["source"],
            "truncated": light["truncated"],
            "score": _number(scores[row]),
            "kept": kept is not None,
            "margin": kept.margin if kept is not None else None,
            "margin_at_least": kept is not None and kept.margin_at_least,
            "num_tokens": int(lengths[row]),
            "counted_tokens": int(counted[begin:end].sum()),
            "ids": loss_ids[span].tolist(),
            "logprobs": _rounded(logprobs[span]) if logprobs is not None and has_score[row] else None,
            "ratios": None,
            "weights": None,
        }
        if kept is not None:
            for mode in MODES:
                if mode in kept.arrays:
                    candidate[mode] = _rounded(kept.arrays[mode][: context.max_tokens])
            if store is None and "logprobs" in kept.arrays and not select.makes_select_score:
                known = kept.arrays["logprobs"][counted[begin:end]]
                candidate["score"] = _number(known.mean()) if len(known) else None
        prompt = prompts.setdefault(
            light["prompt_id"],
            {
                "prompt_id": light["prompt_id"],
                "prompt": prompt_text(*(light[name] for name in PROMPT_READS)),
                "candidates": [],
            },
        )
        prompt["candidates"].append(candidate)
    for prompt in prompts.values():
        rank(prompt["candidates"], smallest_wins=method is not None and method.better == "smallest")
    return prompts


def rank(candidates: list[ShownCandidate], smallest_wins: bool = False) -> None:
    """Sort candidates, best first; those without a score last. Equal scores: the smaller candidate_id."""
    sign = 1 if smallest_wins else -1
    candidates.sort(key=lambda c: (sign * c["score"] if c["score"] is not None else float("inf"), c["candidate_id"]))
    for place, candidate in enumerate(candidates, start=1):
        candidate["rank"] = place if candidate["score"] is not None else None


def reason_of(candidate: ShownCandidate, candidates: list[ShownCandidate], select: SelectConfig) -> str:
    """Why a candidate was kept or not, in words."""
    kept = [c for c in candidates if c["kept"]]
    if candidate["kept"]:
        rank = candidate.get("rank") if select_method(select) is not None else None
        words = why_kept(rank, candidate.get("margin"), candidate.get("margin_at_least"))
        return words or f"kept by method {select.method}"
    if select.needs_scores and candidate["score"] is None:
        stopped = kept and candidate["counted_tokens"]  # a candidate that failed takes its prompt out
        return "was stopped by score.race: it could no longer be kept" if stopped else "has no score"
    if select.min_response_tokens is not None and candidate["num_tokens"] < select.min_response_tokens:
        return f"shorter than select.min_response_tokens {select.min_response_tokens}"
    if select.max_response_tokens is not None and candidate["num_tokens"] > select.max_response_tokens:
        return f"longer than select.max_response_tokens {select.max_response_tokens}"
    if not kept:
        if select.needs_scores and any(c["score"] is None for c in candidates):
            return "its prompt was left out: a candidate of it could not be scored"
        return "its prompt was left out: see min_margin, max_source_share and behavior.missing of the config"
    method = select_method(select)
    if method is None or candidate["score"] is None:
        return f"not chosen by method {select.method}"
    sign = -1 if method.better == "smallest" else 1
    worst = min(sign * c["score"] for c in kept if c["score"] is not None)
    behind = worst - sign * candidate["score"]
    if behind < 0:
        return "scored better, but select.max_source_share passed the win to another source"
    return f"its score is {'lower' if sign > 0 else 'higher'} by {behind:.4f}"


def why_kept(rank: int | None, margin: float | None, margin_at_least: bool | None) -> str:
    """By which rank and margin a candidate was kept, in words; empty where nothing ranked it."""
    if not rank:
        return ""
    words = f"kept: number {rank} by score"
    if margin is None:
        return words
    least = "≥ " if margin_at_least else ""
    return f"{words}, margin {least}{margin:.4f}{' (to one that was stopped)' if least else ''}"


def _final_rows(storage: Storage, path: str, prompt_ids: list[str]) -> FinalRows:
    columns = ["prompt_id", "candidate_id", "target_logprobs", "behavior_logprobs", "weights", "weight_source"]
    table = rows_of_prompts(storage, [path], prompt_ids, [*columns, *MARGINS])
    return {(row["prompt_id"], row["candidate_id"]): _final_values(row) for row in table.to_pylist()}


def release_rows(release: Release, prompt_ids: list[str]) -> FinalRows:
    """The same of a release's rows."""
    columns = ["prompt_id", "candidate_id", "loss_mask", "target_logprobs", "behavior_logprobs", "loss_weights"]
    wanted = pc.field("prompt_id").isin(prompt_ids)
    found = {}
    more = [name for name in ("weight_source", *MARGINS) if name in release.schema.names]
    for row in release.dataset.to_table(columns=[*columns, *more], filter=wanted).to_pylist():
        mask = np.array(row["loss_mask"])
        for name in columns[3:]:
            row[name] = np.array(row[name])[mask] if row[name] is not None else None
        found[row["prompt_id"], row["candidate_id"]] = _final_values({**row, "weights": row["loss_weights"]})
    return found


def margin_of(row: JsonObject) -> tuple[float | None, bool]:
    """The margin of a row by the method that chose it, and whether it is only known to be at least so much."""
    other = row.get("select_margin")
    return other if other is not None else row.get("grape_margin"), bool(row.get("margin_at_least"))


def _final_values(row: JsonObject) -> KeptValues:
    values: dict[str, npt.NDArray] = {}
    target, behavior = row.get("target_logprobs"), row.get("behavior_logprobs")
    if target is not None:
        values["logprobs"] = np.array(target)
    if target is not None and behavior is not None:
        values["ratios"] = np.array(target) - np.array(behavior)
    if row.get("weights") is not None and row.get("weight_source") != "uniform":
        values["weights"] = np.array(row["weights"])
    return KeptValues(values, *margin_of(row))


def prompt_text(messages: str, num_prompt: int) -> str:
    """A conversation up to the last response as text, a role before each turn where there are several. The first
    `num_prompt` messages are the prompt's, which is shown whole where it ends with a prefill."""
    turns = orjson.loads(messages)
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i].get("role") != "assistant"), 0)
    shown = turns[: last + 1] if prefill_of(turns[:num_prompt]) is None else turns[:num_prompt]
    texts = [shown_content(turn.get("content")) for turn in shown]
    if len(shown) == 1:
        return texts[0]
    return "\n\n".join(f"{turn.get('role')}: {text}" for turn, text in zip(shown, texts, strict=True))


TokenBytes = Callable[[list[int]], list[bytes | None]]


def examples_of_kinds(
    prompts: dict[str, PromptExample], chosen: ExampleChoice, token_bytes: TokenBytes | None
) -> list[PromptExample]:
    """What a page shows: the prompts that were found, with their tokens' texts, by the kind that they were chosen as.

    `chosen` holds [key, order, prompt_id] by kind, as report.sums.Examples has them.
    """
    add_token_texts((candidate for prompt in prompts.values() for candidate in prompt["candidates"]), token_bytes)
    found = [(kind, row[2]) for kind in EXAMPLE_KINDS for row in chosen.get(kind, []) if row[2] in prompts]
    return [{**prompts[prompt_id], "kind": kind} for kind, prompt_id in found]


def chosen_by_partition(chosen: ExampleChoice, num_partitions: int) -> dict[str, list[str]]:
    """Ids of the prompts in `chosen` (see `examples_of_kinds`) by partition, each once."""
    wanted: dict[str, list[str]] = {}
    for prompt_id in dict.fromkeys(row[2] for rows in chosen.values() for row in rows):
        wanted.setdefault(partition_of(prompt_id, num_partitions), []).append(prompt_id)
    return wanted


def add_token_texts(candidates: Iterable[ShownCandidate], token_bytes: TokenBytes | None) -> None:
    """Give each candidate `texts`, one per token: a character that several tokens share stands at its last one."""
    for candidate in candidates:
        ids = candidate["ids"]
        if token_bytes is None:
            candidate["texts"] = [f"[{number}]" for number in ids]
            continue
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        candidate["texts"] = [decoder.decode(b"\xef\xbf\xbd" if b is None else b) for b in token_bytes(ids)]


def _rounded(values: npt.NDArray) -> list[float | None]:
    return [_number(round(float(value), 4)) for value in values]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
