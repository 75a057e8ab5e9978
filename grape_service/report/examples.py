"""Single prompts with all of their candidates, token by token: for the report's examples and `grape explain`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.messages import shown_content
from grape_service.rows.partitions import partition_of
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB
from grape_service.score.store import ScoreStore
from grape_service.select.methods import OURS, TokenStatistics, method_scores, select_method, token_statistics
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

FinalRows = dict[tuple[str, str], dict[str, Any]]
"""What is known of kept rows, by prompt and candidate: arrays of one value per token with loss."""

COLUMNS = ["row_key", "prompt_id", "candidate_id", "source", "input_ids", "loss_mask", "truncated", "messages"]


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


def read_examples(
    storage: Storage,
    partition: str,
    shards: Sequence[str],
    store: ScoreStore | None,
    prompt_ids: list[str],
    select: SelectConfig,
    final_path: str | None,
    max_tokens: int = MAX_TOKENS,
    final: FinalRows | None = None,
) -> dict[str, dict[str, Any]]:
    """Prompts of one partition by id, each with its candidates, best first (a Ray task).

    `final_path` is the partition's kept or weighed file: it says who was kept, and has their weights;
    `final` is the same already read. Without a `store` only kept rows have scores, of the log-probabilities there.
    Token values are cut to `max_tokens`; `num_tokens` says how many there are.
    """
    method = select_method(select)
    own_columns = method.columns if method is not None else ()
    names = list(dict.fromkeys([*COLUMNS, "select_score", *own_columns]))
    table = rows_of_prompts(storage, shards, prompt_ids, names)
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
    scores = np.full(table.num_rows, np.nan)
    if store is not None:
        row_keys = array_of(table, "row_key")
        tables = store.read_statistics(partition, row_keys, select.statistics)
        finite = {name: one.finite() for name, one in tables.items()}
        tokens = token_statistics(tables, finite, np.arange(table.num_rows), lengths, row_keys)
        has_score = tokens.usable
        logprobs = np.where(np.repeat(has_score, lengths), tokens.values[LOGPROB], np.nan).astype(np.float32)
        scores = method_scores(method or OURS["grape"], table, tokens, counted)
    elif "select_score" in table.column_names:
        scores = table["select_score"].to_numpy(zero_copy_only=False)
    elif method is not None and not method.statistics:
        tokens = TokenStatistics({}, loss_offsets, np.ones(table.num_rows, dtype=bool))
        scores = method_scores(method, table, tokens, counted)
    final = _final_rows(storage, final_path, prompt_ids) if final is None else final
    prompts: dict[str, dict[str, Any]] = {}
    shown = ["prompt_id", "candidate_id", "source", "truncated", "messages"]
    for row, light in enumerate(table.select(shown).to_pylist()):
        span = slice(int(loss_offsets[row]), min(int(loss_offsets[row + 1]), int(loss_offsets[row]) + max_tokens))
        kept = final.get((light["prompt_id"], light["candidate_id"]))
        candidate = {
            "candidate_id": light["candidate_id"],
            "source": light["source"],
            "truncated": light["truncated"],
            "score": _number(scores[row]),
            "kept": kept is not None,
            "num_tokens": int(lengths[row]),
            "counted_tokens": int(counted[loss_offsets[row] : loss_offsets[row + 1]].sum()),
            "ids": loss_ids[span].tolist(),
            "logprobs": _rounded(logprobs[span]) if logprobs is not None and has_score[row] else None,
            "ratios": None,
            "weights": None,
        }
        if kept is not None:
            candidate.update({key: _rounded(values[:max_tokens]) for key, values in kept.items()})
            if store is None and "logprobs" in kept and not select.makes_select_score:
                known = kept["logprobs"][counted[loss_offsets[row] : loss_offsets[row + 1]]]
                candidate["score"] = _number(known.mean()) if len(known) else None
        prompt = prompts.setdefault(
            light["prompt_id"],
            {"prompt_id": light["prompt_id"], "prompt": prompt_text(light["messages"]), "candidates": []},
        )
        prompt["candidates"].append(candidate)
    for prompt in prompts.values():
        rank(prompt["candidates"], smallest_wins=method is not None and method.better == "smallest")
    return prompts


def rank(candidates: list[dict[str, Any]], smallest_wins: bool = False) -> None:
    """Sort candidates, best first; those without a score last. Equal scores: the smaller candidate_id."""
    sign = 1 if smallest_wins else -1
    candidates.sort(key=lambda c: (sign * c["score"] if c["score"] is not None else float("inf"), c["candidate_id"]))
    for place, candidate in enumerate(candidates, start=1):
        candidate["rank"] = place if candidate["score"] is not None else None


def reason_of(candidate: dict[str, Any], candidates: list[dict[str, Any]], select: SelectConfig) -> str:
    """Why a candidate was kept or not, in words."""
    kept = [c for c in candidates if c["kept"]]
    if candidate["kept"]:
        return f"kept: number {candidate['rank']} by score" if candidate["rank"] else f"kept by method {select.method}"
    if select.needs_scores and candidate["score"] is None:
        return "has no score"
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


def _final_rows(storage: Storage, path: str | None, prompt_ids: list[str]) -> FinalRows:
    if path is None:
        return {}
    columns = ["prompt_id", "candidate_id", "target_logprobs", "behavior_logprobs", "weights", "weight_source"]
    table = rows_of_prompts(storage, [path], prompt_ids, columns)
    return {(row["prompt_id"], row["candidate_id"]): _final_values(row) for row in table.to_pylist()}


def release_rows(release: Release, prompt_ids: list[str]) -> FinalRows:
    """The same of a release's rows."""
    columns = ["prompt_id", "candidate_id", "loss_mask", "target_logprobs", "behavior_logprobs", "loss_weights"]
    wanted = pc.field("prompt_id").isin(prompt_ids)
    found = {}
    for row in release.dataset.to_table(columns=[*columns, "weight_source"], filter=wanted).to_pylist():
        mask = np.array(row["loss_mask"])
        for name in columns[3:]:
            row[name] = np.array(row[name])[mask] if row[name] is not None else None
        found[row["prompt_id"], row["candidate_id"]] = _final_values({**row, "weights": row["loss_weights"]})
    return found


def _final_values(row: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    target, behavior = row.get("target_logprobs"), row.get("behavior_logprobs")
    if target is not None:
        values["logprobs"] = np.array(target)
    if target is not None and behavior is not None:
        values["ratios"] = np.array(target) - np.array(behavior)
    if row.get("weights") is not None and row.get("weight_source") != "uniform":
        values["weights"] = np.array(row["weights"])
    return values


def prompt_text(messages: str) -> str:
    """A conversation up to the last response as text, a role before each turn where there are several."""
    turns = orjson.loads(messages)
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i].get("role") != "assistant"), 0)
    shown = turns[: last + 1]
    texts = [shown_content(turn.get("content")) for turn in shown]
    if len(shown) == 1:
        return texts[0]
    return "\n\n".join(f"{turn.get('role')}: {text}" for turn, text in zip(shown, texts, strict=True))


TokenBytes = Callable[[list[int]], list[bytes | None]]


def examples_of_kinds(
    prompts: dict[str, dict[str, Any]], chosen: dict[str, list[list[Any]]], token_bytes: TokenBytes | None
) -> list[dict[str, Any]]:
    """What a page shows: the prompts that were found, with their tokens' texts, by the kind that they were chosen as.

    `chosen` holds [key, order, prompt_id] by kind, as report.statistics.Examples has them.
    """
    add_token_texts(prompts.values(), token_bytes)
    found = [(kind, row[2]) for kind in EXAMPLE_KINDS for row in chosen.get(kind, []) if row[2] in prompts]
    return [{**prompts[prompt_id], "kind": kind} for kind, prompt_id in found]


def chosen_by_partition(chosen: dict[str, list[list[Any]]], num_partitions: int) -> dict[str, list[str]]:
    """Ids of the prompts in `chosen` (see `examples_of_kinds`) by partition, each once."""
    wanted: dict[str, list[str]] = {}
    for prompt_id in dict.fromkeys(row[2] for rows in chosen.values() for row in rows):
        wanted.setdefault(partition_of(prompt_id, num_partitions), []).append(prompt_id)
    return wanted


def add_token_texts(prompts: Iterable[dict[str, Any]], token_bytes: TokenBytes | None) -> None:
    """Give each candidate `texts`, one per token: a character that several tokens share stands at its last one."""
    for prompt in prompts:
        for candidate in prompt["candidates"]:
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
