"""examples/gather: its config is one, and its prompts have the answers that it verifies by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grape_service.config.loading import load_config
from grape_service.gather.verdicts import Question, math

pytestmark = pytest.mark.quick

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "gather"


def test_the_config_reads_its_prompts() -> None:
    config = load_config(FOLDER / "grape.yaml")
    assert config.gather is not None
    assert list(config.gather.policies) == ["smollm", "smaller"]
    rows = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {name for row in rows for name in row} == {"question", config.gather.verify.answer, "topic"}


def test_its_answers_are_found_right() -> None:
    pytest.importorskip("math_verify", reason="math-verify is of the extra train")
    for line in (FOLDER / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert math(Question(f"It is ${row['answer']}$.", row["answer"], row)).word == "right"
        assert math(Question("It is $1000$.", row["answer"], row)).word == "wrong"
