"""Preferences and arenas: two answers a row, and what each becomes as a pool."""

from __future__ import annotations

from tests.published_pools import ANSWER, SAID, USER, Published

PREFERENCE = Published(
    rows=[{"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, SAID], "score_chosen": 8.0}],
    expected=[
        ("Hi?", "Hello.", None, {"score_chosen": 8.0, "response_column": "chosen"}),
        ("Hi?", "No idea.", None, {"score_chosen": 8.0, "response_column": "rejected"}),
    ],
    says="prompt in 'prompt', a response in each of chosen, rejected",
)
PREFERENCE_ALONE = Published(
    rows=[
        {
            "chosen": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER],
            "rejected": [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, SAID],
        }
    ],
    expected=[
        (
            [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "Hi?")],
            text,
            None,
            {"response_column": column},
        )
        for text, column in (("Hello.", "chosen"), ("No idea.", "rejected"))
    ],
    says="prompt in the conversations themselves, a response in each of chosen, rejected",
)
TRANSCRIPTS = Published(
    rows=[
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Well?\n\nAssistant: Well.",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Well?\n\nAssistant: No.",
        }
    ],
    expected=[
        ([("user", "Hi?"), ("assistant", "Hello."), ("user", "Well?")], text, None, {"response_column": column})
        for text, column in (("Well.", "chosen"), ("No.", "rejected"))
    ],
    says="prompt in the conversations themselves, a response in each of chosen, rejected",
)
ARENA = Published(
    rows=[
        {
            "prompt": "Hi?",
            "response_a": "Hello.",
            "response_b": "No idea.",
            "model_a": "gpt-4",
            "model_b": "llama",
            "winner": "model_a",
            "answer": "A",
        }
    ],
    expected=[
        (
            "Hi?",
            text,
            model,
            {"model_a": "gpt-4", "model_b": "llama", "winner": "model_a", "answer": "A", "response_column": column},
        )
        for text, model, column in (("Hello.", "gpt-4", "response_a"), ("No idea.", "llama", "response_b"))
    ],
    says="prompt in 'prompt', a response in each of response_a, response_b",
)
ARENA_CONVERSATIONS = Published(
    rows=[{"conversation_a": [USER, ANSWER], "conversation_b": [USER, SAID], "model_a": "m", "model_b": "n"}],
    expected=[
        ("Hi?", "Hello.", "m", {"model_a": "m", "model_b": "n", "response_column": "conversation_a"}),
        ("Hi?", "No idea.", "n", {"model_a": "m", "model_b": "n", "response_column": "conversation_b"}),
    ],
    says="prompt in the conversations themselves, a response in each of conversation_a, conversation_b",
)

PAIRS: dict[str, Published] = {
    "preference": PREFERENCE,
    "preference-alone": PREFERENCE_ALONE,
    "transcripts": TRANSCRIPTS,
    "arena": ARENA,
    "arena-conversations": ARENA_CONVERSATIONS,
}
