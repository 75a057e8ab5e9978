"""Two releases against each other, and one prompt explained, on real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.config.methods import SelectConfig
from grape_service.errors import UserError
from grape_service.release.compare import compare
from grape_service.release.rounds import Round, Rounds, write_rounds
from grape_service.report.examples import prompt_text, reason_of
from grape_service.report.explain import explain
from grape_service.report.page import report_page
from tests.grape_service.report.made_releases import make_release


def first_wins(prompt: int, place: int) -> float:
    return -1.0 - place - 0.01 * prompt


def last_wins_in_a_third(prompt: int, place: int) -> float:
    return -1.0 - (2 - place if prompt % 3 == 0 else place) - (0.5 if prompt == 9 else 0) * (place == 0)


def test_a_release_agrees_with_itself(tmp_path: Path) -> None:
    release = make_release(tmp_path, "one", first_wins)
    found = compare(release, release)
    assert found["agreement"] == 1.0
    assert found["ranking"]["rank_correlation"] == pytest.approx(1.0)
    assert found["ranking"]["most_different"] == []
    assert found["ranking"]["score_difference"] == {"mean": 0.0, "largest": 0.0}
    assert found["settings"] == []


def test_two_targets_that_disagree_in_a_third_of_the_prompts(tmp_path: Path) -> None:
    pair = [make_release(tmp_path, "one", first_wins), make_release(tmp_path, "two", last_wins_in_a_third)]
    found = compare(*pair)
    assert found["prompts"] == {"first": 30, "second": 30, "both": 30}
    assert found["same_choice"] == 20
    assert found["sources"] == {"s0": [30, 20], "s2": [0, 10]}
    assert found["moves"] == [{"from": "s0", "to": "s2", "prompts": 10}]
    assert found["ranking"]["rank_correlation"] == pytest.approx((20 - 10) / 30)
    assert found["ranking"]["same_first"] == pytest.approx(2 / 3)
    # 0.01 a prompt's number; in every third the first and the last of three change places, in one by 0.5 more.
    total = sum(4 + 0.01 * number if number % 3 == 0 else 0.03 * number for number in range(30)) + 0.5
    apart = {"mean": total / 90, "largest": 2.5 - 0.09}
    assert found["ranking"]["score_difference"] == pytest.approx(apart, abs=1e-6)
    assert found["ranking"]["most_different"][0]["prompt_id"] == "p009"
    assert found["ranking"]["most_different"][0]["lost"] == pytest.approx(2.0 + 2.5)
    assert {"key": "target.model", "first": "one", "second": "two"} in found["settings"]

    page = tmp_path / "page.html"
    references = [release.reference for release in pair]
    done = CliRunner().invoke(app, ["compare", *references, "--json", "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert orjson.loads(done.stdout)["same_choice"] == 20
    assert "p009" in page.read_text()


@pytest.mark.parametrize("gone", ["workspace", "workspace/prepared/prepared-1/shards/b"])
def test_without_a_workspace_the_winners_are_still_compared(tmp_path: Path, gone: str) -> None:
    release = make_release(tmp_path, "one", first_wins)
    shutil.rmtree(tmp_path / gone)
    assert compare(release, release)["agreement"] == 1.0
    assert compare(release, release)["ranking"] is None
    with pytest.raises(UserError, match="run `grape score` with its config"):
        explain(release, "p001")
    assert "<h2>" in report_page(release, regenerate=True)


def test_each_candidate_has_its_reason(tmp_path: Path) -> None:
    release = make_release(tmp_path, "one", first_wins, max_response_tokens=6)
    found = explain(release, "p004")
    assert found["prompt"] == "question p004"
    reasons = {candidate["candidate_id"]: candidate["reason"] for candidate in found["candidates"]}
    assert reasons == {
        "c0": "kept: number 1 by score, margin 1.0000",
        "c1": "its score is lower by 1.0000",
        "c2": "longer than select.max_response_tokens 6",
    }
    assert found["candidates"][0]["logprobs"] == pytest.approx([-1.04] * 5)
    assert len(found["candidates"][0]["texts"]) == 5
    with pytest.raises(UserError, match="no prompt 'nothing'"):
        explain(release, "nothing")
    done = CliRunner().invoke(app, ["explain", release.reference, "p004"])
    assert done.exit_code == 0, done.output
    assert "longer than" in done.stdout
    narrow = CliRunner().invoke(app, ["explain", release.reference, "p004"], env={"COLUMNS": "40"}).stdout
    inside = " ".join(line.strip("│ ") for line in narrow.splitlines())
    assert "candidate c0" in inside
    assert "tokens; kept: number 1 by score, margin 1.0000" in inside, narrow
    coloured = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "NO_COLOR": ""}
    done = CliRunner().invoke(app, ["explain", release.reference, "p004"], env=coloured)
    assert "48;2;" in done.stdout  # a background in true colour


def test_what_a_method_without_scores_kept_was_not_first_by_score() -> None:
    kept = {"candidate_id": "c0", "kept": True, "rank": 1, "score": -3.0, "num_tokens": 9, "counted_tokens": 9}
    assert reason_of(kept, [kept], SelectConfig(method="longest")) == "kept by method longest"  # type: ignore[arg-type,list-item]
    assert reason_of(kept, [kept], SelectConfig()) == "kept: number 1 by score"  # type: ignore[arg-type,list-item]


def test_a_prompt_is_found_by_its_id_its_beginning_or_its_words(tmp_path: Path) -> None:
    release = make_release(tmp_path, "one", first_wins, num_prompts=12)
    assert explain(release, "p004")["prompt_id"] == explain(release, "Question  p004")["prompt_id"] == "p004"
    assert explain(release, "question p010")["prompt_id"] == "p010"
    with pytest.raises(UserError, match=r"several prompts of .* fit 'p01': p010, p011; say which"):
        explain(release, "p01")
    with pytest.raises(UserError, match=r"fit 'question': p000 \(question p000\), p001 .*, …; say which"):
        explain(release, "question")


def test_the_report_of_a_version_that_has_none_is_made_anew(tmp_path: Path) -> None:
    release = make_release(tmp_path, "one", first_wins)
    page = report_page(release)
    assert "Closest choice" in page
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", release.reference, "--out", str(out), "--json"])
    assert orjson.loads(done.stdout) == {"reference": release.reference, "report": str(out)}
    assert out.read_text() == page
    assert "Rounds" not in page
    one = Round("round-1", "org/base", release.reference, release.version, gate={"pass@8": 0.4375, "samples": 72})
    write_rounds(release.storage, Rounds("abc", release.name, 3, rounds=[one, Round("round-2", "/c1")]))
    assert "pass@8 0.438" in report_page(release, regenerate=True)


def test_a_prompt_is_shown_with_the_prefill_that_a_response_continues() -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    response = {"role": "assistant", "content": " 4."}
    assert prompt_text(orjson.dumps([*turns, response]).decode(), 2) == "user: 2+2?\n\nassistant: It is"
    assert prompt_text(orjson.dumps([turns[0], response]).decode(), 1) == "2+2?"
