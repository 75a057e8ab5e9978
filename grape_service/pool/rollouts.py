"""Rollouts of RL trainers as rows of ours: prompt, response, its ids, their log-probabilities, what wrote them.

Each form is known by its columns (docs/pools.md has them, and what its numbers are). A response of which a trainer
keeps the ids alone is the empty text: its ids say it, once there is a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from grape_service.config.pool import PoolGroup
from grape_service.pool.traces import BAD_ROLLOUT, NO_SAMPLES, RECORDED_BY, Unfit, episode, settings_of, steps, trace
from grape_service.rows.candidate import Rejection, Row

MARKS = frozenset(
    [
        "nodes",
        "traces",
        "trajectory",
        "responses",
        "response_ids",
        "observation_tokens",
        "tokens",
        "completion_ids",
        "input_ids",
    ]
)
"""Columns of which every rollout has one."""


def rollouts(row: Row, group: PoolGroup) -> Iterator[Row | Rejection]:
    """The candidates of a trainer's rollout as rows of ours; any other row as it is, and any row of a group whose shape
    the config gives, or whose config names columns that a trainer's form would replace."""
    if not row.keys().isdisjoint(MARKS) and group.shape in ("auto", "prompts"):
        named = {name for names in group.columns.values() for name in ([names] if isinstance(names, str) else names)}
        for trainer, needed, read in FORMS:
            if needed <= row.keys() and (found := read(row)) is not None:
                try:
                    rows = list(found)
                except Unfit as error:
                    yield error.rejection
                    return
                if any(named & (row.keys() - one.keys()) for one in rows):
                    break
                yield from ({RECORDED_BY: trainer, **_said(one, group)} for one in rows)
                return
    yield row


def _said(row: Row, group: PoolGroup) -> Row:
    """A row with how the config says that its group was sampled; what a trainer's numbers are is its default alone."""
    said = {name: value for name, value in group.sampling.items() if name == "logprobs" or name not in row["sampling"]}
    return {**row, "sampling": {**row["sampling"], **said}}


# verl, OpenRLHF, SkyRL, slime, TRL


def _verl(row: Row) -> Iterator[Row] | None:
    """A row of verl's DataProto: tensors as lists, padded, and what stands beside them."""
    if not _are_ids(row["responses"]) or not _are_ids(row["prompts"]):
        return None
    scores = row.get("rm_scores", row.get("token_level_scores"))
    tensors = [
        "prompts",
        "responses",
        "input_ids",
        "attention_mask",
        "position_ids",
        "response_mask",
        "raw_prompt",
        "rollout_log_probs",
        "old_log_probs",
        "ref_log_prob",
        "rm_scores",
        "token_level_scores",
        "token_level_rewards",
        "advantages",
        "returns",
        "values",
        "raw_prompt_ids",
        "prompt",
    ]
    return iter(
        [
            {
                "prompt": row.get("raw_prompt", row.get("prompt")),
                "response": "",
                "response_ids": row["responses"],
                "response_mask": row["response_mask"],
                "behavior_logprobs": row.get("rollout_log_probs"),
                "sampling": settings_of("processed", {}),
                "reward": sum(scores) if isinstance(scores, list) else scores,
                **{name: value for name, value in row.items() if name not in tensors},
            }
        ]
    )


def _openrlhf(row: Row) -> Iterator[Row] | None:
    """What OpenRLHF's agents give back of a rollout."""
    return _of_ranges(row) if _are_ids(row["observation_tokens"]) else None


def _of_ranges(row: Row) -> Iterator[Row]:
    ids, ranges = row["observation_tokens"], row["action_ranges"]
    if not ranges:
        raise Unfit(NO_SAMPLES, "action_ranges are empty")
    first = ranges[0][0]
    mask = [0] * len(ids)
    for start, end in ranges:
        mask[start:end] = [1] * (end - start)
    logprobs = row.get("rollout_log_probs")
    taken = ["observation_tokens", "action_ranges", "rollout_log_probs", "prompt", "truncated", "scores"]
    yield {
        "prompt": row["prompt"],
        "response": "",
        "response_ids": ids[first:],
        "response_mask": mask[first:],
        "behavior_logprobs": None if logprobs is None else logprobs[first:],
        "sampling": settings_of("processed", {}),
        "finish_reason": "length" if row.get("truncated") else "stop",
        "score": row.get("scores"),
        **{name: value for name, value in row.items() if name not in taken},
    }


def _skyrl(row: Row) -> Iterator[Row] | None:
    """A row of SkyRL's GeneratorOutput, with the messages that were its prompt."""
    if not _are_ids(row["response_ids"]):
        return None
    rewards = row.get("rewards")
    taken = [
        "prompt",
        "prompts",
        "prompt_token_ids",
        "response_ids",
        "loss_masks",
        "rollout_logprobs",
        "stop_reasons",
        "rewards",
        "rollout_expert_indices",
    ]
    return iter(
        [
            {
                "prompt": row.get("prompt", row.get("prompts")),
                "response": "",
                "response_ids": row["response_ids"],
                "response_mask": row["loss_masks"],
                "behavior_logprobs": row.get("rollout_logprobs"),
                "sampling": settings_of("unsaid", {}),
                "finish_reason": row.get("stop_reasons"),
                "reward": sum(rewards) if isinstance(rewards, list) else rewards,
                **{name: value for name, value in row.items() if name not in taken},
            }
        ]
    )


def _slime(row: Row) -> Iterator[Row] | None:
    """A Sample of slime, as its to_dict has it."""
    return _of_tail(row) if _are_ids(row["tokens"]) and isinstance(row["response"], str) else None


def _of_tail(row: Row) -> Iterator[Row]:
    number, status = row["response_length"], row["status"]
    if status in ("aborted", "failed", "pending"):
        raise Unfit("an unfinished rollout", f"its status is {status}")
    if not 0 < number < len(row["tokens"]):
        raise Unfit(BAD_ROLLOUT, f"response_length is {number} of {len(row['tokens'])} tokens")
    taken = [
        "tokens",
        "response_length",
        "rollout_log_probs",
        "loss_mask",
        "prompt",
        "response",
        "status",
        "teacher_log_probs",
        "mopd_teacher_log_probs",
        "rollout_routed_experts",
        "multimodal_train_inputs",
    ]
    yield {
        "prompt": row["prompt"],
        "response": row["response"],
        "response_ids": row["tokens"][-number:],
        "response_mask": row.get("loss_mask"),
        "behavior_logprobs": row.get("rollout_log_probs"),
        "sampling": settings_of("processed", {}),
        "finish_reason": "length" if status == "truncated" else "stop",
        **{name: value for name, value in row.items() if name not in taken},
    }


def _trl_async(row: Row) -> Iterator[Row] | None:
    """A RolloutSample of TRL's asynchronous GRPO."""
    return _of_mask(row) if _are_ids(row["input_ids"]) else None


def _of_mask(row: Row) -> Iterator[Row]:
    ids, mask, logprobs = row["input_ids"], row["completion_mask"], row["old_log_probs"]
    first = next((place for place, one in enumerate(mask) if one), None)
    if first is None or len(mask) != len(ids):
        raise Unfit(NO_SAMPLES, "its completion_mask marks no token of input_ids")
    taken = ["input_ids", "completion_mask", "old_log_probs", "prompt", "completion", "advantage"]
    yield {
        "prompt": row["prompt"],
        "response": row["completion"],
        "response_ids": ids[first:],
        "response_mask": mask[first:],
        "behavior_logprobs": logprobs[first:],
        "sampling": settings_of("processed", {}),
        **{name: value for name, value in row.items() if name not in taken},
    }


def _trl(row: Row) -> Iterator[Row] | None:
    """A row of what TRL's GRPO makes of a prompt, or its rollout_func gives back."""
    name = next((name for name in ("sampling_per_token_logps", "logprobs") if name in row), None)
    if not _are_ids(row["completion_ids"]) or name is None:
        return None
    taken = {
        *[
            "prompt",
            "completion",
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "old_per_token_logps",
            "ref_per_token_logps",
            "advantages",
            "advantage",
            "env_mask",
            "tool_mask",
        ],
        name,
    }
    return iter(
        [
            {
                "prompt": row["prompt"],
                "response": row.get("completion") or "",
                "response_ids": row["completion_ids"],
                "response_mask": row.get("tool_mask", row.get("env_mask", row.get("completion_mask"))),
                "behavior_logprobs": _chosen(row[name]),
                "sampling": settings_of("processed", {}),
                **{name: value for name, value in row.items() if name not in taken},
            }
        ]
    )


def _chosen(values: Any) -> Any:
    """One number a token: vllm-serve gives a list for each, the chosen token's where one is asked for."""
    if isinstance(values, list) and values and all(isinstance(one, list) and len(one) == 1 for one in values):
        return [one[0] for one in values]
    return values


FORMS: tuple[tuple[str, frozenset[str], Callable[[Row], Iterator[Row] | None]], ...] = (
    ("verifiers", frozenset(("traces", "task", "env")), episode),
    ("verifiers", frozenset(("nodes", "calls", "task")), trace),
    ("verifiers", frozenset(("trajectory", "prompt", "completion")), steps),
    ("verl", frozenset(("prompts", "responses", "response_mask")), _verl),
    ("openrlhf", frozenset(("observation_tokens", "action_ranges", "prompt")), _openrlhf),
    ("skyrl", frozenset(("prompt_token_ids", "response_ids", "loss_masks")), _skyrl),
    ("slime", frozenset(("tokens", "response", "response_length", "prompt", "status")), _slime),
    ("trl", frozenset(("input_ids", "completion_mask", "old_log_probs", "prompt", "completion")), _trl_async),
    ("trl", frozenset(("prompt", "prompt_ids", "completion_ids")), _trl),
)
"""Whose rollouts have which columns, and what reads a row that has them; None where it is no rollout after all."""


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
