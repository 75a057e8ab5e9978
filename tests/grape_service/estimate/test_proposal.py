"""`grape init` writes a config that fits the pool and needs no edit."""

from __future__ import annotations

import pytest
import yaml

from grape_service.config.loading import load_config, parse_config
from grape_service.errors import UserError
from grape_service.estimate.proposal import name_of, proposed_config
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rows, make_config, prepare, write_jsonl
from tests.published_rollouts import PUBLISHED


def prepared_rows(tmp_path, config, name):
    storage = Storage(str(tmp_path / f"workspace-{name}"))
    return all_rows(storage, prepare(config, storage)[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_that_fits_a_published_pool_reads_it_as_it_is(tmp_path, name):
    pool = PUBLISHED[name].write(tmp_path / "pool")
    text = proposed_config(str(pool), "some/model")
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml")
    assert config.target.model == "some/model"
    assert config.output.path == "./datasets"
    assert text.startswith("# yaml-language-server: $schema=")
    assert PUBLISHED[name].says.partition(";")[0] in text
    found = prepared_rows(tmp_path, config, "init")
    assert str(found.to_pylist()) == str(prepared_rows(tmp_path, make_config(pool), "auto").to_pylist())  # NaN is NaN
    assert found.num_rows == len(PUBLISHED[name].expected)


def test_it_suggests_filters_and_what_behavior_would_need(tmp_path):
    text = proposed_config(str(PUBLISHED["openr1"].write(tmp_path / "openr1")), "m")
    assert "#   - {column: correctness_math_verify, equals: true}  # true for 3 of 4 candidates" in text
    assert "#     olympiads: {model: …}  # 2 candidates" in text
    uncommented = "\n".join(line.replace("# where:", "where:").replace("#   - ", "  - ") for line in text.split("\n"))
    assert len(parse_config(yaml.safe_load(uncommented)).pool.where) == 2


def test_a_pool_whose_columns_say_nothing_gets_a_config_with_a_question(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"Anfrage": "q", "Antwort": "a"}])
    text = proposed_config(str(tmp_path / "p.jsonl"), "m")
    assert "# No column has a name that says it holds the prompt. Which one does?" in text
    assert "# Columns: Anfrage, Antwort." in text
    assert parse_config(yaml.safe_load(text)).pool.columns == {}
    sets = ["pool.columns.prompt=Anfrage", "pool.columns.response=Antwort", "select.keep=2", "workers.replicas=1"]
    answered = proposed_config(str(tmp_path / "p.jsonl"), "m", sets=sets)
    config = parse_config(yaml.safe_load(answered))
    assert config.pool.columns == {"prompt": "Anfrage", "response": "Antwort"}
    assert (config.select.keep, config.workers.replicas) == (2, 1)
    assert "Which one does?" not in answered
    assert "# 1 prompts by their number of distinct responses: 1: 1." in answered
    assert prepared_rows(tmp_path, config, "answered").num_rows == 1


def test_advice_never_takes_the_prompt_for_the_response(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "prompt_response_hint": "q", "respons": "a"}])
    text = proposed_config(str(pool), "m")
    assert "# columns: {response: respons}" in text
    pool = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "user_prompt": "q"}])
    assert "# columns: {response: …}" in proposed_config(str(pool), "m")


def test_an_empty_pool_is_refused(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", [])
    with pytest.raises(UserError, match="has no rows"):
        proposed_config(str(pool), "m")


def test_rewards_and_scores_become_filters_and_what_is_not_read_is_carried(tmp_path):
    rows = [
        {"prompt": "q", "response": f"a {n}", "reward": n / 10, "score": str(n), "logprobs": [-0.5], "same_score": 1}
        for n in range(10)
    ]
    text = proposed_config(str(write_jsonl(tmp_path / "p.jsonl", rows)), "m")
    assert "#   - {column: reward, at_least: 0.4}  # from 0 to 0.9; half have 0.4 or less" in text
    assert "#   - {column: score, at_least: 4.0}" in text
    assert "same_score, at_least" not in text
    assert "# 'logprobs' holds log-probabilities of tokens: read them with behavior: {column: logprobs}, and" in text
    assert "# behavior: {column: logprobs, missing: uniform}" in text
    config = parse_config(yaml.safe_load(text))
    assert config.pool.carry == ["logprobs"]
    assert prepared_rows(tmp_path, config, "carried").num_rows == 10


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        ("s3://team/pools/math/", "math"),
        ("pools/Open R1!/data", "open-r1"),
        ("x/*.jsonl", "x"),
        ("/data/train.jsonl", "pool"),
        ("ä", "pool"),
    ],
)
def test_the_name_of_a_dataset_comes_from_the_pools_path(pool, name):
    assert name_of(pool) == name


def test_names_that_yaml_would_read_otherwise_are_quoted(tmp_path):
    pool = write_jsonl(tmp_path / "a: b #c" / "p.jsonl", [{"prompt": "q", "response": "a", "source": "x: {y} # z"}])
    config = parse_config(yaml.safe_load(proposed_config(str(pool), "m: 1 #")))
    assert (config.pool.path, config.target.model) == (str(pool), "m: 1 #")
