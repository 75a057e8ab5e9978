"""Traces of verifiers, and of prime-rl, which keeps them: one sampled conversation as a row of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grape_service.rows.candidate import Rejection, Row

RECORDED_BY = "recorded_by"
"""The column that names the trainer of a row."""
SEVERAL_BRANCHES = "a rollout with several branches"
NO_SAMPLES = "a rollout without sampled tokens"
BAD_ROLLOUT = "a rollout's lists do not fit"


class Unfit(Exception):
    """Why a rollout is no row."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.rejection = Rejection(reason, detail)


def episode(row: Row) -> Iterator[Row] | None:
    """traces.jsonl of verifiers 0.4: a line is an episode with its traces."""
    if not _are_objects(row["traces"]) or any("nodes" not in trace for trace in row["traces"]):
        return None
    return (one for trace in row["traces"] for one in _branch(trace))


def trace(row: Row) -> Iterator[Row] | None:
    """train_rollouts.jsonl of prime-rl: a line is a trace."""
    return _branch(row) if _are_objects(row["nodes"]) and all("message" in node for node in row["nodes"]) else None


def _branch(trace: Row) -> Iterator[Row]:
    """The one root-to-leaf path of a trace's message graph. Raises Unfit."""
    nodes = trace["nodes"]
    parents = [node.get("parent") for node in nodes]
    if parents != [None, *range(len(nodes) - 1)]:
        raise Unfit(SEVERAL_BRANCHES, "its messages are no one conversation: the prompt of each part is another")
    first = next((place for place, node in enumerate(nodes) if node.get("sampled")), None)
    if first is None:
        raise Unfit(NO_SAMPLES, "none of its messages was sampled")
    if first == 0:
        raise Unfit(NO_SAMPLES, "its first message was sampled, and there is no prompt")
    calls = [call for call in trace.get("calls") or [] if call.get("node") is not None]
    settings = [call.get("sampling") or {} for call in calls]
    if any(one.get("temperature") != settings[0].get("temperature") for one in settings):
        raise Unfit(BAD_ROLLOUT, "its messages were sampled at several temperatures")
    is_prime = "prime_rl" in (trace.get("info") or {})
    ids = [id_ for node in nodes[first:] for id_ in node.get("token_ids") or []]
    mask = [int(one) for node in nodes[first:] for one in node.get("mask") or []]
    logprobs = [value for node in nodes[first:] for value in node.get("logprobs") or []]
    rewards = [one for one in (trace.get("rewards") or {}).values() if isinstance(one, dict)]
    kept = ("id", "task", "agent", "rewards", "metrics", "info", "stop_condition")
    yield {
        "prompt": [_plain(node["message"]) for node in nodes[:first]],
        "response": [_plain(node["message"]) for node in nodes[first:]],
        **tokens_of(ids, mask, logprobs),
        "sampling": settings_of("processed" if is_prime else "unsaid", settings[0] if settings else {}),
        "finish_reason": calls[-1].get("finish_reason") if calls else None,
        "source": next((call["model"] for call in calls if call.get("model")), None),
        "tools": _tools(nodes[0].get("tools") or trace.get("tools")),
        "reward": sum(one["score"] * one.get("weight", 1.0) for one in rewards) if rewards else None,
        **{f"trace_{name}" if name == "id" else name: trace.get(name) for name in kept},
        **({RECORDED_BY: "prime-rl"} if is_prime else {}),
    }


def _tools(tools: Any) -> list[Row] | None:
    """Definitions for a template, of verifiers' own."""
    if not tools:
        return None
    kept = ("name", "description", "parameters", "strict")
    return [
        {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
        for tool in tools
    ]


def _plain(message: Row) -> Row:
    """A message as chat has it: verifiers' calls have name and arguments beside their id."""
    plain = {name: value for name, value in message.items() if value is not None and name != "provider_state"}
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [
            call
            if "function" in call
            else {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls
        ]
    return plain if "content" in plain else {**plain, "content": ""}


def steps(row: Row) -> Iterator[Row] | None:
    """results.jsonl of verifiers before 0.4 and its users (prime-rl's older rollouts), with state column trajectory."""
    if not _are_objects(row["trajectory"]) or any("tokens" not in step for step in row["trajectory"]):
        return None
    return _interleaved(row)


def _interleaved(row: Row) -> Iterator[Row]:
    """Steps of which each prompt continues the one before, as one response. Raises Unfit."""
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    num_prompt = None
    for step in row["trajectory"]:
        tokens = step["tokens"]
        if tokens is None:
            raise Unfit(NO_SAMPLES, "a step of its trajectory has no tokens")
        prompt, written = list(tokens["prompt_ids"]), list(tokens["completion_ids"])
        if num_prompt is None:
            num_prompt, ids, mask = len(prompt), prompt, [0] * len(prompt)
        elif prompt[: len(ids)] != ids:
            raise Unfit(SEVERAL_BRANCHES, "a step's prompt does not continue the one before it")
        mask += [0] * (len(prompt) - len(ids)) + [int(one) for one in tokens["completion_mask"]]
        ids = prompt + written
        values = tokens["completion_logprobs"]
        logprobs += [value for value, one in zip(values, tokens["completion_mask"], strict=False) if one]
    assert num_prompt is not None
    last = row["trajectory"][-1]
    left_out = ("trajectory", "prompt", "completion", "sampling_args")
    yield {
        "prompt": row["prompt"],
        "response": row["completion"],
        **tokens_of(ids[num_prompt:], mask[num_prompt:], logprobs),
        "sampling": settings_of("unsaid", row.get("sampling_args") or {}),
        "finish_reason": "length" if last.get("is_truncated") or row.get("is_truncated") else None,
        **{name: value for name, value in row.items() if name not in left_out},
    }


def tokens_of(ids: list[int], mask: list[int], logprobs: list[float]) -> Row:
    """A response from its first sampled token on; nothing where a server gave no ids. Raises Unfit."""
    if not ids:
        return {"response_ids": None, "response_mask": None, "behavior_logprobs": None}
    if len(mask) != len(ids) or (logprobs and len(logprobs) != sum(mask)) or not any(mask):
        raise Unfit(BAD_ROLLOUT, f"{len(ids)} ids, {len(mask)} in the mask, {len(logprobs)} log-probabilities")
    first = mask.index(1)
    spread = iter(logprobs)
    values = [next(spread) if one else 0.0 for one in mask[first:]] if logprobs else None
    return {"response_ids": ids[first:], "response_mask": mask[first:], "behavior_logprobs": values}


def settings_of(numbers: str, given: Row) -> Row:
    """How a rollout was sampled: what its numbers are (raw, processed, unsaid), and what it says of itself."""
    said = {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None}
    return {**said, "logprobs": numbers}


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
