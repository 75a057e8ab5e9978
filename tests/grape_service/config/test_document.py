"""The schema and the page of the config: valid for the configs that we ship, and as fresh as the models."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from grape_service.config.document import config_page, config_schema
from grape_service.config.loading import apply_override, load_config
from grape_service.errors import UserError

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "examples" / "quickstart" / "grape.yaml"


def test_the_page_is_as_fresh_as_the_models() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == config_page(), "run `make docs`"


def test_every_link_of_the_page_leads_to_a_heading() -> None:
    page = config_page()
    headings = re.findall(r"^## (.*)$", page, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links
    assert links - anchors == set()


def test_the_schema_takes_what_a_config_may_say_and_refuses_the_rest() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    config = yaml.safe_load(QUICKSTART.read_text())
    checks = {"refusal": "warn", "language": False, "repetition": {"n": 3}}
    assert list(validator.iter_errors({**config, "checks": checks, "train": {"sft": {"epochs": 2}}})) == []
    assert ["slect" in error.message for error in validator.iter_errors({**config, "slect": {}})] == [True]
    assert list(validator.iter_errors({**config, "select": {"keep": 0}}))


def test_overrides_reach_sections_lists_and_keys_that_the_file_lacks() -> None:
    config = load_config(
        QUICKSTART, ["select.keep=2", "pool.where.0.equals=false", "train.sft.epochs=3", "weights=null"]
    )
    assert config.select.keep == 2
    assert config.pool.where[0].equals is False
    assert config.train is not None
    assert config.train.jobs["sft"].epochs == 3
    assert config.weights is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("select.keep", "--set select.keep is not key=value"),
        ("=3", "is not key=value"),
        ("pool.where.7.equals=1", "'pool.where' is a list of 1: count its items from 0"),
        ("name.first=x", "'name' is the value 'quickstart' and has no keys"),
        ("select.keep=[1", "is not a YAML value"),
        ("select.kep=2", "unknown key 'select.kep'; did you mean 'keep'?"),
        ("select.keep=0", "with --set select.keep: 'select.keep'"),
    ],
)
def test_an_override_that_is_wrong_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, [override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "notify.webhook=http://hooks/t0ken",
        "notify.webhook=ftp://hooks/t0ken",
        "notify.webhook: http://hooks/t0ken",
        "notify.webhook=[http://hooks/t0ken",
        "=http://hooks/t0ken",
        "notify=http://hooks/t0ken",
        "notify.webhook={a: t0ken}",
        "notify.webhooks=http://hooks/t0ken",
        "storage=t0ken",
        "storage.secret=[t0ken]",
        "workers.ray_address=http://user:t0ken@head:1",
        "output.path=s3://user:t0ken@bucket",
    ],
)
def test_a_sentence_about_an_override_does_not_repeat_what_may_be_a_secret(override: str) -> None:
    said = []
    for wrong in ([], ["select.keep=0"], ["select.kep=1"]):  # some of the overrides are right by themselves
        try:
            load_config(QUICKSTART, [override, *wrong])
        except UserError as error:
            said.append(str(error))
    assert said
    assert "t0ken" not in " ".join(said)


def test_an_override_is_yaml() -> None:
    values = {"pool": {"path": "a"}}
    apply_override(values, "pool.columns={prompt: q=1}")
    apply_override(values, "target.system_prompt='a: b'")
    assert values == {"pool": {"path": "a", "columns": {"prompt": "q=1"}}, "target": {"system_prompt": "a: b"}}
