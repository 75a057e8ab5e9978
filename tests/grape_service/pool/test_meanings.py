"""Columns whose names mean something are read, or the run is refused until the config reads or carries them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from grape_service.errors import UserError
from grape_service.estimate.look import look_into
from grape_service.estimate.pool_checks import pool_findings
from grape_service.pool.candidates import Normaliser
from grape_service.pool.meanings import MEANINGS, MEDIA, REFUSED, table
from grape_service.pool.outcomes import Accepted, Rejected
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rejects, all_rows, make_config, prepare, write_jsonl

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "pools.md").read_text()
VALUES: dict[str, Any] = {
    "log-probabilities of tokens": [-0.5, -0.25],
    "what the writer thought before the response": "I add two and two.",
    "token ids of the response": [5, 6],
    "a prompt or a whole row that was tokenised already": [1, 2, 3],
    "how much a row or a token counts in training": 0.5,
    "earlier turns of the conversation": [["Hi?", "Hello."]],
    "tools that the prompt offers": [{"name": "add"}],
    "what a prompt that is no `instruction` is about": "The capital of France is Paris.",
    "documents that the template puts into the prompt": [{"title": "a", "text": "b"}],
    "the beginning of the response, which the policy did not write": "Sure, ",
}


def rows(number: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"q {n // 2}", "response": f"a {n}", **more} for n in range(number)]


def candidates(row: dict[str, Any], **keys: Any) -> list[Any]:
    return list(Normaliser(make_config("pool.jsonl", **keys)).candidates(row))


def accepted(row: dict[str, Any], **keys: Any) -> Any:
    (item,) = candidates(row, **keys)
    assert isinstance(item, Accepted), item
    return item.candidate


def test_the_page_has_the_same_table():
    assert "\n".join(table()) in PAGE, "write down what meanings.table() gives"
    names = [name for meaning in MEANINGS for name in meaning.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("meaning", REFUSED, ids=[meaning.names[0] for meaning in REFUSED])
def test_a_column_that_nothing_reads_is_refused_until_it_is_read_or_carried(tmp_path, meaning):
    value = VALUES[meaning.holds]
    assert meaning.is_meant(value)
    assert not any(map(meaning.is_meant, (None, [], "")))
    name = meaning.names[-1]
    some = rows()
    some[4][name] = value
    for pool in (some, [{"prompt": "q", "responses": [{"text": "a"}, {"text": "b", name: value}]}]):
        path = write_jsonl(tmp_path / "p.jsonl", pool)
        with pytest.raises(UserError) as error:
            prepare(make_config(path), Storage(str(tmp_path / "refused")))
        assert f"the column '{name}' of the pool holds {meaning.holds} (1 rows)" in str(error.value)
        assert f"pool.carry: [{name}]" in str(error.value)
        assert meaning.how.split("`")[0].split("NAME")[0] in str(error.value)
        checked = list(pool_findings(make_config(path), look_into(make_config(path))))
        (columns,) = [one for one in checked if getattr(one, "what", "") == "columns"]
        assert (columns.status, columns.detail) == ("error", str(error.value))
        config = make_config(path, pool={"carry": [name]})
        _, prepared = prepare(config, Storage(str(tmp_path / "carried")))
        assert any(other.endswith(name) for other in prepared.other_columns)
        assert prepared.rejects.total == 0


@pytest.mark.parametrize("value", ["on", "off", "high", True, None, ""])
def test_a_switch_named_reasoning_is_no_thought(value):
    assert accepted({"prompt": "q", "response": "a", "reasoning": value}).other == {"reasoning": value}


@pytest.mark.parametrize("name", ["stop_reason", "finishReason", "finish_reasons", "stopReason", "done_reason"])
@pytest.mark.parametrize("reason", ["max_tokens", "MAX_TOKENS", "length", {"type": "length", "length": 7}])
def test_a_limit_of_tokens_is_seen_under_every_name_in_rows_and_in_responses(name, reason):
    for row in (
        {"prompt": "q", "response": "a", name: reason},
        {"prompt": "q", "responses": [{"text": "a", name: reason}]},
    ):
        (item,) = candidates(row)
        assert isinstance(item, Rejected)
        assert item.rejection.reason == "truncated"
    assert not accepted({"prompt": "q", "response": "a", name: "end_turn"}).truncated
    assert not accepted({"prompt": "q", "response": "a", "finish_reason": "stop", "stop_reason": 128001}).truncated


@pytest.mark.parametrize("name", ["response_mask", "completion_mask", "loss_mask"])
def test_masks_are_those_of_response_ids(name):
    row = {"prompt": "q", "response": "a b", "response_ids": [5, 6], name: [1, 0]}
    assert accepted(row).response_mask == [1, 0]
    assert accepted({**row, name: [True, True]}).response_mask is None
    assert accepted({**row, name: [1, 0]}, pool={"carry": [name]}).response_mask is None
    reasons = {
        "response_mask does not match response_ids": {**row, name: [1]},
        "response_mask is not made of 0 and 1": {**row, name: [1, 0.5]},
        "response_mask is not a list": {**row, name: "10"},
        "response_mask without response_ids": {"prompt": "q", "response": "a", name: [1, 0]},
    }
    for reason, bad in reasons.items():
        (item,) = candidates(bad)
        assert item.rejection.reason == reason
    lists = {"prompt": "q", "responses": ["a", "b"], "response_ids": [[5], [6, 7]], name: [[1], [0, 1]]}
    assert [item.candidate.response_mask for item in candidates(lists)] == [None, [0, 1]]


def test_variables_of_the_template_are_the_rows_own_and_part_of_its_prompt():
    row = {"prompt": "q", "response": "a"}
    low, high = (accepted({**row, "chat_template_kwargs": {"effort": effort}}) for effort in ("low", "high"))
    text = accepted({**row, "template_kwargs": '{"effort": "low"}'})
    assert low.template_kwargs == text.template_kwargs == {"effort": "low"}
    assert low.other == {"chat_template_kwargs": {"effort": "low"}}
    assert len({low.prompt_id, high.prompt_id, accepted(row).prompt_id}) == 3
    assert low.prompt_id == text.prompt_id
    assert accepted({**row, "chat_template_kwargs": {}}).prompt_id == accepted(row).prompt_id
    carried = accepted({**row, "chat_template_kwargs": {"effort": "low"}}, pool={"carry": ["chat_template_kwargs"]})
    assert (carried.template_kwargs, carried.other) == (None, {"pool_chat_template_kwargs": {"effort": "low"}})


def test_thoughts_of_a_column_stand_in_the_message():
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert accepted({"prompt": "q", "response": "4", "reasoning_content": "2 and 2"}).response == [message]
    columns = {"pool": {"columns": {"reasoning": "thinking"}}}
    assert accepted({"prompt": "q", "response": "4", "thinking": "2 and 2"}, **columns).response == [message]
    listed = {"prompt": "q", "responses": ["4", "5"], "reasoning_content": ["2 and 2", None]}
    assert [item.candidate.response for item in candidates(listed)] == [[message], "5"]
    for response in ("<think>\n2 and 2</think>4", [message], [message, {"role": "tool", "content": "x"}, message]):
        (item,) = candidates({"prompt": "q", "response": response, "reasoning_content": "2 and 2"})
        assert item.rejection.reason.startswith("reasoning ")


def test_settings_of_sampling_are_read_under_other_names_and_as_columns():
    row = {"prompt": "q", "response": "a"}
    assert accepted({**row, "sampling_params": {"temperature": 0.7, "n": 4}}).sampling == {"temperature": 0.7}
    alone = accepted({**row, "temperature": 0.7, "top_p": 0.9})
    assert alone.sampling == {"temperature": 0.7, "top_p": 0.9}
    assert alone.other == {"temperature": 0.7, "top_p": 0.9}
    assert accepted({**row, "sampling": {"temperature": 1.0}, "temperature": 0.7}).sampling == {"temperature": 1.0}
    assert accepted({**row, "temperature": 0.7}, pool={"carry": ["temperature"]}).sampling is None
    (one,) = candidates({"prompt": "q", "responses": [{"text": "a", "temperature": 0.5}]})
    assert one.candidate.sampling == {"temperature": 0.5}


@pytest.mark.parametrize("name", MEDIA.names)
def test_a_row_that_needs_more_than_text_is_a_reject(tmp_path, name):
    pool = [*rows(20), {"prompt": "What is this?", "response": "A cat.", name: ["cat.png"]}]
    pool[3] = {"prompt": "<image>What is this?", "response": "A dog.", name: []}
    storage = Storage(str(tmp_path / "workspace"))
    plan, _ = prepare(make_config(write_jsonl(tmp_path / "p.jsonl", pool)), storage)
    assert [(row["row"], row["reason"]) for row in all_rejects(storage, plan)] == [
        (3, "needs images, video or sound"),
        (20, "needs images, video or sound"),
    ]
    carried = make_config(tmp_path / "p.jsonl", pool={"carry": [name]})
    assert prepare(carried, Storage(str(tmp_path / "carried")))[1].rows == 21
    without = write_jsonl(tmp_path / "w.jsonl", [{"prompt": "What does <image> mean in HTML?", "response": "a"}])
    assert prepare(make_config(without), Storage(str(tmp_path / "without")))[1].rows == 1


def test_fields_of_responses_become_columns(tmp_path):
    pool = [{"prompt": "q", "responses": [{"text": "a", "reward": 1, "model": "m"}, {"text": "b", "reward": 0.5}]}]
    storage = Storage(str(tmp_path / "workspace"))
    _, prepared = prepare(make_config(write_jsonl(tmp_path / "p.jsonl", pool)), storage)
    found = {orjson.loads(row["messages"])[-1]["content"]: row for row in all_rows(storage, prepared).to_pylist()}
    assert [(found[text]["reward"], found[text]["source"]) for text in "ab"] == [(1.0, "m"), (0.5, None)]


def test_what_sglang_says_of_a_response_is_read():
    meta = {"id": "x", "finish_reason": {"type": "stop", "matched": 2}, "completion_tokens": 2}
    recorded = [[-0.5, 5, None], [-0.25, 2, None]]
    answer = {"text": "a", "output_ids": [5, 2], "meta_info": {**meta, "output_token_logprobs": recorded}}
    (one,) = candidates({"prompt": "q", "responses": [answer]})
    candidate = one.candidate
    assert (candidate.response, candidate.response_ids, candidate.recorded_logprobs) == ("a", [5, 2], [-0.5, -0.25])
    assert (candidate.truncated, candidate.other["meta_info"]) == (False, meta)
    (cut,) = candidates({"prompt": "q", "response": "a", "meta_info": {"finish_reason": {"type": "length"}}})
    assert cut.rejection.reason == "truncated"


PAIRS = [[-0.5, 5, None], [-0.25, 6, None]]
OTHERS = "recorded log-probabilities are of other tokens"


def test_sglangs_log_probabilities_are_those_of_its_output_ids():
    answer = {"text": "a b", "output_ids": [5, 6]}

    def row(pairs: Any, **more: Any) -> dict[str, Any]:
        return {"prompt": "q", "responses": [{**answer, "meta_info": {"output_token_logprobs": pairs}, **more}]}

    as_text = orjson.dumps({"output_token_logprobs": PAIRS}).decode()
    for good in (PAIRS, PAIRS[:1], [*PAIRS, [-0.125, 2, None]], [[-0.5, 5.0], [-0.25, 6.0]]):
        assert accepted(row(good)).recorded_logprobs[0] == -0.5
    assert accepted(row(None, meta_info=as_text, output_ids="[5, 6]")).recorded_logprobs == [-0.5, -0.25]
    late = accepted(row([PAIRS[1]], output_ids=[7, 8, 6]))
    assert (late.response_ids, late.recorded_logprobs) == ([7, 8, 6], [None, None, -0.25])
    reasons = {
        OTHERS: [row([[-0.5, 5, None], [-0.25, 7, None]]), row(PAIRS[::-1]), row(PAIRS, response_ids=[5, 7])],
        "recorded log-probabilities have an unknown form": [row([[-0.5, -2.5], [-0.25, -1.5]]), row([-0.5, -0.25])],
    }
    for reason, bad in reasons.items():
        for one in bad:
            (item,) = candidates(one)
            assert isinstance(item, Rejected), one
            assert item.rejection.reason == reason


@pytest.mark.parametrize(
    ("value", "ids", "expected"),
    [
        (PAIRS, [5, 6], [-0.5, -0.25]),
        ('[[-0.5, 5, "a"], [-0.25, 6, "b"]]', "[5, 6]", [-0.5, -0.25]),
        ([[None, 4, None], *PAIRS], [5, 6], [-0.5, -0.25]),
        ([[None, 5, None], *PAIRS[1:], [-1.0, 2, None]], [5, 6], [None, -0.25]),
        (PAIRS, [3, 4, 5, 6, 2], [None, None, -0.5, -0.25, None]),
        ([{"logprob": -0.5, "id": 5}, {"logprob": -0.25, "token_id": 6}], [5, 6], [-0.5, -0.25]),
        ([{"logprob": -0.5, "id": 5}, {"logprob": -0.25, "id": 7}], [5, 6], OTHERS),
        (PAIRS, [5, 7], OTHERS),
        (PAIRS, [5], [-0.5, -0.25]),
        ([[-0.1, -2.3], [-0.2, -3.1]], [5, 6], "recorded log-probabilities do not match response_ids"),
        ([[-0.1, True], [-0.2, True]], [5, 6], "recorded log-probabilities do not match response_ids"),
        ([["-0.1", 5], ["-0.2", 6]], [5, 6], "recorded log-probabilities do not match response_ids"),
    ],
)
def test_log_probabilities_stand_at_their_own_tokens(value, ids, expected):
    row = {"prompt": "q", "response": "a b", "response_ids": ids, "logprobs": value}
    (item,) = candidates(row, behavior={"column": "logprobs"})
    if isinstance(expected, str):
        assert isinstance(item, Rejected)
        assert item.rejection.reason == expected
    else:
        assert item.candidate.recorded_logprobs == expected


def test_log_probabilities_of_what_the_policy_wrote_stand_where_its_mask_is_1():
    row = {"prompt": "q", "response": "a b", "response_ids": [5, 9, 9, 6], "response_mask": [1, 0, 0, 1]}
    found = accepted({**row, "logprobs": PAIRS}, behavior={"column": "logprobs"}).recorded_logprobs
    assert found == [-0.5, None, None, -0.25]


CELLS = {
    "logprobs": ("[-0.5, -0.25]", "[nan -0.25]", "5", "[]"),
    "reasoning": ("I add two and two.", '["I add", "two and two."]', '{"effort": "minimal"}', "None"),
    "completion_ids": ("[5, 6]", "[5 6]", "2", "[]"),
    "advantage": ("0.5", "-1", "1.0", "high"),
    "history": ('[["Hi?", "Hello."]]', "Hi?", "[]", "null"),
    "documents": ('[{"title": "a"}]', "{'title': 'a'}", "3", "{}"),
    "images": ('["cat.png"]', "cat.png", "[]", "None"),
}
"""Of a column two cells of a .csv that mean something and two that do not."""


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_a_csv_mean_what_they_say(name):
    for place, cell in enumerate(CELLS[name]):
        normaliser = Normaliser(make_config("pool.csv"))
        (item,) = normaliser.candidates({"prompt": "q", "response": "a", name: cell})
        is_seen = isinstance(item, Rejected) or normaliser.unread.counts == {name: 1}
        assert is_seen == (place < 2), cell


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("completion_ids", [[5], [6, 7]]),
        ("completion_ids", [None, [6, 7]]),
        ("output_ids", [5.0, 6.0]),
        ("reasoning", ["two and two", "off"]),
        ("thinking", {"type": "thinking", "thinking": "two and two"}),
        ("weights", {"math": 0.5}),
    ],
)
def test_what_means_something_is_seen_in_lists_and_objects(name, value):
    normaliser = Normaliser(make_config("pool.jsonl"))
    found = list(normaliser.candidates({"prompt": "q", "responses": ["a", "b"], name: value}))
    assert len(found) == 2
    assert normaliser.unread.counts[name] >= 1


def test_cells_of_a_csv_are_read():
    row = {"prompt": "q", "response": "a b", "response_ids": "[5, 6]", "response_mask": "[1, 0]"}
    row |= {"behavior_logprobs": "[-0.5, null]", "sampling": '{"temperature": "0.7", "top_p": ""}'}
    found = accepted({**row, "chat_template_kwargs": "null", "finish_reason": "{'type': 'stop', 'matched': 2}"})
    assert (found.response_ids, found.response_mask, found.recorded_logprobs) == ([5, 6], [1, 0], [-0.5, None])
    assert (found.sampling, found.template_kwargs, found.truncated) == ({"temperature": 0.7}, None, False)
    (cut,) = candidates({**row, "finish_reason": '{"type": "length", "length": 7}'})
    assert cut.rejection.reason == "truncated"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0.7, "logprobs": 1}, {"temperature": 0.7}),
        ({"temperature": 0.7, "logprobs": True}, {"temperature": 0.7}),
        ({"temperature": 0.7, "logprobs": "5"}, {"temperature": 0.7}),
        ({"temperature": 0.7, "logprobs": "raw_logprobs"}, {"temperature": 0.7, "logprobs": "raw"}),
        ({"temperature": "0.7", "top_k": "20"}, {"temperature": 0.7, "top_k": 20}),
        ({"temperature": float("nan"), "top_p": 0.9}, {"top_p": 0.9}),
        ({"temperature": "NaN", "top_p": None}, None),
        (float("nan"), None),
        ("null", None),
        ({"temperature": True}, "sampling settings are not numbers"),
        ({"temperature": "hot"}, "sampling settings are not numbers"),
        ({"temperature": "-1"}, "sampling settings are not numbers"),
        ({"temperature": float("inf")}, "sampling settings are not numbers"),
        ({"logprobs": "scaled"}, "sampling.logprobs is not known"),
        ("hot", "sampling is not an object"),
    ],
)
def test_settings_of_sampling_are_numbers_or_not_known(given, expected):
    (item,) = candidates({"prompt": "q", "response": "a", "sampling": given})
    if isinstance(expected, str):
        assert item.rejection.reason == expected
    else:
        assert item.candidate.sampling == expected


def test_what_a_row_says_of_its_sampling_goes_over_the_config():
    row, said = {"prompt": "q", "response": "a"}, {"pool": {"sampling": {"temperature": 1.0, "top_p": 0.9}}}
    assert accepted(row, **said).sampling == {"temperature": 1.0, "top_p": 0.9}
    for own in ({"temperature": 0.5}, {"sampling": {"temperature": 0.5}}, {"sampling_params": {"temperature": 0.5}}):
        assert accepted({**row, **own}, **said).sampling == {"temperature": 0.5, "top_p": 0.9}


def test_settings_of_sampling_in_columns_of_their_own_may_be_text_or_missing():
    row = {"prompt": "q", "response": "a"}
    assert accepted({**row, "temperature": "0.7", "top_p": float("nan")}).sampling == {"temperature": 0.7}
    assert accepted({**row, "temperature": float("nan")}).sampling is None


@pytest.mark.parametrize(
    "value",
    [
        {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]},
        {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25]},
        [{"logprob": -0.5}, {"logprob": -0.25}],
        [[-0.5, 5, "a"], [-0.25, 6, "b"]],
        [-0.5, -0.25],
    ],
)
def test_log_probabilities_are_read_in_the_forms_that_servers_write(value):
    row = {"prompt": "q", "response": "a b", "response_ids": [5, 6], "logprobs": value}
    assert accepted(row, behavior={"column": "logprobs"}).recorded_logprobs == [-0.5, -0.25]
