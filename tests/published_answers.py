"""Lists of answers, and what servers and evaluations write down: what each becomes as a pool."""

from __future__ import annotations

from tests.published_pools import ANSWER, SAID, USER, Published

ANTHROPIC = Published(
    rows=[
        {
            "prompt": "Hi?",
            "response": {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "A greeting."}, {"type": "text", "text": "Hello."}],
                "stop_reason": "end_turn",
            },
        },
        {
            "prompt": "Hi?",
            "response": {"type": "message", "content": [{"type": "text", "text": "Hel"}], "stop_reason": "max_tokens"},
        },
    ],
    expected=[("Hi?", [{**ANSWER, "reasoning_content": "A greeting."}], None, {})],
    says="prompt in 'prompt', response in 'response'",
    truncated=1,
)
OPENAI_RESPONSES = Published(
    rows=[
        {
            "input": "Hi?",
            "output": [
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "A greeting."}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hello.", "annotations": []}],
                },
            ],
        }
    ],
    expected=[("Hi?", [{**ANSWER, "reasoning_content": "A greeting."}], None, {})],
    says="prompt in 'input', response in 'output'",
)
GEMINI = Published(
    rows=[
        {
            "prompt": "Hi?",
            "candidates": [
                {"content": {"role": "model", "parts": [{"text": "Hello."}]}, "finishReason": "STOP"},
                {"content": {"role": "model", "parts": [{"text": "Hel"}]}, "finishReason": "MAX_TOKENS"},
            ],
        }
    ],
    expected=[("Hi?", "Hello.", None, {})],
    says="prompt in 'prompt', a list of responses in 'candidates'",
    truncated=1,
)
SGLANG = Published(
    rows=[
        {
            "prompt": "Hi?",
            "responses": [
                {
                    "text": "Hello.",
                    "output_ids": [5],
                    "meta_info": {
                        "id": "x",
                        "finish_reason": {"type": "stop", "matched": 2},
                        "output_token_logprobs": [[-0.5, 5, None]],
                    },
                },
                {
                    "text": "Hel",
                    "output_ids": [5],
                    "meta_info": {
                        "id": "y",
                        "finish_reason": {"type": "length", "length": 1},
                        "output_token_logprobs": [[-0.5, 5, None]],
                    },
                },
            ],
        }
    ],
    expected=[
        (
            "Hi?",
            "Hello.",
            None,
            {"output_ids": [5], "meta_info": {"id": "x", "finish_reason": {"type": "stop", "matched": 2}}},
        )
    ],
    says="prompt in 'prompt', a list of responses in 'responses'",
    truncated=1,
)
LM_EVAL = Published(
    rows=[
        {
            "doc_id": 0,
            "doc": {"question": "Hi?", "answer": "#### 4"},
            "target": "4",
            "arguments": {"gen_args_0": {"arg_0": "Question: Hi?\nAnswer:", "arg_1": {"until": ["\n"]}}},
            "resps": [["Hello.", "Good day."]],
            "exact_match": 1.0,
        }
    ],
    expected=[
        (
            "Question: Hi?\nAnswer:",
            text,
            None,
            {
                "doc_id": 0,
                "doc": {"question": "Hi?", "answer": "#### 4"},
                "target": "4",
                "arguments": {"gen_args_0": {"arg_1": {"until": ["\n"]}}},
                "exact_match": 1.0,
            },
        )
        for text in ("Hello.", "Good day.")
    ],
    says="prompt in 'arguments.gen_args_0.arg_0', a list of responses in 'resps'",
)

ANSWERS = Published(
    rows=[
        {
            "question": "Hi?",
            "answers": [{"text": "Hello.", "model": "m", "votes": 3}, {"text": "Hm", "stop_reason": "max_tokens"}],
        }
    ],
    expected=[("Hi?", "Hello.", "m", {"votes": 3})],
    says="prompt in 'question', a list of responses in 'answers'; source in 'model'",
    truncated=1,
)
CANDIDATE_MESSAGES = Published(
    rows=[{"messages": [USER], "candidates": [{**ANSWER, "model": "m", "reward": 0.5}, {**SAID, "model": "n"}]}],
    expected=[("Hi?", "Hello.", "m", {"reward": 0.5}), ("Hi?", "No idea.", "n", {"reward": None})],
    says="prompt in 'messages', a list of responses in 'candidates'; source in 'model'",
)

ANSWERED: dict[str, Published] = {
    "answers": ANSWERS,
    "candidate-messages": CANDIDATE_MESSAGES,
    "anthropic": ANTHROPIC,
    "openai-responses": OPENAI_RESPONSES,
    "gemini": GEMINI,
    "sglang": SGLANG,
    "lm-eval": LM_EVAL,
}
