"""The page as text: what is on it, what is escaped, and which warnings it has."""

from __future__ import annotations

import html.parser
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import pytest

from grape_service.checks.findings import CheckCounts, result_of
from grape_service.config.checks import Refusal
from grape_service.config.methods import RaceRisk, ScoreConfig, SelectConfig
from grape_service.display import cut, plot_labels, size_of_model, visible
from grape_service.report.notices import warnings_of
from grape_service.report.page import _select_figures, _weight_figures, render_page, script_json
from grape_service.report.race import race_figures
from grape_service.select.counts import SelectCounts
from tests.grape_service.report.made_report import NAMES, examples, facts, job

pytestmark = pytest.mark.quick


class Elements(html.parser.HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_text_from_a_pool_is_text_and_nothing_is_loaded() -> None:
    page = render_page(facts(), examples(), job())
    elements = Elements(page)
    assert elements.tags.count("script") == 3
    assert "img" not in elements.tags
    assert elements.handlers == []
    assert all(address.startswith(("#", "data:")) for address in elements.addresses)
    assert "{{ 7 * 7 }}" in page
    assert "[cut: 98,500 more characters]" in page
    assert "&lt;U+202E&gt;gnp.exe" in page
    assert "zero&lt;U+200B&gt;width" in page
    assert 'dir="auto"' in page
    assert len(page) < 1_500_000


def test_methods_that_were_not_compared_are_named_with_what_they_lack() -> None:
    page = render_page(facts())
    assert "as their scores were not made: " in page
    assert "local (each step scored in its window)" in page


def test_a_round_shows_the_gates_figures_of_those_before() -> None:
    made = {**facts(), "version": "v0002"}
    published = render_page({**made, "created": None}, (), job(version=None))
    regenerated = render_page(made, (), job())
    for page in (published, regenerated):
        assert "2 of 3 rounds" in page
        assert "held_out_loss 1.23, pass@8 0.75" in page
        assert page.count("</b>, this one") == 1
        assert "v0001</bdi>" in page
    assert 'id="rounds"' not in render_page(made)


def test_a_race_says_what_its_figures_lack() -> None:
    whole, raced = facts(), facts()
    counts = SelectCounts(candidates=400, stopped_candidates=40, loss_tokens=1000, stopped_tokens=250)
    raced["statistics"]["race"] = race_figures(ScoreConfig(race=RaceRisk(risk=0.01, audit=0.1)), counts)
    page = render_page(raced, [])
    assert "What needs all scores lacks those" in page
    assert "mean score of those scored to the end" in page
    assert "No kept prompt was scored whole to see" in page
    assert "scored to the end" not in render_page(whole, [])


def test_a_clean_release_has_no_warning_and_bad_ones_have_their_own() -> None:
    assert warnings_of(facts()) == []
    assert "wins" in warnings_of(facts(better="teacher"))[0].text
    texts = " ".join(warning.text for warning in warnings_of(facts(collapse=True)))
    for part in ("effective sample size", "lower bound", "last tenth"):
        assert part in texts
    bad = facts()
    bad["counts"]["pool"] |= {"rejected": 300, "truncated": 200}
    assert [w.text.split(" of ")[1][:8] for w in warnings_of(bad)] == ["the pool", "the cand"]
    assert all(warning.change for warning in warnings_of(bad))


def _margins(made: dict[str, Any]) -> None:
    for row in made["statistics"]["report"]["select"]["margins"]:
        row[:] = [sum(row), *([0] * (len(row) - 1))]


def _select(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made["statistics"]["report"]["select"].update(values)


def _counts(stage: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made["counts"][stage].update(values)


def _check(made: dict[str, Any]) -> None:
    check = Refusal()
    made["statistics"]["checks"] = [{**result_of(check, CheckCounts(10, 9, 1.0, {"refuses": 9})), "table": "findings"}]


WAYS: dict[str, Callable[[dict[str, Any]], None]] = {
    "could not be used": _counts("pool", rejected=300),
    "cut off by a length limit": _counts("pool", truncated=200),
    "prompts were left out": _counts("select", prompts_left_out={"margin below select.min_margin": 100}),
    "never wins (0 of 300 prompts)": _select(wins=[200, 100, 0], prompts_with=[300, 300, 300]),
    "almost never wins (1 of 300 prompts)": _select(wins=[200, 99, 1], prompts_with=[300, 300, 300]),
    "wins 97%": _select(wins=[290, 5, 5], prompts_with=[300, 300, 300]),
    "much shorter than": _select(winner_tokens=20.0, rival_tokens=90.0),
    "much longer than": _select(winner_tokens=90.0, rival_tokens=20.0),
    "score and length go together": _select(within=-0.8),
    "within the noise of bf16": _margins,
    "Whether the turn end counts": _select(agree={"turn end the other way": 100}),
    "effective sample size": lambda made: made["statistics"]["weights"].update(effective_share=0.1),
    "lower bound": lambda made: made["statistics"]["weights"].update(weight_low=0.3),
    "upper bound": lambda made: made["statistics"]["weights"].update(weight_high=0.1),
    "last tenth": lambda made: made["statistics"]["report"]["weights"].update(last_tenth=0.7),
    "no behavior policy": _counts("weigh", uniform_rows=200),
    "Check refusal": _check,
}


@pytest.mark.parametrize("phrase", WAYS)
def test_each_bad_way_has_its_own_warning_and_no_other(phrase: str) -> None:
    made = facts()
    WAYS[phrase](made)
    found = warnings_of(made)
    assert [phrase in warning.text for warning in found] == [True]
    assert found[0].change
    assert phrase in render_page(made)


def test_few_effective_tokens_of_centered_weights_are_not_answered_with_center() -> None:
    made = facts()
    made["statistics"]["weights"] |= {"effective_share": 0.17, "weight_high": 0.05}
    assert ["[-0.02, 0.02]" in warning.change for warning in warnings_of(made)] == [True, False]
    made["config"]["weights"]["center"] = "sequence"
    found = warnings_of(made)
    assert "17% of the tokens" in found[0].text
    assert [warning.change.startswith("Leave weights.center out") for warning in found] == [True, True]


def test_plotly_knows_every_figure() -> None:
    made = facts()["statistics"]["report"]
    figures = {**_select_figures(made["select"], SelectConfig()), **_weight_figures(made["weights"], [-0.08, 0.3])}
    assert len(figures) == 11
    for figure in figures.values():
        assert go.Figure(figure).data


@pytest.mark.parametrize("empty", ["report", "weights"])
def test_releases_with_fewer_statistics_have_a_page(empty: str) -> None:
    made = facts()
    made["statistics"].pop(empty)
    assert "Lineage and cost" in render_page(made)
    assert "Warnings" in render_page({**made, "statistics": {}, "counts": {}, "config": {}, "parents": {}})


def test_scripts_cannot_be_closed_by_data() -> None:
    assert "<" not in script_json({"a": "</script>"})
    assert NAMES[2] not in render_page(facts())


def test_names_in_plots_stay_apart() -> None:
    long = "organisation/model-of-a-kind-{}B-instruct"
    labels = plot_labels([long.format(7), long.format(70), "same", "same"], 20)
    assert len(set(labels)) == 4
    assert labels[0].endswith("-instruct")
    assert all(len(label) <= 22 for label in labels)


def test_unseen_characters_are_written_out() -> None:
    assert visible("a\u200bb\u202ec\x07\n\t") == "a<U+200B>b<U+202E>c<U+0007>\n\t"
    family = "\U0001f468\u200d\U0001f469"
    assert visible(family) == family
    assert cut("abcdef", 4) == "abcd … [cut: 2 more characters]"


def test_the_size_of_a_model_has_a_unit_that_fits() -> None:
    assert [size_of_model(n) for n in (51_872, 134_515_008, 7_615_616_512)] == ["51,872", "135M", "7.6B"]
