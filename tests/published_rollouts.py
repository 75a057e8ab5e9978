"""Rollouts of trainers in the form in which they write them, and what each becomes as a pool.

Where a trainer keeps ids alone the response is empty here: only a tokenizer knows their words.
"""

from __future__ import annotations

from tests.published_answers import ANSWERED
from tests.published_pairs import PAIRS
from tests.published_pools import ANSWER, POOLS, USER, Published

ROLLOUT = "prompt in 'prompt', response in 'response'"
VERIFIERS_NODES = [
    {
        "parent": None,
        "tools": [{"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}}],
        "message": {"role": "user", "content": "1+2?"},
        "sampled": False,
        "timestamp": 1.0,
        "token_ids": [5, 6, 7],
        "mask": [False, False, False],
        "is_content": [False, True, False],
        "logprobs": [],
    },
    {
        "parent": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "name": "add", "arguments": '{"a": 1}'}],
        },
        "sampled": True,
        "timestamp": 2.0,
        "token_ids": [8, 9, 10, 2],
        "mask": [False, True, True, True],
        "logprobs": [-0.25, -0.5, -0.125],
    },
    {
        "parent": 1,
        "message": {"role": "tool", "tool_call_id": "c1", "content": "3"},
        "sampled": False,
        "token_ids": [11, 12],
        "mask": [False, False],
    },
    {
        "parent": 2,
        "message": {"role": "assistant", "content": "It is 3.", "reasoning_content": None},
        "sampled": True,
        "token_ids": [8, 13, 2],
        "mask": [False, True, True],
        "logprobs": [-1.0, -0.0625],
    },
]
VERIFIERS_TRACE = {
    "version": 1,
    "id": "t1",
    "verifiers": {"version": "0.4.0", "commit": None},
    "task": {"type": "SumTask", "data": {"prompt": "1+2?", "answer": "3"}, "key": "k", "hash": "h"},
    "agent": {"config": {"model": "Qwen/Qwen3-4B"}, "name": "agent", "trainable": True},
    "tools": [{"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}}],
    "nodes": VERIFIERS_NODES,
    "calls": [
        {"node": 1, "model": "Qwen/Qwen3-4B", "sampling": {"temperature": 0.7}, "finish_reason": "tool_calls"},
        {"node": 3, "model": "Qwen/Qwen3-4B", "sampling": {"temperature": 0.7}, "finish_reason": "stop"},
    ],
    "rewards": {"correct": {"score": 1.0, "weight": 1.0}, "format": {"score": 0.5, "weight": 0.5}},
    "metrics": {"turns": 2.0},
    "info": {"note": "n"},
    "is_completed": True,
    "ok": True,
    "stop_condition": "agent_completed",
}
VERIFIERS_OTHERS = {
    name: VERIFIERS_TRACE[name] for name in ("task", "agent", "rewards", "metrics", "info", "stop_condition")
}
VERIFIERS_RESPONSE = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
VERIFIERS = Published(
    rows=[{"env": {"id": "sums"}, "task": VERIFIERS_TRACE["task"], "traces": [VERIFIERS_TRACE], "ok": True}],
    expected=[
        (
            "1+2?",
            VERIFIERS_RESPONSE,
            "Qwen/Qwen3-4B",
            {**VERIFIERS_OTHERS, "trace_id": "t1", "reward": 1.25, "recorded_by": "verifiers"},
        )
    ],
    says=ROLLOUT,
    sampling={"temperature": 0.7, "logprobs": "unsaid"},
)
PRIME_RL = Published(
    rows=[{**VERIFIERS_TRACE, "info": {"prime_rl": {"env_name": "sums", "step": 3}}}],
    expected=[
        (
            "1+2?",
            VERIFIERS_RESPONSE,
            "Qwen/Qwen3-4B",
            {
                **VERIFIERS_OTHERS,
                "info": {"prime_rl": {"env_name": "sums", "step": 3}},
                "trace_id": "t1",
                "reward": 1.25,
                "recorded_by": "prime-rl",
            },
        )
    ],
    says=ROLLOUT,
    sampling={"temperature": 0.7, "logprobs": "processed"},
)
VERIFIERS_STEPS = Published(
    rows=[
        {
            "example_id": 4,
            "prompt": [USER],
            "completion": [ANSWER],
            "reward": 1.0,
            "trajectory": [
                {
                    "prompt": [USER],
                    "completion": [ANSWER],
                    "tokens": {
                        "prompt_ids": [5, 6],
                        "prompt_mask": [0, 0],
                        "completion_ids": [7, 2],
                        "completion_mask": [1, 1],
                        "completion_logprobs": [-0.5, -0.25],
                        "overlong_prompt": False,
                        "is_truncated": False,
                    },
                    "reward": None,
                    "is_truncated": False,
                }
            ],
        }
    ],
    expected=[("Hi?", "Hello.", None, {"example_id": 4, "reward": 1.0, "recorded_by": "verifiers"})],
    says=ROLLOUT,
    sampling={"logprobs": "unsaid"},
)
VERL_ROLLOUT = Published(
    rows=[
        {
            "prompts": [0, 0, 5, 6],
            "responses": [7, 8, 2, 0],
            "response_mask": [1, 1, 1, 0],
            "input_ids": [0, 0, 5, 6, 7, 8, 2, 0],
            "attention_mask": [0, 0, 1, 1, 1, 1, 1, 0],
            "position_ids": [0, 0, 0, 1, 2, 3, 4, 5],
            "rollout_log_probs": [-0.5, -0.25, -0.125, 0.0],
            "old_log_probs": [-0.5, -0.25, -0.125, 0.0],
            "rm_scores": [0.0, 0.0, 1.0, 0.0],
            "raw_prompt": [USER],
            "uid": "u1",
            "data_source": "sums",
            "reward_model": {"ground_truth": "x", "style": "rule"},
        }
    ],
    expected=[
        (
            "Hi?",
            "",
            None,
            {
                "uid": "u1",
                "data_source": "sums",
                "reward_model": {"ground_truth": "x", "style": "rule"},
                "reward": 1.0,
                "recorded_by": "verl",
            },
        )
    ],
    says=ROLLOUT,
    sampling={"logprobs": "processed"},
)
OPENRLHF_ROLLOUT = Published(
    rows=[
        {
            "prompt": "Hi?",
            "label": "x",
            "images": None,
            "mm_train_inputs": None,
            "observation_tokens": [5, 6, 7, 2, 9, 8, 2],
            "action_ranges": [[2, 4], [5, 7]],
            "rollout_log_probs": [0.0, 0.0, -0.5, -0.25, 0.0, -0.125, -1.0],
            "truncated": False,
            "reward": 0.5,
            "scores": 1.0,
            "extra_logs": {"turns": 2},
        }
    ],
    expected=[
        (
            "Hi?",
            "",
            None,
            {
                "label": "x",
                "images": None,
                "mm_train_inputs": None,
                "reward": 0.5,
                "score": 1.0,
                "extra_logs": {"turns": 2},
                "recorded_by": "openrlhf",
            },
        )
    ],
    says=ROLLOUT,
    sampling={"logprobs": "processed"},
)
SKYRL = Published(
    rows=[
        {
            "prompt": [USER],
            "prompt_token_ids": [5, 6],
            "response_ids": [7, 8, 2],
            "rewards": [0.0, 0.0, 1.0],
            "loss_masks": [1, 1, 1],
            "stop_reasons": "stop",
            "rollout_logprobs": [-0.5, -0.25, -0.125],
            "env_metrics": {"turns": 1},
        }
    ],
    expected=[("Hi?", "", None, {"reward": 1.0, "env_metrics": {"turns": 1}, "recorded_by": "skyrl"})],
    says=ROLLOUT,
    sampling={"logprobs": "unsaid"},
)
SLIME = Published(
    rows=[
        {
            "group_index": 1,
            "index": number,
            "prompt": [USER],
            "tokens": [5, 6, 7, 8, 2],
            "response": text,
            "response_length": 3,
            "label": "x",
            "reward": 1.0,
            "loss_mask": None,
            "rollout_log_probs": [-0.5, -0.25, -0.125],
            "status": status,
            "metadata": {"level": 2},
        }
        for number, (text, status) in enumerate((("Hello.", "completed"), ("Hel", "truncated")))
    ],
    expected=[
        (
            "Hi?",
            "Hello.",
            None,
            {
                "group_index": 1,
                "index": 0,
                "label": "x",
                "reward": 1.0,
                "metadata": {"level": 2},
                "recorded_by": "slime",
            },
        )
    ],
    says=ROLLOUT,
    truncated=1,
    sampling={"logprobs": "processed"},
)
TRL_ASYNC = Published(
    rows=[
        {
            "prompt": [USER],
            "completion": [ANSWER],
            "input_ids": [5, 6, 7, 8, 2],
            "completion_mask": [0, 0, 1, 1, 1],
            "old_log_probs": [0.0, 0.0, -0.5, -0.25, -0.125],
            "advantage": 0.5,
            "model_version": 3,
            "group_id": 1,
            "metrics": {"reward": 1.0},
            "enqueued_at": 1.5,
        }
    ],
    expected=[
        (
            "Hi?",
            "Hello.",
            None,
            {
                "model_version": 3,
                "group_id": 1,
                "metrics": {"reward": 1.0},
                "enqueued_at": 1.5,
                "recorded_by": "trl",
            },
        )
    ],
    says=ROLLOUT,
    sampling={"logprobs": "processed"},
)
TRL_ROLLOUT = Published(
    rows=[
        {
            "prompt": [USER],
            "completion": [ANSWER],
            "prompt_ids": [5, 6],
            "completion_ids": [7, 8, 2],
            "logprobs": [[-0.5], [-0.25], [-0.125]],
            "reward": 1.0,
        }
    ],
    expected=[("Hi?", "Hello.", None, {"reward": 1.0, "recorded_by": "trl"})],
    says=ROLLOUT,
    sampling={"logprobs": "processed"},
)

ROLLOUTS: dict[str, Published] = {
    "verifiers": VERIFIERS,
    "prime-rl": PRIME_RL,
    "verifiers-steps": VERIFIERS_STEPS,
    "verl-rollout": VERL_ROLLOUT,
    "openrlhf-rollout": OPENRLHF_ROLLOUT,
    "skyrl": SKYRL,
    "slime": SLIME,
    "trl-async": TRL_ASYNC,
    "trl-rollout": TRL_ROLLOUT,
}

PUBLISHED = POOLS | PAIRS | ANSWERED | ROLLOUTS
"""Every pool that a team or a trainer publishes."""
