"""Templates that never end, or fill the memory, end with an error; others render as before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grape_service.errors import UserError
from grape_service.render import limits
from grape_service.render.template import ChatTemplate, RenderingError
from tests import tiny_models

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "repetition": "{{ 'a' * 999999999999 }}",
    "doubling": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "adding": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "powers": "{{ 9 ** 99999 }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model: Path = tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama")
    return AutoTokenizer.from_pretrained(str(model))


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_refused(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_STEPS", 100_000)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"render\.chat_template does not render one short message"):
        ChatTemplate(tokenizer, ENDLESS[name], {})
    assert time.monotonic() - started < 10


def test_a_row_on_which_it_has_no_end_is_rejected_and_the_next_is_not(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_STEPS", 10_000)
    text = "{% for m in messages %}{% for i in range(m.content|length * 1000) %}{% endfor %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(tokenizer, text.replace("* 1000", "* 300"), {})
    with pytest.raises(RenderingError, match="TooManySteps"):
        template.render([{"role": "user", "content": "long " * 20}])
    assert template.render([{"role": "user", "content": "short"}]) == "short"


def test_what_templates_do_with_loops_stays() -> None:
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template, _compile_jinja_template

    text = (
        "{% for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{{ ', ' if not loop.last }}"
        "{% if loop.index == 3 %}{% break %}{% endif %}{% else %}none{% endfor %}"
        "{% for x in nothing %}{% else %} empty{% endfor %}"
        "{{ 2 * 3 + 2 ** 3 }}{{ 'a' ~ 1 ~ ['b' + 'c'] }}{% for k, v in pairs.items() %}{{ k }}={{ v }}{% endfor %}"
        "{% for t in tree recursive %}[{{ t.name }}{{ loop(t.below) if t.below }}]{% endfor %}"
    )
    values = {
        "messages": [{"content": word} for word in ("a", "", "b", "c", "d")],
        "pairs": {"x": 1},
        "tree": [{"name": "r", "below": [{"name": "s"}]}],
    }
    with limits.limited_steps():
        bounded = _compile_jinja_template(text).render(**values)
    assert _cached_compile_jinja_template is not None
    assert bounded == limits._original[-1](text).render(**values)
    assert bounded == "1/4, 2/4, 3/4,  empty14a1['bc']x=1[r[s]]"
