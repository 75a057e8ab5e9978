"""Control tokens that are spelled out in the texts of pools."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_service.rows.control_tokens import (
    HEADERS,
    MARKUP,
    TURN_ENDS,
    Traces,
    rendered_opening,
    spelled_token,
    without_turn_ends,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It is 4.<|im_end|>", "It is 4."),
        ("It is 4. <|im_end|>\n<|endoftext|>\n", "It is 4."),
        ("It is 4.<|eot_id|>", "It is 4."),
        ("It is 4.</s>", "It is 4."),
        ("<|im_end|>", ""),
        ("as <s>struck</s>", "as <s>struck</s>"),
        ("It is 4.\n", "It is 4.\n"),
        ("Write <|im_end|> there", "Write <|im_end|> there"),
    ],
)
def test_turn_ends_are_cut_at_the_end_alone(text, words):
    assert without_turn_ends(text) == words


def test_words_are_no_control_tokens():
    for text in ("a <b> c", "f(x) |> g", "x[INST", "<s>a</s>", "if a < b | c > d:", "if (a <| b)"):
        assert spelled_token(text) is None
        assert rendered_opening(text) is None
    assert spelled_token("a <|eot_id|> b") == "<|eot_id|>"


def test_a_rendered_prompt_shows_at_its_beginning_alone():
    assert rendered_opening("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n") is not None
    assert rendered_opening("<s>[INST] 2+2? [/INST]") is not None
    assert rendered_opening("What does <|im_start|>user mean?") is None


TOKENS = [token for token in (*TURN_ENDS, *HEADERS) if token not in MARKUP]
PIECES = st.lists(st.sampled_from([*TOKENS, *(token[:-1] for token in TOKENS), "<", "|", ">", "]", "a ", "▁", "x_of"]))


@given(PIECES.map("".join), st.lists(st.sampled_from([*TOKENS, "a ", "▁of"]), max_size=9))
def test_traces_are_found_as_one_by_one(text: str, traces: list[str]) -> None:
    assert Traces(traces).are_in(text) == any(trace in text for trace in traces)


@given(PIECES.map("".join))
def test_a_spelled_token_is_found_wherever_one_is(text: str) -> None:
    found = spelled_token(text)
    assert (found is not None) == any(token in text for token in TOKENS)
    assert found is None or (found in TOKENS and found in text)
