"""Verdicts: right, wrong or unknown, and no response can hold a run up or bring it down."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.gather import VerifyConfig
from grape_service.errors import UserError
from grape_service.gather.samples import verify_id
from grape_service.gather.verdicts import Question, Verifier, verifier_name

HERE = "tests.grape_service.gather.test_verdicts"


def odd_judge(response: str, answer: str | None, row: dict[str, Any]) -> Any:
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise ValueError("no idea")
    return {"yes": True, "no": False, "skip": None, "word": "wrong", "five": 5}[response]


def words(config: dict[str, Any], *questions: tuple[str, str | None]) -> list[tuple[str, str]]:
    with Verifier(VerifyConfig.model_validate(config)) as verifier:
        asked = [Question(response, answer, {}) for response, answer in questions]
        return [(verdict.word, verdict.reason) for verdict in verifier.verdicts(asked)]


def test_exact_and_regex() -> None:
    assert words({"method": "exact", "answer": "a"}, (" 4\n", "4"), ("5", "4"), ("4", None)) == [
        ("right", "is the answer"),
        ("wrong", "is not the answer"),
        ("unknown", "no answer in the pool"),
    ]
    numbered = {"method": "regex", "answer": "a", "pattern": r"answer is (\d+)"}
    asked = [("The answer is 3. No, the answer is 4.", "4"), ("the answer is 5", "4"), ("four", "4")]
    assert [word for word, _ in words(numbered, *asked)] == ["right", "wrong", "wrong"]
    assert [word for word, _ in words({"method": "regex", "pattern": "ok"}, ("ok", None), ("no", None))] == [
        "right",
        "wrong",
    ]


def test_math_is_math_verifys() -> None:
    asked = [(r"so it is $\frac{1}{2}$", "0.5"), ("The answer is 3.", "4"), ("no idea", "4"), ("1", "")]
    found = words({"method": "math", "answer": "a"}, *asked)
    assert [word for word, _ in found] == ["right", "wrong", "wrong", "unknown"]
    assert verifier_name(VerifyConfig(method="math", answer="a")).startswith("math (math-verify ")


def test_a_judge_that_hangs_dies_or_raises_says_nothing() -> None:
    config = {"method": f"{HERE}:odd_judge", "seconds": 1.0}
    asked = ["yes", "hang", "no", "die", "raise", "skip", "word", "five", "yes"]
    started = time.monotonic()
    found = words(config, *((word, None) for word in asked))
    assert [word for word, _ in found] == [
        "right",
        "unknown",
        "wrong",
        "unknown",
        "unknown",
        "unknown",
        "wrong",
        "unknown",
        "right",
    ]
    assert [found[place][1] for place in (1, 3, 4)] == [
        "not judged within 1 seconds",
        "the judge's process died",
        "ValueError: no idea",
    ]
    assert time.monotonic() - started < 45


@pytest.mark.parametrize(
    ("method", "said"), [("no.such:thing", "there is no module"), (f"{HERE}:HERE", "has no function")]
)
def test_a_judge_that_is_not_there_is_refused(method: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        words({"method": method}, ("x", None))


def test_a_corrected_judge_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdicts that are stored are judged again, wherever in its package the function is written."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from mine.judges import judge\n")
    source = tmp_path / "mine" / "judges.py"
    source.write_text("def judge(response, answer, row):\n    return True\n")
    verify = VerifyConfig(method="mine:judge")
    before = verifier_name(verify)
    assert before.startswith("mine:judge (source ")
    assert verifier_name(verify) == before
    (tmp_path / "helpers_of_mine.py").write_text("RIGHT = True\n")
    source.write_text(
        "import re, helpers_of_mine\n\ndef judge(response, answer, row):\n    return helpers_of_mine.RIGHT\n"
    )
    after = verifier_name(verify)
    (tmp_path / "helpers_of_mine.py").write_text("RIGHT = None\n")
    ids = {verify_id(verify, name) for name in (before, after, verifier_name(verify))}
    assert len(ids) == 3, "its package and what that imports decide what it says"


def test_a_response_is_never_run() -> None:
    response = "__import__('os')._exit(5)"
    assert words({"method": "math", "answer": "a"}, (response, "4"), ("4", "4"))[1][0] == "right"
