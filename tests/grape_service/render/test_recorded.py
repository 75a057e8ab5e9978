"""Recorded ids decode to their response, what rollouts put around them is cut in step, and the rest is rejected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grape_service.config.schema import RenderConfig
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from tests import tiny_models
from tests.template_families import make

PROMPT = [{"role": "user", "content": "2+2?"}]
PAD, START, END = 512, 513, 514
NEWLINE = 198
NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chatml")
    tiny_models.make_tokenizer(folder, "chatml")
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, RenderConfig())


@pytest.fixture(scope="module")
def padded_by_a_stop(tokenizer: Any) -> Renderer:
    """As Qwen ships: <|endoftext|> pads, and generation stops there too."""
    return Renderer(tokenizer, RenderConfig(), stop_ids=[PAD, END])


def render(renderer: Renderer, response: Any, ids: list[int], **over: Any) -> Rendered | Rejection:
    [result] = renderer.render([Candidate(PROMPT, response, "p", "c", response_ids=ids, **over)])
    return result


def with_loss(result: Rendered | Rejection) -> tuple[list[int], list[int]]:
    assert isinstance(result, Rendered), result
    kept = result.loss_mask > 0
    return result.input_ids[kept].tolist(), result.loss_mask[kept].tolist()


def text_ids(renderer: Renderer, text: str) -> list[int]:
    return renderer.tokenizer.encode(text, add_special_tokens=False)


TEXT = "The answer is 4."


def prompt_ids(renderer: Renderer) -> list[int]:
    return list(renderer.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False))


AROUND: dict[str, tuple[str, list[int]]] = {
    "nothing": ("", [END]),
    "no turn end": ("", []),
    "padding": ("", [END, *[PAD] * 8]),
    "padding alone": ("", [PAD] * 3),
    "padded with turn ends": ("", [END] * 5),
    "a newline behind the turn end": ("", [END, NEWLINE]),
    "a second turn end": ("", [END, NEWLINE, END]),
    "padding in front": ("padding", [END]),
    "a prompt in front": ("prompt", [END]),
    "padding and a prompt in front": ("padded prompt", [END, PAD, PAD]),
}


@pytest.mark.parametrize("around", list(AROUND))
def test_what_is_around_a_response_is_cut_and_its_logprobs_in_step(renderer: Renderer, around: str) -> None:
    front, behind = AROUND[around]
    prompt = prompt_ids(renderer)
    before = {"": [], "padding": [PAD] * 4, "prompt": prompt, "padded prompt": [PAD, PAD, *prompt]}[front]
    words = text_ids(renderer, TEXT)
    ids = [*before, *words, *behind]
    values = [-1.0 - place / 8 for place in range(len(ids))]
    result = render(renderer, TEXT, ids, recorded_logprobs=values)
    assert with_loss(result) == ([*words, END], [1] * len(words) + [2])
    assert result.input_ids[: result.prompt_len].tolist() == prompt
    assert result.recorded_logprobs is not None
    kept = values[len(before) : len(before) + len(words)]
    end = values[len(before) + len(words)] if END in behind[:1] else NAN
    np.testing.assert_array_equal(result.recorded_logprobs, np.array([*kept, end], np.float32))
    without = render(renderer, TEXT, ids, recorded_logprobs=values[len(before) :])
    np.testing.assert_array_equal(without.recorded_logprobs, result.recorded_logprobs)


def test_padding_that_is_a_stop_token_too(padded_by_a_stop: Renderer) -> None:
    renderer, words = padded_by_a_stop, text_ids(padded_by_a_stop, TEXT)
    values = [-1.0] * len(words)
    for behind, recorded in (([END, PAD, PAD], [-2.0, 0.0, 0.0]), ([PAD, PAD], [0.0, 0.0])):
        result = render(renderer, TEXT, [*words, *behind], recorded_logprobs=[*values, *recorded])
        assert with_loss(result)[0] == [*words, END]
        expected = recorded[0] or NAN
        np.testing.assert_array_equal(result.recorded_logprobs, np.array([*values, expected], np.float32))
    assert with_loss(render(renderer, TEXT, [*words, PAD]))[0] == [*words, PAD]  # a stop token like another
    assert with_loss(render(renderer, TEXT, [*words, PAD, PAD], truncated=True)) == (words, [1] * len(words))


@pytest.mark.parametrize(
    ("response", "ids", "says"),
    [
        ("The answer is 4.", [11, 48, 85, 122], "where the response says 'The answer is 4.'"),
        ("The answer is 4.", [51, 256, 387, 297, 220, 20, 13, END], "5."),
        ("The answer", [51, 256, END, NEWLINE, START, 51, 256], None),
        ("TheThe", [51, 256, END, 51, 256], None),
    ],
    ids=["another text", "another digit", "goes on behind a turn end", "a turn end inside"],
)
def test_other_ids_are_rejected_with_what_both_say(
    renderer: Renderer, response: str, ids: list[int], says: str | None
) -> None:
    result = render(renderer, response, ids)
    assert isinstance(result, Rejection)
    assert result.reason == "response_ids are not the response"
    assert says is None or says in str(result.detail)


def test_a_prompt_of_other_words_in_front_is_rejected(renderer: Renderer) -> None:
    other = renderer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+3?"}], add_generation_prompt=True, return_dict=False
    )
    result = render(renderer, TEXT, [*other, *text_ids(renderer, TEXT), END])
    assert isinstance(result, Rejection)
    assert "2+2" not in str(result.detail)


@pytest.mark.parametrize("unknown", [-9999.0, -1e30, float("-inf"), NAN, None])
def test_log_probabilities_that_are_no_numbers_are_not_known(renderer: Renderer, unknown: float | None) -> None:
    words = text_ids(renderer, TEXT)
    values = [-1.0, unknown, *[-2.0] * (len(words) - 2), -3.0]
    result = render(renderer, TEXT, [*words, END], recorded_logprobs=values)
    assert isinstance(result, Rendered)
    expected = [-1.0, NAN, *[-2.0] * (len(words) - 2), -3.0]
    np.testing.assert_array_equal(result.recorded_logprobs, np.array(expected, np.float32))


def test_lists_that_differ_by_the_turn_end_are_told_apart(renderer: Renderer) -> None:
    words = text_ids(renderer, TEXT)
    values = [-1.0 - place for place in range(len(words))]
    cases: list[tuple[list[int], list[Any], list[float]]] = [
        ([*words, END], values, [*values, NAN]),  # the turn end's is not recorded
        (words, [*values, -9.0], [*values, -9.0]),  # the turn end is not among the ids
        (words, [None, *values], [*values, NAN]),  # the first is a token's without any before it
        ([*words, END], [None, *values, -9.0], [*values, -9.0]),
    ]
    for ids, recorded, expected in cases:
        result = render(renderer, TEXT, ids, recorded_logprobs=recorded)
        assert isinstance(result, Rendered), result
        np.testing.assert_array_equal(result.recorded_logprobs, np.array(expected, np.float32))
    for ids, recorded in (([*words, END], values[1:]), (words, values[1:]), (words, [*values, -9.0, -9.0])):
        result = render(renderer, TEXT, ids, recorded_logprobs=recorded)
        assert isinstance(result, Rejection)
        assert result.reason == "recorded log-probabilities do not match response_ids"
    cut = render(renderer, TEXT, words, recorded_logprobs=[*values, -9.0], truncated=True)
    assert isinstance(cut, Rejection)


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "\n<think>\n"])
def test_a_second_think_is_cut(opening: str) -> None:
    renderer = Renderer(make("deepseek-r1"), RenderConfig())
    response = f"{opening}add\n</think>\n\nIt is 4."
    ids = text_ids(renderer, response)
    values = [-1.0 - place for place in range(len(ids))]
    for said in (response, "add\n</think>\n\nIt is 4."):
        result = render(renderer, said, ids, recorded_logprobs=values)
        assert isinstance(result, Rendered), result
        whole = renderer.tokenizer.decode(result.input_ids)
        assert whole.count("<think>") == 1
        num_words = int((result.loss_mask == 1).sum())
        np.testing.assert_array_equal(result.recorded_logprobs[:num_words], values[-num_words:])


def test_a_mask_leaves_what_a_tool_said_without_loss(renderer: Renderer) -> None:
    action, tool, answer = (text_ids(renderer, text) for text in ("add(2,2)", "RESULT 4", "It is 4."))
    ids, text = [*action, *tool, *answer, END], "add(2,2)RESULT 4It is 4."
    mask = [*[1] * len(action), *[0] * len(tool), *[1] * (len(answer) + 1)]
    values = [-1.0 if one else 0.0 for one in mask]
    for recorded in (values, [-1.0] * sum(mask)):
        result = render(renderer, text, ids, response_mask=mask, recorded_logprobs=recorded)
        assert isinstance(result, Rendered), result
        assert result.input_ids[result.prompt_len :].tolist() == ids
        assert (result.loss_mask[result.prompt_len :] > 0).astype(int).tolist() == mask
        assert result.loss_mask[-1] == 2
        assert result.recorded_logprobs.tolist() == [-1.0] * sum(mask)
    padded = render(renderer, text, [*ids, PAD, PAD], response_mask=[*mask, 0, 0], recorded_logprobs=[*values, 0, 0])
    assert padded.input_ids.tolist() == result.input_ids.tolist()
    assert padded.loss_mask.tolist() == result.loss_mask.tolist()
    # Under another policy the same tokens have loss, and what was read between stands between.
    candidate = Candidate(PROMPT, text, "p", "c")
    other = renderer.with_system_prompt("Be brief.")
    [own] = other.render_behavior([candidate], [result], renderer.turn_end_id)
    assert own.input_ids[own.prompt_len :].tolist() == ids
    assert own.loss_mask[own.prompt_len :].tolist() == result.loss_mask[result.prompt_len :].tolist()


def test_turns_of_a_mask_end_with_their_turn_ends(renderer: Renderer) -> None:
    read = [NEWLINE, START, *text_ids(renderer, "user\n"), *text_ids(renderer, "RES"), END, NEWLINE, START]
    read += text_ids(renderer, "assistant\n")
    call, answer = text_ids(renderer, "add(2)"), text_ids(renderer, "It is 4.")
    ids = [*call, END, *read, *answer, END]
    mask = [*[1] * (len(call) + 1), *[0] * len(read), *[1] * (len(answer) + 1)]
    plain = "add(2)\nuser\nRES\nassistant\nIt is 4."  # decoded without special tokens, as rollouts are dumped
    result = render(renderer, plain, ids, response_mask=mask)
    assert isinstance(result, Rendered), result
    expected = [*[1] * len(call), 2, *[0] * len(read), *[1] * len(answer), 2]
    assert result.loss_mask[result.prompt_len :].tolist() == expected
    messages = [
        {"role": "assistant", "content": "add(2)"},
        {"role": "tool", "content": "RES"},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert render(renderer, messages, ids, response_mask=mask).loss_mask.tolist() == result.loss_mask.tolist()
    assert isinstance(render(renderer, messages, ids), Rejection)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    words=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    front=st.sampled_from(["", "pad", "prompt"]),
    behind=st.lists(st.sampled_from([PAD, END, NEWLINE]), max_size=4),
    change=st.none() | st.tuples(st.integers(0, 11), st.integers(0, 511)),
)
def test_the_tokens_with_loss_say_the_response_or_the_row_is_rejected(
    renderer: Renderer, words: str, front: str, behind: list[int], change: tuple[int, int] | None
) -> None:
    ids = text_ids(renderer, words)
    if change is not None:
        ids[change[0] % len(ids)] = change[1]
    before = {"": [], "pad": [PAD, PAD], "prompt": prompt_ids(renderer)}[front]
    recorded = [*before, *ids, *behind]
    result = render(renderer, words, recorded, recorded_logprobs=[-float(place) for place in range(len(recorded))])
    if isinstance(result, Rejection):
        assert change is not None or not words.strip() or result.reason == "response_ids are not the response"
        return
    said = b"".join(part or b"" for part in renderer.token_bytes(result.input_ids[result.loss_mask == 1]))
    assert said.decode(errors="replace").strip() == words.strip()
    assert result.loss_mask.tolist().count(2) == 1
    assert result.recorded_logprobs is not None
    places = [-int(value) for value in result.recorded_logprobs if value == value]
    assert [recorded[place] for place in places] == with_loss(result)[0][: len(places)]
