"""Small pools in the shapes that teams publish, and what each becomes: every value that reaches a shard.

A row of `expected` is (prompt, response, source, other columns): a prompt is text, or messages as (role, content); a
response is text, or messages as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.prepared_pools import write_jsonl

Expected = tuple[Any, Any, str | None, dict[str, Any]]


@dataclass(frozen=True)
class Published:
    """A pool of one file."""

    rows: list[dict[str, Any]]
    expected: list[Expected]
    says: str
    """What `grape check` says of the shape, or a part of it."""
    truncated: int = 0
    """Responses that are left out as truncated."""
    where: list[dict[str, Any]] = field(default_factory=list)
    """A filter that the fixture's lists make possible."""
    left: int | None = None
    """Candidates that `where` leaves."""
    sampling: dict[str, Any] | None = None
    """Of a trainer's rollouts: how its candidates say that they were sampled."""

    def write(self, folder: Path) -> Path:
        """The pool as a folder with one .jsonl file."""
        return write_jsonl(folder / "train.jsonl", self.rows).parent


USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Hello."}
SAID = {"role": "assistant", "content": "No idea."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = {"role": "tool", "content": "3"}

SHAREGPT = Published(
    rows=[
        {
            "id": "x1",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "And you?"},
                {"from": "gpt", "value": "Well."},
            ],
        },
        {
            "id": "x2",
            "conversations": [
                {"from": "human", "value": "Hi?", "weight": 0.0},
                {"from": "gpt", "value": "Hello.", "weight": 1.0},
            ],
        },
    ],
    expected=[
        (
            [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "And you?")],
            "Well.",
            None,
            {"id": "x1"},
        ),
        ("Hi?", "Hello.", None, {"id": "x2"}),
    ],
    says="messages that end with the response, in 'conversations' (ShareGPT: from, value)",
)
TULU = Published(
    rows=[{"id": "t1", "messages": [USER, ANSWER], "source": "ai2/flan"}],
    expected=[("Hi?", "Hello.", "ai2/flan", {"id": "t1"})],
    says="messages that end with the response, in 'messages'",
)
TOOLS = Published(
    rows=[{"messages": [USER, CALL, TOOL, {"role": "assistant", "content": "It is 3."}], "tools": '[{"name": "add"}]'}],
    expected=[("Hi?", [CALL, TOOL, {"role": "assistant", "content": "It is 3."}], None, {})],
    says="messages that end with the response, in 'messages'",
)
MAGPIE = Published(
    rows=[
        {
            "uuid": "m1",
            "model": "Llama-3-70B",
            "instruction": "Hi?",
            "response": "Hello.",
            "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}],
            "gen_input_configs": {"temperature": 1.0, "top_p": 1.0},
        }
    ],
    expected=[
        (
            "Hi?",
            "Hello.",
            "Llama-3-70B",
            {
                "uuid": "m1",
                "instruction": "Hi?",
                "response": "Hello.",
                "gen_input_configs": {"temperature": 1.0, "top_p": 1.0},
            },
        )
    ],
    says="messages that end with the response, in 'conversations' (ShareGPT: from, value); source in 'model'",
)
OPENR1 = Published(
    rows=[
        {
            "problem": "2+2?",
            "solution": "Add.",
            "answer": "4",
            "source": "olympiads",
            "uuid": "o1",
            "generations": ["It is 4.", "It is 5.", "Let me"],
            "correctness_math_verify": [True, False, False],
            "finish_reasons": ["stop", "stop", "length"],
            "is_reasoning_complete": [True, True, False],
            "correctness_count": 1,
            "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}],
        },
        {
            "problem": "3+3?",
            "solution": "Add.",
            "answer": "6",
            "source": "cn_contest",
            "uuid": "o2",
            "generations": ["6", "Six."],
            "correctness_math_verify": [True, True],
            "finish_reasons": None,
            "is_reasoning_complete": [True, False],
            "correctness_count": 2,
            "messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}],
        },
    ],
    expected=[
        (
            problem,
            response,
            source,
            {
                "solution": "Add.",
                "answer": answer,
                "uuid": uuid,
                "correctness_math_verify": correct,
                "is_reasoning_complete": complete,
                "correctness_count": count,
                "pool_messages": [
                    {"role": "user", "content": problem},
                    {"role": "assistant", "content": "It is 4." if uuid == "o1" else "6"},
                ],
            },
        )
        for problem, response, source, answer, uuid, correct, complete, count in (
            ("2+2?", "It is 4.", "olympiads", "4", "o1", True, True, 1),
            ("2+2?", "It is 5.", "olympiads", "4", "o1", False, True, 1),
            ("3+3?", "6", "cn_contest", "6", "o2", True, True, 2),
            ("3+3?", "Six.", "cn_contest", "6", "o2", True, False, 2),
        )
    ],
    says="prompt in 'problem', a list of responses in 'generations'",
    truncated=1,
    where=[{"column": "correctness_math_verify", "equals": True}],
    left=3,
)
DEEPMATH = Published(
    rows=[
        {
            "question": "2+2?",
            "final_answer": "4",
            "difficulty": 1.5,
            "topic": "Algebra",
            "r1_solution_1": "It is 4.",
            "r1_solution_2": "Four.",
            "r1_solution_3": None,
        }
    ],
    expected=[
        (
            "2+2?",
            response,
            None,
            {"final_answer": "4", "difficulty": 1.5, "topic": "Algebra", "response_column": column},
        )
        for response, column in (("It is 4.", "r1_solution_1"), ("Four.", "r1_solution_2"))
    ],
    says="prompt in 'question', a response in each of r1_solution_1, r1_solution_2",
)
ULTRAFEEDBACK = Published(
    rows=[
        {
            "source": "evol_instruct",
            "instruction": "Say hi",
            "models": ["gpt-4", "llama"],
            "completions": [
                {"model": "gpt-4", "response": "hi there", "overall_score": 8.5, "annotations": {"honesty": "5"}},
                {"model": "llama", "response": "hey you", "overall_score": 6.0, "annotations": {"honesty": "3"}},
            ],
            "correct_answers": ["None"],
        }
    ],
    expected=[
        (
            "Say hi",
            response,
            model,
            {
                "pool_source": "evol_instruct",
                "models": model,
                "overall_score": score,
                "annotations": {"honesty": honesty},
                "correct_answers": ["None"],
            },
        )
        for response, model, score, honesty in (("hi there", "gpt-4", 8.5, "5"), ("hey you", "llama", 6.0, "3"))
    ],
    says="prompt in 'instruction', a list of responses in 'completions'; source in 'model'",
    where=[{"column": "overall_score", "at_least": 7}],
    left=1,
)
ULTRAINTERACT = Published(
    rows=[{"task": "Coding", "dataset": "codecontest", "instruction": "Hi?", "response": "Hello.", "id": "u1"}],
    expected=[("Hi?", "Hello.", None, {"task": "Coding", "dataset": "codecontest", "id": "u1"})],
    says="prompt in 'instruction', response in 'response'",
)
ULTRAINTERACT_PAIR = Published(
    rows=[
        {
            "task": "Math",
            "trajectory": [{"from": "user", "value": "2+2?"}],
            "chosen": "4",
            "rejected": "5",
            "id": "p1",
        }
    ],
    expected=[
        ("2+2?", "4", None, {"task": "Math", "id": "p1", "response_column": "chosen"}),
        ("2+2?", "5", None, {"task": "Math", "id": "p1", "response_column": "rejected"}),
    ],
    says="prompt in 'trajectory', a response in each of chosen, rejected",
)
ACEREASON = Published(
    rows=[{"category": "math", "source": "numina", "input": "2+2?", "output": "<think>\n2\n</think>4"}],
    expected=[("2+2?", "<think>\n2\n</think>4", "numina", {"category": "math"})],
    says="prompt in 'input', response in 'output'",
)
NEMOTRON = Published(
    rows=[
        {
            "input": [{"role": "user", "content": "2+2?"}],
            "output": "4",
            "category": "math",
            "reasoning": "off",
            "generator": "Qwen2.5-72B-Instruct",
            "system_prompt": "detailed thinking off",
        },
        {
            "input": "3+3?",
            "output": "6",
            "category": "math",
            "reasoning": "off",
            "generator": "DeepSeek-R1",
            "system_prompt": "",
        },
    ],
    expected=[
        (
            [("system", "detailed thinking off"), ("user", "2+2?")],
            "4",
            "Qwen2.5-72B-Instruct",
            {"category": "math", "reasoning": "off"},
        ),
        ("3+3?", "6", "DeepSeek-R1", {"category": "math", "reasoning": "off"}),
    ],
    says="prompt in 'input', response in 'output'; source in 'generator'",
)
CHOICES = Published(
    rows=[
        {
            "prompt": "Hi?",
            "model": "gpt-4o",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"},
                {"index": 1, "message": {"role": "assistant", "content": "Hel"}, "finish_reason": "length"},
            ],
        }
    ],
    expected=[("Hi?", "Hello.", "gpt-4o", {})],
    says="prompt in 'prompt', a list of responses in 'choices'; source in 'model'",
    truncated=1,
)
BATCH = Published(
    rows=[
        {
            "id": "batch_req_1",
            "custom_id": "request-1",
            "messages": [{"role": "system", "content": "Be brief."}, USER],
            "response": {
                "status_code": 200,
                "body": {
                    "id": "chatcmpl-1",
                    "model": "gpt-4o",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                            "finish_reason": "stop",
                        }
                    ],
                },
            },
            "error": None,
        }
    ],
    expected=[
        (
            [("system", "Be brief."), ("user", "Hi?")],
            "Hello.",
            "gpt-4o",
            {
                "id": "batch_req_1",
                "custom_id": "request-1",
                "response": {"status_code": 200, "body": {"id": "chatcmpl-1"}},
                "error": None,
            },
        )
    ],
    says="prompt in 'messages', a list of responses in 'response.body.choices'; source in 'response.body.model'",
)
VERL = Published(
    rows=[
        {
            "data_source": "gsm8k",
            "prompt": json.dumps([{"role": "system", "content": "Be brief."}, USER]),
            "responses": ["Hello.", "Good day."],
            "ability": "chat",
            "reward_model": {"ground_truth": "x", "style": "rule"},
        }
    ],
    expected=[
        (
            [("system", "Be brief."), ("user", "Hi?")],
            response,
            None,
            {"data_source": "gsm8k", "ability": "chat", "reward_model": {"ground_truth": "x", "style": "rule"}},
        )
        for response in ("Hello.", "Good day.")
    ],
    says="prompt in 'prompt', a list of responses in 'responses'",
)
MESSAGES_AS_TEXT = Published(
    rows=[
        {"messages": json.dumps([USER, ANSWER]), "score": 1},
        {"messages": json.dumps([USER, ANSWER | {"content": "Yes."}]), "score": 2},
    ],
    expected=[("Hi?", "Hello.", None, {"score": 1}), ("Hi?", "Yes.", None, {"score": 2})],
    says="messages that end with the response, in 'messages'",
)
ALPACA = Published(
    rows=[
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ],
    expected=[("Translate.\n\nHaus", "house", None, {}), ("Say hi.", "hi", None, {})],
    says="prompt in 'instruction' and 'input', response in 'output'",
)

POOLS: dict[str, Published] = {
    "sharegpt": SHAREGPT,
    "tulu": TULU,
    "tools": TOOLS,
    "magpie": MAGPIE,
    "openr1": OPENR1,
    "deepmath": DEEPMATH,
    "ultrafeedback": ULTRAFEEDBACK,
    "ultrainteract": ULTRAINTERACT,
    "ultrainteract-pair": ULTRAINTERACT_PAIR,
    "acereason": ACEREASON,
    "nemotron": NEMOTRON,
    "choices": CHOICES,
    "batch": BATCH,
    "verl": VERL,
    "messages-as-text": MESSAGES_AS_TEXT,
    "alpaca": ALPACA,
}
