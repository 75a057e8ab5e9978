"""A judge model: its question holds what it judges as text, and its answer's last verdict line counts."""

from __future__ import annotations

import pytest

from grape_service.config.gather import GatherConfig, VerifyConfig
from grape_service.gather.judge import PROMPT, judge_name, question_text, verdict_of

pytestmark = pytest.mark.quick

USER = {"role": "user", "content": "2+2?"}


def test_the_question_holds_prompt_response_and_answer() -> None:
    verify = VerifyConfig(method="judge", model="m", answer="answer")
    text = question_text(verify, [USER], "It is {answer}, {prompt}.", "4")
    assert "Request:\n2+2?\n" in text
    assert "Response:\nIt is {answer}, {prompt}.\n" in text
    assert "The right answer is:\n4\n" in text
    assert "The right answer" not in question_text(VerifyConfig(method="judge", model="m"), [USER], "4", None)
    own = VerifyConfig(method="judge", model="m", prompt="Is {response} right? Verdict: …")
    turns = [{"role": "system", "content": "Be brief."}, USER]
    assert question_text(own, turns, "4", None) == "Is 4 right? Verdict: …"
    assert "system: Be brief.\n\nuser: 2+2?" in question_text(verify, turns, "4", "4")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("It adds up.\nVerdict: right", "right"),
        ("Verdict: right\nNo, wait.\n**Verdict:** Wrong.", "wrong"),
        ("verdict: unknown", "unknown"),
        ("The verdict: right is what I would say if", "unknown"),
        ("Verdict: rightly so", "unknown"),
        ("It is right.", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_last_line_that_begins_with_a_verdict_counts(text: str, word: str) -> None:
    assert verdict_of(text, is_whole=True).word == word


def test_why_there_is_no_verdict() -> None:
    assert verdict_of("well", is_whole=True).reason == "the judge gives no line that begins with Verdict:"
    assert verdict_of("well", is_whole=False).reason == "the judge was cut at verify.max_tokens"


def test_what_says_so_is_named_by_model_weights_and_prompt() -> None:
    one, other = VerifyConfig(method="judge", model="m"), VerifyConfig(method="judge", model="m", prompt="x {response}")
    names = {judge_name(one, "a"), judge_name(one, "b"), judge_name(other, "a")}
    assert len(names) == 3
    assert judge_name(VerifyConfig(method="judge", model="m", prompt=PROMPT), "a") == judge_name(one, "a")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "judge"}, "model and method: judge belong together"),
        ({"method": "exact", "answer": "a", "model": "m"}, "model and method: judge belong together"),
        ({"method": "judge", "model": "m", "prompt": "Right?"}, "has no {response}"),
        ({"method": "judge", "model": "m", "prompt": "{response} {answer}"}, "names no column"),
        ({"method": "judge", "model": "m", "policy": {"dtyp": "float32"}}, "dtyp"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VerifyConfig.model_validate(values)


def test_a_judge_ends_no_sampling() -> None:
    judge = {"method": "judge", "model": "m"}
    with pytest.raises(ValueError, match="a judge is asked afterwards"):
        GatherConfig.model_validate({"policies": {"a": {"model": "m"}}, "verify": judge, "stop_after": {"right": 1}})
