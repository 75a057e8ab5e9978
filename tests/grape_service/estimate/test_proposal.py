"""`grape init` writes a config that fits the pool and needs no edit."""

from __future__ import annotations

import pytest
import yaml

from grape_service.config.loading import load_config, parse_config
from grape_service.errors import UserError
from grape_service.estimate.proposal import name_of, proposed_config
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rows, make_config, prepare, write_jsonl
from tests.published_pools import PUBLISHED


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
    assert found.equals(prepared_rows(tmp_path, make_config(pool), "auto"))
    assert found.num_rows == len(PUBLISHED[name].expected)


def test_it_suggests_filters_and_what_behavior_would_need(tmp_path):
    text = proposed_config(str(PUBLISHED["openr1"].write(tmp_path / "openr1")), "m")
    assert "#   - {column: correctness_math_verify, equals: true}  # true for 3 of 4 candidates" in text
    assert "#     olympiads: {model: …}  # 2 candidates" in text
    uncommented = "\n".join(line.replace("# where:", "where:").replace("#   - ", "  - ") for line in text.split("\n"))
    assert len(parse_config(yaml.safe_load(uncommented)).pool.where) == 2


def test_a_pool_whose_columns_say_nothing_is_an_error_that_names_them(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"Anfrage": "q", "Antwort": "a"}])
    with pytest.raises(UserError, match=r"no row of the pool has the column 'prompt' \(columns: Anfrage, Antwort\)"):
        proposed_config(str(tmp_path / "p.jsonl"), "m")


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
