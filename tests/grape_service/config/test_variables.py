"""${NAME} and x- keys of a config file."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from grape_service.config.document import config_schema
from grape_service.config.loading import load_config
from grape_service.errors import UserError

pytestmark = pytest.mark.quick

TEXT = """
x-model: &model {dtype: bfloat16, engine: vllm}
name: math-sft
pool: {path: "${POOLS}/math/"}
target: {<<: *model, model: "${MODEL}"}
select: {keep: "${KEEP}"}
output: {path: s3://team/datasets}
train: {sft: {command: [sh, -c, "train ${POOLS} {output}"]}}
"""


def config(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_variables_that_are_set_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POOLS", "s3://team/pools"), ("MODEL", "org/m"), ("KEEP", "2")):
        monkeypatch.setenv(name, value)
    made = load_config(config(tmp_path))
    assert (made.pool.path, made.target.model, made.select.keep) == ("s3://team/pools/math/", "org/m", 2)
    assert (made.target.dtype, made.target.engine) == ("bfloat16", "vllm")
    assert made.train is not None
    assert made.train.jobs["sft"].command[-1] == "train ${POOLS} {output}"  # a shell's own, on another machine


def test_a_path_with_a_variable_that_is_not_set_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POOLS", raising=False)
    with pytest.raises(UserError, match=r"names the variable POOLS: write \$\{POOLS\} and set it, or the path itself"):
        load_config(config(tmp_path))


def test_only_x_keys_of_the_top_level_are_passed_over(tmp_path: Path) -> None:
    minimal = "name: x\npool: {path: p}\ntarget: {model: m}\noutput: {path: o}\n"
    assert load_config(config(tmp_path, f"x-y: 1\n{minimal}")).name == "x"
    with pytest.raises(UserError, match=r"unknown key 'select\.x-y'"):
        load_config(config(tmp_path, f"{minimal}select: {{x-y: 1}}\n"))


def test_the_schema_of_editors_knows_x_keys() -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    values = {"name": "x", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}}
    assert list(validator.iter_errors({**values, "x-model": {"any": 1}})) == []
    assert list(validator.iter_errors({**values, "y-model": 1}))
