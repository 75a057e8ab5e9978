"""Templates that never end, or fill the memory, end with an error; others render as transformers renders them."""

from __future__ import annotations

import os
import resource
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grape_service.errors import UserError
from grape_service.render import sandbox
from grape_service.render.sandbox import TODAY, RenderingError, Source, TooMuch
from grape_service.render.template import ChatTemplate
from tests import tiny_models

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
HUGE = {
    "repetition": "{{ 'a' * 999999999999 }}",
    "doubling": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "center": "{{ 'a'|center(3000000000) }}",
    "format": "{{ '{:>3000000000}'.format(1) }}",
    "slice": "{% for x in 'ab'|slice(1000000000) %}{{ x }}{% endfor %}",
    "join": "{{ ('b'*100000)|join('c'*100000) }}",
    "map": "{{ ['a']|map('center', 3000000000)|list }}",
    "tojson": "{{ [1]|tojson(indent=3000000000) }}",
    "output": "{% set t = 'a'*10000000 %}{% for i in range(999) %}{{ t }}{% endfor %}",
    "lists": "{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_a_template_without_an_end_is_refused(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"render\.chat_template (does not render one short message|cannot render)"):
        ChatTemplate(tokenizer, (ENDLESS | HUGE)[name], {})
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@pytest.mark.parametrize("given", ["chatml", "templates/chat.jinja"])
def test_a_file_name_is_no_template(given: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=rf"render\.chat_template '{given}' is neither Jinja text nor the name of one"):
        ChatTemplate(tokenizer, given, {})


def test_a_row_on_which_it_has_no_end_is_rejected_and_the_next_is_not(tokenizer: Any) -> None:
    text = "{% for m in messages %}{{ m.content if m.content|length < 30 else 'a' * 3000000000 }}{% endfor %}"
    template = ChatTemplate(tokenizer, text, {})
    with pytest.raises(TooMuch, match="2 GiB of memory"):
        template.render([{"role": "user", "content": "long " * 20}])
    assert template.render([{"role": "user", "content": "short"}]) == "short"


def test_text_that_the_conversation_accounts_for_is_no_reason() -> None:
    escaped = Source("{{ messages|tojson(ensure_ascii=true) }}", {})
    words = "\N{GRINNING FACE}" * 100_000
    assert len(escaped.render([{"role": "user", "content": words}], None, False)) > 12 * 100_000
    added = Source("{{ 'a' * messages[0].content }}", {})
    assert len(added.render([{"content": 2**17}], None, False)) == 2**17
    with pytest.raises(TooMuch, match="more than 131,072 characters beside 16 for each one of the conversation"):
        added.render([{"content": 2**17 + 2**12}], None, False)


def test_a_process_that_was_killed_is_started_again() -> None:
    source = Source("{{ messages[0].content }}", {})
    assert source.render([{"role": "user", "content": "a"}], None, False) == "a"
    child = sandbox._process._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert source.render([{"role": "user", "content": "b"}], None, False) == "b"


def test_it_renders_as_transformers_does(tokenizer: Any) -> None:
    text = (
        "{% for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{{ ', ' if not loop.last }}"
        "{% if loop.index == 3 %}{% break %}{% endif %}{% else %}none{% endfor %}\n"
        "{%- generation %}{{ 2 * 3 + 2 ** 3 }}{% endgeneration %}{{ 'a' ~ 1 ~ ['b' + 'c'] }}\n"
        "  {% set ns = namespace(self=1) %}{{ dict(a=1) | tojson }}{{ tools | tojson(indent=1) }}"
        "{{ eos_token }}{{ pad_token }}"
        "{{ [1.0, 1e30, 10**30, true, none, 'é<>&', '\U0001f642'] | tojson }}{{ nothing }}{{ messages[0].timestamp }}"
        "{{ messages[-1].thinking }}{{ messages[-1].reasoning_content }}{{ add_generation_prompt }}{{ effort }}"
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": word} for word in ("a", "", "b", "c", "d")]
    messages[0]["timestamp"] = datetime(2024, 1, 1)
    messages.append({"role": "assistant", "content": "x", "reasoning": "thoughts \ud800"})
    tools = [{"type": "function", "function": {"name": "add", "big": 10**30}}]
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=text, tokenize=False, effort="high", add_generation_prompt=True
    )
    source = Source(text, {**tokenizer.special_tokens_map, "effort": "high"})
    assert source.render(messages, tools, True) == expected


@pytest.mark.parametrize("text", ["{{ raise_exception('no tools') }}", "{{ messages.x.y }}", "{{ namespace(_a=1) }}"])
def test_what_a_template_says_when_it_refuses_is_kept(text: str) -> None:
    with pytest.raises(RenderingError, match=r"no tools|has no attribute|_a"):
        Source(text, {}).render([], None, False)


def test_the_date_is_always_the_same_and_every_code_is_known() -> None:
    codes = [f"%{code}" for code in "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"] + ["%-d", "%_d", "%-m", "%^b"]
    text = Source("{{ strftime_now(messages) }}", {})
    shown = Source("{{ strftime_now(messages[0].f) }}", {}).render([{"f": "|".join(codes)}], None, False)
    assert "%" not in shown.replace("|%|", "||")
    assert Source("{{ strftime_now('%d %b %Y, %A, %j') }}", {}).render([], None, False) == "26 Jul 2024, Friday, 208"
    assert datetime(2024, 7, 26) == TODAY
    with pytest.raises(RenderingError):
        text.render([], None, False)


def test_another_process_than_the_one_that_started_it_gets_its_own() -> None:
    source = Source("{{ messages[0].content }}", {})
    assert source.render([{"content": "a"}], None, False) == "a"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, source.render([{"content": "of the child"}], None, False).encode())
            sandbox._process.end()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"of the child"
    assert source.render([{"content": "b"}], None, False) == "b"
    assert Path(f"/proc/{pid}").exists() is False
