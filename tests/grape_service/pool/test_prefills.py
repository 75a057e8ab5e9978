"""Prefills of pools: prompts that end with the assistant's words, and columns of them, in each shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grape_service.pool.outcomes import Rejected
from grape_service.rows.candidate import Candidate
from grape_service.storage.storage import Storage
from tests.grape_service.pool.one_row import accepted, normalise, reason
from tests.prepared_pools import make_config, prepare, write_jsonl

pytestmark = pytest.mark.quick

ASKED = {"role": "user", "content": "2+2?"}
GIVEN = {"role": "assistant", "content": "It is"}
PROMPT = [ASKED, GIVEN]


def read(row: dict[str, Any], **keys: Any) -> list[Candidate]:
    items = normalise(row, **keys)
    assert not any(isinstance(item, Rejected) for item in items), items
    return [item.candidate for item in items]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "response": " 4."},
        {"prompt": [ASKED, {**GIVEN, "prefix": True, "country": "DE"}], "response": " 4."},
        {"prompt": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "It is"}], "response": " 4."},
        {
            "prompt": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]',
            "response": " 4.",
        },
        {"prompt": "2+2?", "response": " 4.", "prefill": "It is"},
        {"prompt": PROMPT, "response": " 4.", "prefill": "It is"},
        {"question": "2+2?", "generations": [" 4."], "assistant_prefill": "It is"},
        {"question": "2+2?", "generations": [" 4."], "response_prefix": ["It is"]},
        {"prompt": "2+2?", "responses": [{"response": " 4.", "response_prefill": "It is"}]},
        {"messages": PROMPT, "choices": [{"message": {"role": "assistant", "content": " 4."}}]},
        {"messages": [ASKED, {"role": "assistant", "content": "It is 4."}], "prefill": "It is"},
        {"prompt": PROMPT, "response": [ASKED, {"role": "assistant", "content": "It is 4."}]},
    ],
)
def test_a_prefill_is_the_end_of_the_prompt(row: dict[str, Any]) -> None:
    [candidate] = read(row)
    assert candidate.prompt == PROMPT
    assert candidate.response == " 4."
    assert not any("prefi" in name for name in candidate.other)
    [without] = read({"prompt": "2+2?", "response": " 4."})
    assert candidate.prompt_id not in (without.prompt_id, "")
    assert candidate.prompt_id == read({"prompt": PROMPT, "response": " 5."})[0].prompt_id


def test_responses_with_prefills_of_their_own_compete_apart() -> None:
    row = {"prompt": "2+2?", "responses": ["4.", " 4.", "our."], "prefill": [None, "It is", "F"]}
    one, two, three = read(row)
    assert one.prompt == [ASKED]
    assert two.prompt == PROMPT
    assert three.prompt == [ASKED, {"role": "assistant", "content": "F"}]
    assert len({candidate.prompt_id for candidate in (one, two, three)}) == 3


@pytest.mark.parametrize("nothing", [None, "", "nan", float("nan")])
def test_a_cell_that_says_nothing_is_no_prefill(nothing: Any) -> None:
    assert accepted({"prompt": "2+2?", "response": "4.", "prefill": nothing}).prompt == [ASKED]
    assert accepted({"prompt": [ASKED, {**GIVEN, "content": ""}], "response": "4."}).prompt == [ASKED]


def test_a_prefill_that_is_carried_is_read_by_nothing() -> None:
    found = accepted({"prompt": "2+2?", "response": "4.", "prefill": "It is"}, pool={"carry": ["prefill"]})
    assert (found.prompt, found.other) == ([ASKED], {"prefill": "It is"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": PROMPT, "response": " 4.", "prefill": "They are"}, "two prefills"),
        ({"prompt": "2+2?", "response": " 4.", "prefill": 0.3}, "prefill has the wrong type"),
        (
            {"prompt": [ASKED, {**GIVEN, "reasoning_content": "Hm."}], "response": " 4."},
            "prefill is more than text",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "So 4."}], "prefill": "It is"},
            "response does not begin with its prefill",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "It is"}], "prefill": "It is"},
            "empty response",
        ),
        (
            {
                "prompt": PROMPT,
                "response": [{**ASKED, "content": "3+3?"}, {"role": "assistant", "content": "It is 6."}],
            },
            "prompt and conversation differ",
        ),
        ({"messages": PROMPT, "response": " 4."}, "both response and messages"),
    ],
)
def test_what_is_no_prefill_has_its_reason(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_a_column_that_first_appears_late_is_held_to_its_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n}+1?", "response": "It is more."} for n in range(2000)]
    rows[300]["assistant_prefill"] = "I say:"
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    _, prepared = prepare(make_config(pool), Storage(str(tmp_path / "workspace")))
    assert (prepared.rows, prepared.rejects.by_reason) == (1999, {"read otherwise than its file": 1})
